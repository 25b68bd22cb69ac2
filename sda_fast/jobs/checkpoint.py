"""Checkpoints that are whole or absent: written to a temporary folder, verified by checksum, renamed into place.

A checkpoint is a folder `step-00000100` of safetensors and JSON files; `manifest.json`, written last, holds the
run's state and the SHA-256 of every other file. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Write `folder/step-...`: `write(path)` puts the files into an empty folder, which then becomes the checkpoint.

    Whatever interrupts it (an exception, Ctrl-C, a full disk, kill -9), checkpoints written before stay as they were
    and no folder named `step-...` is ever incomplete.

    Args:
        state: JSON values; `step` is added.
    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    unfinished = folder / f"unfinished-{step:08d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        write(unfinished)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        checksums = {path.relative_to(unfinished).as_posix(): file_sha256(path) for path in files}
        manifest = {"format": FORMAT, "step": step, "files": checksums, "state": dict(state)}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, unfinished / MANIFEST]:
            flush_to_disk(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
        flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The valid checkpoint with the highest step and its state (with `step`), or None.

    Unfinished or damaged checkpoints are passed over with a warning that names them.
    """
    if not folder.is_dir():
        return None
    for unfinished in sorted(folder.glob("unfinished-*")):
        logger.warning("ignoring the half-written checkpoint %s", unfinished)
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            return candidate, read_manifest(candidate)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("ignoring the damaged checkpoint %s: %s", candidate, error)
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, after comparing every file with its checksum.

    Raises:
        OSError: a file is missing. ValueError: a file is damaged or the format is unknown.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{checkpoint / MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
    for name, expected in manifest["files"].items():
        if file_sha256(checkpoint / name) != expected:
            raise ValueError(f"{checkpoint / name} does not match its checksum")
    return {**manifest["state"], "step": manifest["step"]}


def prune_checkpoints(newest: Path, keep: int) -> None:
    """Delete all but `keep` checkpoints up to `newest` (0 keeps all) and what an interrupted run left half-written.

    Later steps than `newest` can only be damaged ones that a resumed run passed over; they are left alone.
    """
    for unfinished in newest.parent.glob("unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if keep > 0:
        upto = sorted(path for path in newest.parent.glob("step-*") if path.name <= newest.name)
        for old in upto[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a rename after it cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimiser's per-parameter state as safetensors; what is no tensor in it goes into the JSON metadata."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _flatten(optimizer.state_dict()["state"], (), tensors, values)
    save_file(tensors, path, metadata={"values": json.dumps(values)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put the state written by `save_optimizer` into an optimiser over the same parameters in the same order.

    Learning rate and the other settings of the groups stay as they are in `optimizer`.
    """
    with safe_open(path, framework="pt") as stream:
        values = json.loads(stream.metadata()["values"])
    state = _unflatten({**load_file(path), **values})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    # A path part carries its kind ("i" integer key, "s" string key), because JSON would turn both into strings.
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            part = f"i{key}" if isinstance(key, int) else f"s{key}"
            _flatten(member, (*path, part), tensors, values)
    elif isinstance(value, torch.Tensor):
        tensors["/".join(path)] = value.detach().cpu().contiguous()
    elif path:
        values["/".join(path)] = value


def _unflatten(entries: Mapping[str, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in entries.items():
        keys = [int(part[1:]) if part[0] == "i" else part[1:] for part in path.split("/")]
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = value
    return tree


def random_state() -> dict[str, torch.Tensor]:
    """The random states of torch (CPU, and the current CUDA device's), NumPy's global generator and Python's `random`.

    Every tensor has a fixed size, so that processes can exchange them.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_cached": torch.tensor([float(cached)], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = float(state["numpy_cached"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, *words = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
