"""Files that are either wholly there or not at all: write beside the target, flush to disk, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on a clean exit it is flushed to disk and renamed to `path`.

    The folder is created where missing. If the block raises, the temporary file is removed and `path` is left as it
    was. A killed process leaves at most a file named `.<name>.<pid>.tmp`.

    Args:
        durable: wait until the disk has the file. False for many small files that can be made again: they survive a
            killed process, and after a power cut one may be empty.

    Raises:
        FileNotFoundError: the block did not create the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if durable and hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomic(path: str | Path, content: str) -> None:
    """Write `content` to `path` atomically as UTF-8, newlines unchanged."""
    write_bytes_atomic(path, content.encode("utf-8"))


def write_json_atomic(path: str | Path, content: Any) -> None:
    """Write `content` to `path` atomically as indented JSON.

    Raises:
        ValueError: `content` holds NaN or infinity, which JSON cannot say.
    """
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors_atomic(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
        tensors: name -> numpy array or torch tensor (all of one kind); made contiguous where they are not.
        metadata: strings stored in the file's header.
    """
    header = None if metadata is None else dict(metadata)
    with atomic_write(path) as temporary:
        if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary, header)
        else:
            from safetensors.torch import save_file as save_torch_file

            save_torch_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)
