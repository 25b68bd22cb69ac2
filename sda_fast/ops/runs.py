"""Layers of a group that are alike enough for one launch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

# As many as a kernel has arguments for (`sda_fast.kernels.group`).
LAYERS_PER_LAUNCH = 3


def equal_runs(kinds: Sequence[Hashable]) -> list[slice]:
    """Cut layers into runs of one kind that are not too many for one launch."""
    runs: list[slice] = []
    for place, kind in enumerate(kinds):
        if place and kind == kinds[place - 1] and place - runs[-1].start < LAYERS_PER_LAUNCH:
            runs[-1] = slice(runs[-1].start, place + 1)
        else:
            runs.append(slice(place, place + 1))
    return runs
