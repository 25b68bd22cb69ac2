"""What identifies the inputs of a long job, so that only work done on the same inputs is continued."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from sda_fast import __version__
from sda_fast.data.items import Catalogue

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "safetensors", "numpy", "pillow")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8")).hexdigest()


def catalogue_fingerprint(catalogue: Catalogue, *, pictures: bool = False) -> str:
    """SHA-256 of all item ids, attributes and image names in their order.

    Args:
        pictures: include size and modification time of every picture file too.
    """
    whole = hashlib.sha256()
    for item in catalogue:
        row: list[Any] = [item.item_id, item.attributes, item.image.name if item.image else None]
        if pictures and item.image is not None and item.image.is_file():
            status = item.image.stat()
            row += [status.st_size, status.st_mtime_ns]
        whole.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8") + b"\n")
    return whole.hexdigest()


def folder_fingerprint(folder: Path, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> str:
    """SHA-256 over names and contents of a folder's small files, and over names, sizes and times of its large ones."""
    entries: list[list[Any]] = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        status = path.stat()
        small = status.st_size <= 64 * 2**20
        content = hashlib.sha256(path.read_bytes()).hexdigest() if small else [status.st_size, status.st_mtime_ns]
        entries.append([path.name, content])
    return digest(entries)


def versions() -> dict[str, str]:
    """Versions of Python, sda-fast and the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "sda-fast": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
