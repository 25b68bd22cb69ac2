"""Ranks of held-out items and the metrics made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sda_fast.data.split import Split

Scorer = Callable[[np.ndarray, bool], Tensor]
"""(user positions [B], whether the validation item is part of the history) -> scores [B, num_items] float32."""

CUTOFF = 10
METRICS = (f"hit@{CUTOFF}", f"ndcg@{CUTOFF}")
PROTOCOLS = ("full", "sampled")
GROUPS = ("all", "tail items", "popular items", "short users", "long users")


@dataclass
class Ranks:
    """Rank of every user's held-out item, counted from 0; a tie with another item counts as half a place.

    Attributes:
        users: [n] int64 user positions.
        full: [n] float64, among all items that the user had not met before.
        sampled: [n] float64, among the user's sampled negatives; None if there were none.
    """

    users: np.ndarray
    full: np.ndarray
    sampled: np.ndarray | None


def rank_of_target(scores: Tensor, targets: Tensor) -> Tensor:
    """[B, C] scores, [B] target scores -> [B] float64: candidates above the target plus half of those level with it.

    A NaN target is ranked behind everything.
    """
    above = (scores > targets[:, None]).sum(1).double()
    level = (scores == targets[:, None]).sum(1).double()
    return torch.where(targets.isnan(), float(scores.shape[1]), above + level / 2)


@torch.no_grad()
def rank_held_out(
    scorer: Scorer,
    split: Split,
    users: np.ndarray,
    *,
    test: bool,
    negatives: np.ndarray | None = None,
    batch_size: int = 256,
) -> Ranks:
    """Rank the test items, or the validation items, of `users`.

    Items seen before are masked: the training items, and for the test also the validation item.

    Args:
        negatives: [U, k] int32 fixed sampled items per user (row = user position), or None.
    """
    targets = split.test_items if test else split.validation_items
    full, sampled = [], []
    for first in range(0, len(users), batch_size):
        batch = users[first : first + batch_size]
        scores = scorer(batch, test)
        target = torch.as_tensor(targets[batch].astype(np.int64), device=scores.device)
        own = scores.gather(1, target[:, None])[:, 0]
        if negatives is not None:
            drawn = torch.as_tensor(negatives[batch].astype(np.int64), device=scores.device)
            sampled.append(rank_of_target(scores.gather(1, drawn), own).cpu().numpy())
        lengths = split.train_offsets[batch + 1] - split.train_offsets[batch]
        rows = np.repeat(np.arange(len(batch)), lengths)
        seen = np.concatenate([split.train_sequence(user) for user in batch]).astype(np.int64)
        if test:
            rows = np.concatenate([rows, np.arange(len(batch))])
            seen = np.concatenate([seen, split.validation_items[batch]])
        masked = scores.clone()
        masked[torch.as_tensor(rows), torch.as_tensor(seen)] = -torch.inf
        masked.scatter_(1, target[:, None], -torch.inf)
        full.append(rank_of_target(masked, own).cpu().numpy())
    return Ranks(
        users,
        np.concatenate(full) if full else np.empty(0),
        None if negatives is None else np.concatenate(sampled) if sampled else np.empty(0),
    )


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float | int | None]:
    """Hit@10 and NDCG@10 of one held-out item per user, and the number of users; None where there are no users."""
    if not len(ranks):
        return {**dict.fromkeys(METRICS), "users": 0}
    hits = ranks < CUTOFF
    gains = np.where(hits, 1 / np.log2(ranks + 2), 0.0)
    return {METRICS[0]: float(hits.mean()), METRICS[1]: float(gains.mean()), "users": len(ranks)}


def user_groups(split: Split, users: np.ndarray) -> dict[str, np.ndarray]:
    """bool [n] per group: all; by the test item's training count; by the length of the user's whole history."""
    tail, short = split.tail_items()[split.test_items[users]], split.short_users()[users]
    return dict(zip(GROUPS, (np.ones(len(users), dtype=bool), tail, ~tail, short, ~short), strict=True))


def metrics_by_group(ranks: Ranks, groups: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict]]:
    """protocol -> group -> metrics."""
    by_protocol = {"full": ranks.full, "sampled": ranks.sampled}
    return {
        protocol: {name: metrics_of_ranks(values[members]) for name, members in groups.items()}
        for protocol, values in by_protocol.items()
        if values is not None
    }
