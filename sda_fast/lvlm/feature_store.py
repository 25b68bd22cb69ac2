"""Features of pictures on disk: safetensors shards, mapped into memory, verified, and added to as a run goes."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sda_fast.atomic import write_safetensors_atomic

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
FLUSH_SECONDS = 60.0
# Left on the disk for checkpoints and tables, which matter more.
FREE_BYTES_KEPT = 2**30


class FeatureStore:
    """Tensors by picture and name, in a folder of shards that any number of processes read and add to.

    A shard is written whole or not at all and never changed; what waits in memory is written when it reaches
    SHARD_BYTES, when a minute has passed, and by `flush`. Every picture has a checksum, compared whenever it is read.
    A shard that fails it is deleted with a warning, and its pictures count as unknown. Where there is no more room, a
    warning says so once and nothing more is added. One thread may read while another adds.

    Args:
        key: what the shards must be marked with.
        most_bytes: that the folder may take; None: as much as leaves FREE_BYTES_KEPT on the disk.

    Attributes:
        counts: found, missing, added, damaged_shards, not_kept (for want of room).
    """

    def __init__(self, folder: Path, key: str, *, most_bytes: int | None = None) -> None:
        self.folder, self.key, self.most_bytes = folder, key, most_bytes
        self._bytes = 0
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._shard_of: dict[str, Path] = {}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._waiting_bytes = 0
        self._flushed = time.monotonic()
        self._full = False
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("shard-*.safetensors")):
            self._enter(path)

    def __contains__(self, picture: str) -> bool:
        return picture in self._waiting or picture in self._shard_of

    def __len__(self) -> int:
        return len({*self._waiting, *self._shard_of})

    def get(self, picture: str) -> dict[str, torch.Tensor] | None:
        """The picture's tensors, mapped from the disk, or None where they are not known."""
        with self._lock:
            found = self._waiting.get(picture)
            path = self._shard_of.get(picture)
            if found is None and path is not None:
                found = self._read(path, picture)
            self.counts["missing" if found is None else "found"] += 1
            return found

    def add(self, picture: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a picture's tensors, on the CPU; does nothing where they are kept already."""
        with self._lock:
            if picture in self:
                return
            if self._full:
                self.counts["not_kept"] += 1
                return
            # A copy of its own: a slice would keep the whole batch's features in memory.
            self._waiting[picture] = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
            self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())
            self.counts["added"] += 1
            if self._waiting_bytes >= SHARD_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what waits in memory as one shard."""
        with self._lock:
            self._flushed = time.monotonic()
            if not self._waiting:
                return
            path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
            try:
                self._check_room()
                self._write(path)
                self._bytes += path.stat().st_size
                self._shard_of.update(dict.fromkeys(self._waiting, path))
            except (OSError, SafetensorError) as error:
                self._full = True
                self.counts["added"] -= len(self._waiting)
                self.counts["not_kept"] += len(self._waiting)
                logger.warning(
                    "cannot add to the tower cache %s (%s); the %d pictures in it stay, the run goes on without adding",
                    self.folder, error, len(self._shard_of),
                )  # fmt: skip
            self._waiting, self._waiting_bytes = {}, 0

    def _check_room(self) -> None:
        if self.most_bytes is not None and self._bytes + self._waiting_bytes > self.most_bytes:
            raise OSError(f"it would take more than {self.most_bytes} bytes")
        if shutil.disk_usage(self.folder).free < self._waiting_bytes + FREE_BYTES_KEPT:
            raise OSError(f"fewer than {FREE_BYTES_KEPT} bytes would be left on the disk")

    def _write(self, path: Path) -> None:
        tensors = {f"{picture}/{name}": one for picture, own in self._waiting.items() for name, one in own.items()}
        checksums = {f"sha256.{picture}": checksum(own) for picture, own in self._waiting.items()}
        write_safetensors_atomic(path, tensors, {"key": self.key, **checksums})

    def _enter(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return
        if metadata.get("key") != self.key:
            self._discard(path, "it belongs to another model or other settings")
            return
        pictures = [name.removeprefix("sha256.") for name in metadata if name.startswith("sha256.")]
        self._shard_of.update(dict.fromkeys(pictures, path))
        self._bytes += path.stat().st_size

    def _read(self, path: Path, picture: str) -> dict[str, torch.Tensor] | None:
        try:
            with safe_open(path, framework="pt") as stream:
                expected = (stream.metadata() or {}).get(f"sha256.{picture}")
                names = [name for name in stream.keys() if name.startswith(f"{picture}/")]  # noqa: SIM118
                tensors = {name.removeprefix(f"{picture}/"): stream.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            self._discard(path, str(error))
            return None
        if not tensors or checksum(tensors) != expected:
            self._discard(path, f"picture {picture} does not match its checksum")
            return None
        return tensors

    def _discard(self, path: Path, reason: str) -> None:
        lost = [picture for picture, shard in self._shard_of.items() if shard == path]
        for picture in lost:
            del self._shard_of[picture]
        self.counts["damaged_shards"] += 1
        logger.warning(
            "deleting the damaged shard %s of the tower cache: %s; %d pictures will be computed again",
            path, reason, len(lost),
        )  # fmt: skip
        path.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
