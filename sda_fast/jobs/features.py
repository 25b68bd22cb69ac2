"""What a run asks the frozen tower: each picture once, a few at a time, and kept on disk where that is wanted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from sda_fast.data.items import Item
from sda_fast.jobs.batches import BatchMaker, Chunk
from sda_fast.losses.cached import is_out_of_memory
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.family import ImageFeatures
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tower import ParkedTower, picture_groups, run_tower
from sda_fast.lvlm.tower_cache import TowerCache

logger = logging.getLogger(__name__)


class Tower:
    """Completes chunks with the features of their pictures.

    Args:
        cache: what is made is added to it.
        group_size: pictures at a time. Default: with a cache 1, so that what is kept depends on nothing but the
            picture; else as many as hold `sda_fast.lvlm.tower.GROUP_VALUES` pixel values. Halved for good when memory
            runs out.
        offload: keep the tower's weights in main memory while it does not run.
    """

    def __init__(
        self, lvlm: LVLM, cache: TowerCache | None = None, *, group_size: int | None = None, offload: bool = False
    ) -> None:
        self.lvlm, self.cache = lvlm, cache
        self.group_size = 1 if group_size is None and cache is not None else group_size
        self.parked = ParkedTower(lvlm) if offload else None

    def complete(self, chunks: Iterable[Chunk]) -> None:
        """Fill in the features that are missing in image chunks."""
        incomplete = [chunk for chunk in chunks if None in chunk.features]
        if not incomplete:
            return
        with self.parked.on_device() if self.parked is not None else contextlib.nullcontext():
            for chunk in incomplete:
                self._complete(chunk)

    def _complete(self, chunk: Chunk) -> None:
        self._look_again(chunk)
        missing = [place for place, one in enumerate(chunk.features) if one is None]
        while missing:
            group = picture_groups(self.lvlm, chunk.tensors, missing, self.group_size)[0]
            try:
                made = run_tower(self.lvlm, chunk.tensors, group)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(group) == 1:
                    raise
                made = None
            if made is None:
                self.group_size = len(group) // 2
                logger.warning("out of memory in the tower; going on with %d pictures at a time", self.group_size)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            for place, features in zip(group, made, strict=True):
                self._keep(chunk, place, {name: part.cpu() for name, part in features.items()})
            missing = missing[len(group) :]

    def _look_again(self, chunk: Chunk) -> None:
        """Take what was added to the cache since the chunk was made, by the step before it."""
        for place, picture in enumerate(chunk.pictures):
            if self.cache is not None and picture is not None and chunk.features[place] is None:
                found = self.cache.get(picture)
                chunk.features[place] = None if found is None else found[0]

    def _keep(self, chunk: Chunk, place: int, features: ImageFeatures) -> None:
        chunk.features[place] = features
        picture = chunk.pictures[place]
        if self.cache is not None and picture is not None:
            self.cache.add(picture, features, chunk.tensors["shown_sizes"][place].tolist())


def cached_tower_features(
    lvlm: LVLM,
    items: Sequence[Item],
    folder: str | Path,
    *,
    prompts: PromptConfig | None = None,
    image_options: ImageOptions | None = None,
    batch_size: int = 16,
) -> list[ImageFeatures]:
    """The frozen tower's outputs for items, from the cache in `folder` or computed and added to it.

    Returns:
        One entry per item, on the CPU, mapped from the disk where it was there: `image_features` of
        `sda_fast.lvlm.encode.encode` for the batch that `collate_images` makes of the same items.

    Raises:
        ValueError: something in the tower is trainable.
    """
    options = image_options or ImageOptions()
    cache = TowerCache(lvlm, folder, options)
    maker = BatchMaker(lvlm, prompts or PromptConfig(), options, cache=cache)
    tower = Tower(lvlm, cache)
    features: list[ImageFeatures] = []
    for start in range(0, len(items), batch_size):
        chunk = maker.image_chunk(items[start : start + batch_size])
        tower.complete([chunk])
        features += chunk.image_features or []
    cache.flush()
    return features
