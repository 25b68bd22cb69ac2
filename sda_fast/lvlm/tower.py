"""The frozen vision tower: a few pictures at a time, and in main memory while it has nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from sda_fast.lvlm.family import ImageFeatures
from sda_fast.lvlm.load import LVLM

# Pixel values (all channels) that go through the tower at a time: some thousand patches, beyond which a product of
# matrices is no faster on any card, while what the tower keeps of every layer grows.
GROUP_VALUES = 4 * 2**20


def tower_features(
    lvlm: LVLM,
    batch: Mapping[str, torch.Tensor],
    places: Sequence[int] | None = None,
    *,
    group_size: int | None = None,
) -> list[ImageFeatures]:
    """The frozen tower's output, without gradient.

    Args:
        batch: from `collate_images`, on any device.
        places: the sequences whose pictures are wanted; default: all.
        group_size: pictures that go through the tower together. Default: as many as hold GROUP_VALUES pixel values.
            Groups differ to rounding; with 1, features depend on nothing but the picture.

    Returns:
        Per place, tensors by name, on the tower's device.
    """
    wanted = range(len(batch["input_ids"])) if places is None else places
    features: list[ImageFeatures] = []
    for group in picture_groups(lvlm, batch, list(wanted), group_size):
        features += run_tower(lvlm, batch, group)
    return features


def run_tower(lvlm: LVLM, batch: Mapping[str, torch.Tensor], group: Sequence[int]) -> list[ImageFeatures]:
    """The tower's output for these sequences' pictures, all at once."""
    with torch.no_grad():
        inputs = lvlm.family.pictures(lvlm.model, batch, group)
        device = tower_device(lvlm)
        return lvlm.family.image_features(lvlm.model, {name: tensor.to(device) for name, tensor in inputs.items()})


def picture_groups(
    lvlm: LVLM, batch: Mapping[str, torch.Tensor], places: Sequence[int], group_size: int | None = None
) -> list[list[int]]:
    """`places` cut into groups of `group_size`, or of at most GROUP_VALUES pixel values but at least one picture."""
    if group_size is not None:
        return [list(places[start : start + group_size]) for start in range(0, len(places), group_size)]
    rows = lvlm.family.picture_rows(lvlm.model, batch)["pixel_values"]
    values_in_row = batch["pixel_values"][0].numel()
    groups: list[list[int]] = []
    values = 0
    for place in places:
        own = rows[place] * values_in_row
        if not groups or values + own > GROUP_VALUES:
            groups.append([])
            values = 0
        groups[-1].append(place)
        values += own
    return groups


def tower_device(lvlm: LVLM) -> torch.device:
    """Where the tower is now."""
    return next(iter(lvlm.family.tower_tensors(lvlm.model).values())).device


def trainable_in_tower(lvlm: LVLM) -> list[str]:
    """Names of the tower's and the projector's parameters that require a gradient."""
    return [name for name, tensor in lvlm.family.tower_tensors(lvlm.model).items() if tensor.requires_grad]


class ParkedTower:
    """The tower's weights moved to main memory; inside `on_device` they are beside the decoder again.

    Nothing is copied back, because nothing in a frozen tower changes.
    """

    def __init__(self, lvlm: LVLM) -> None:
        self.lvlm = lvlm
        self._tensors = list(lvlm.family.tower_tensors(lvlm.model).values())
        self._parked = [tensor.data.cpu() for tensor in self._tensors]
        self._put(self._parked)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        device = self.lvlm.device
        self._put([tensor.to(device) for tensor in self._parked])
        try:
            yield
        finally:
            self._put(self._parked)

    def _put(self, contents: Sequence[torch.Tensor]) -> None:
        for tensor, content in zip(self._tensors, contents, strict=True):
            tensor.data = content
