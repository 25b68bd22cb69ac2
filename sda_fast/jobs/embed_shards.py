"""Intermediate files of an embedding run: each whole or absent, keyed by what made it, verified when read."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sda_fast.atomic import write_safetensors_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Vectors [n, D] float32 of the catalogue places [n] int64, and counts by name."""

    places: torch.Tensor
    vectors: torch.Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class EmbeddingShards:
    """A folder of shards that were made under one key; others in it count as absent."""

    folder: Path
    key: str

    def path(self, modality: str, index: int) -> Path:
        return self.folder / f"{modality}-{index:06d}.safetensors"

    def write(self, modality: str, index: int, shard: Shard) -> None:
        tensors = {"places": shard.places, "vectors": shard.vectors.contiguous()}
        counts = {f"count.{name}": str(value) for name, value in shard.counts.items()}
        write_safetensors_atomic(
            self.path(modality, index), tensors, {"key": self.key, "sha256": _checksum(tensors), **counts}
        )

    def read(self, modality: str, index: int, places: torch.Tensor) -> Shard | None:
        """The shard of these places; None where it is absent, or (with a warning) damaged or made in another way."""
        path = self.path(modality, index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in ("places", "vectors")}
        except (SafetensorError, OSError) as error:
            logger.warning("making %s again, it cannot be read: %s", path, error)
            return None
        if metadata.get("key") != self.key or not torch.equal(tensors["places"], places):
            logger.warning("making %s again, it belongs to other settings or another catalogue", path)
            return None
        if metadata.get("sha256") != _checksum(tensors):
            logger.warning("making %s again, it does not match its checksum", path)
            return None
        counts = {name[6:]: int(value) for name, value in metadata.items() if name.startswith("count.")}
        return Shard(tensors["places"], tensors["vectors"], counts)

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].numpy().tobytes())
    return whole.hexdigest()
