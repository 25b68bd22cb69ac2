"""Which items are in which batch: a pure function of (seed, step), so a resumed run needs only the step's number."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class BatchOrder:
    """Batches of `batch_size` distinct items; every epoch is a new permutation, its incomplete last batch is left out.

    Raises:
        ValueError: batch_size < 2, or the catalogue has fewer items than one batch.
    """

    num_items: int
    batch_size: int
    seed: int
    _epoch: int = field(default=-1, init=False, repr=False)
    _permutation: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"a contrastive batch needs at least 2 items, batch_size is {self.batch_size}")
        if self.num_items < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size} but the catalogue has only {self.num_items} items")

    @property
    def batches_per_epoch(self) -> int:
        return self.num_items // self.batch_size

    def batch(self, step: int) -> list[int]:
        """Catalogue positions of the batch of `step` (counted from 0)."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._permutation = torch.randperm(self.num_items, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[place * self.batch_size : (place + 1) * self.batch_size]


def rank_slice(length: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `length` rows that `rank` works on; parts differ by at most one row, larger ones first."""
    share, rest = divmod(length, world_size)
    start = rank * share + min(rank, rest)
    return slice(start, start + share + (rank < rest))


def length_buckets(lengths: list[int], size: int) -> list[list[int]]:
    """Positions 0..n-1 in chunks of at most `size` with similar lengths together, longest first.

    Longest first makes the peak of memory come at once and not at the end of a run. Ties keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[start : start + size] for start in range(0, len(order), size)]
