"""The frozen tower's outputs, kept on disk by model and picture, so that every picture goes through it once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sda_fast.atomic import write_json_atomic
from sda_fast.data.images import noise_image
from sda_fast.data.items import Item
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.family import ImageFeatures
from sda_fast.lvlm.feature_store import FeatureStore
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.tower import trainable_in_tower

logger = logging.getLogger(__name__)

FORMAT = 1
SIZE = "size"


class TowerCache:
    """What a model's frozen tower and projector make of pictures, on disk.

    `folder` holds one folder per model, named after a digest of everything that decides the features beyond rounding:
    the tower's and projector's weights and dtype, their configuration, the image processor's settings and the bounds
    on the pictures' size. A picture is known by the SHA-256 of its file; a missing one by its noise.

    Args:
        options: bounds on the pictures' size, and the seed of the noise that replaces missing ones.
        most_bytes: that the model's folder may take on the disk; None: no bound.

    Raises:
        ValueError: something in the tower or projector is trainable, so that its outputs change.
    """

    def __init__(
        self,
        lvlm: LVLM,
        folder: str | Path,
        options: ImageOptions | None = None,
        *,
        most_bytes: int | None = None,
    ) -> None:
        self.options = options or ImageOptions()
        self._digests: dict[tuple[str, int, int], str] = {}
        trainable = trainable_in_tower(lvlm)
        if trainable:
            raise ValueError(
                f"the tower's outputs cannot be kept: {trainable[0]} and {len(trainable) - 1} other parameters of the "
                "tower or projector are trainable"
            )
        about = tower_identity(lvlm, self.options)
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.store = FeatureStore(Path(folder) / key[:16], key, most_bytes=most_bytes)
        if not (self.store.folder / "about.json").is_file():
            write_json_atomic(self.store.folder / "about.json", {"model": lvlm.name, "key": key, **about})
        logger.info("tower cache %s: %d pictures", self.store.folder, len(self.store))

    def picture(self, item: Item) -> str | None:
        """The name under which an item's picture is kept; None where its file cannot be read."""
        if item.image is None:
            content = noise_image(item.item_id, self.options.noise_seed).tobytes()
            return "noise-" + hashlib.sha256(content).hexdigest()
        try:
            status = item.image.stat()
            file = (str(item.image), status.st_size, status.st_mtime_ns)
            if file not in self._digests:
                self._digests[file] = hashlib.sha256(item.image.read_bytes()).hexdigest()
        except OSError:
            return None
        return self._digests[file]

    def get(self, picture: str) -> tuple[ImageFeatures, tuple[int, int]] | None:
        """Features on the CPU and the (width, height) that the picture was shown in; None where they are not known."""
        found = self.store.get(picture)
        if found is None:
            return None
        width, height = found[SIZE].tolist()
        return {name: tensor for name, tensor in found.items() if name != SIZE}, (width, height)

    def add(self, picture: str, features: ImageFeatures, size: Sequence[int]) -> None:
        """Keep a picture's features."""
        self.store.add(picture, {**features, SIZE: torch.tensor(list(size), dtype=torch.int64)})

    def flush(self) -> None:
        """Write what waits in memory, so that a killed run finds it again."""
        self.store.flush()

    def __str__(self) -> str:
        counts = self.store.counts
        words = [f"{counts['found']} pictures from the tower cache, {counts['added']} added"]
        if counts["not_kept"]:
            words.append(f"{counts['not_kept']} not kept for want of room")
        if counts["damaged_shards"]:
            words.append(f"{counts['damaged_shards']} damaged shards deleted")
        return ", ".join(words)


def tower_identity(lvlm: LVLM, options: ImageOptions) -> dict[str, Any]:
    """Everything that decides a picture's features beyond rounding, as JSON values."""
    weights = hashlib.sha256()
    tensors = lvlm.family.tower_tensors(lvlm.model)
    for name in sorted(tensors):
        content = tensors[name].detach().cpu().contiguous()
        weights.update(f"{name} {content.dtype} {tuple(content.shape)}\n".encode())
        weights.update(content.flatten().view(torch.uint8).numpy().data)
    processor = lvlm.processor.image_processor
    # Where it was loaded from and by which version does not count.
    tower = lvlm.model.config.vision_config.to_dict()
    tower = {name: value for name, value in tower.items() if name[0] != "_" and name != "transformers_version"}
    return {
        "format": FORMAT,
        "family": lvlm.family.name,
        "weights": weights.hexdigest(),
        "tower": plain(tower),
        "processor": plain({"class": type(processor).__name__, **processor.to_dict()}),
        "pixels": [options.min_pixels, options.max_pixels],
        "shown": plain(lvlm.family.image_options(lvlm.processor, options.min_pixels, options.max_pixels)),
    }


def plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
