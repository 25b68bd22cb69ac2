"""Leave-one-out evaluation: what to train on, what to predict, for which groups, against which negatives."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from sda_fast.data.errors import log_warnings
from sda_fast.data.interactions import Interactions

logger = logging.getLogger(__name__)

SHORT_USER_BELOW = 9
TAIL_ITEM_BELOW = 4
MIN_EVALUATED_LENGTH = 3


@dataclass
class Split:
    """Leave-one-out split: per user the last item is the test item, the last but one the validation item.

    Attributes:
        user_ids, item_ids: names; U users and I items, as in the interactions.
        train_offsets: int64 [U + 1]; user u trains on `train_items[train_offsets[u]:train_offsets[u + 1]]`.
        train_items: int32, item positions in time order within each user.
        validation_items, test_items: int32 [U]; -1 for users who are not evaluated (fewer than 3 different items).
        item_train_counts: int64 [I], occurrences in `train_items`.
        seed: broke the ties of timestamps and is the default for the negatives.
        warnings: repeated_interaction (rows), few_interactions (users).
    """

    user_ids: list[str]
    item_ids: list[str]
    train_offsets: np.ndarray
    train_items: np.ndarray
    validation_items: np.ndarray
    test_items: np.ndarray
    item_train_counts: np.ndarray
    seed: int
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def evaluated_users(self) -> np.ndarray:
        """Positions of the users who have a validation and a test item, ascending, int64."""
        return np.flatnonzero(self.test_items >= 0)

    def train_sequence(self, user: int) -> np.ndarray:
        """The user's training items in time order, int32."""
        return self.train_items[self.train_offsets[user] : self.train_offsets[user + 1]]

    def test_history(self, user: int) -> np.ndarray:
        """What may be known when the test item is predicted: training items, then the validation item."""
        if self.validation_items[user] < 0:
            return self.train_sequence(user)
        return np.append(self.train_sequence(user), self.validation_items[user])

    def short_users(self) -> np.ndarray:
        """bool [U]: users whose whole history (training + validation + test) has fewer than 9 different items.

        All other users are long. Users who are not evaluated are short, and take part in no metric.
        """
        lengths = np.diff(self.train_offsets) + (self.validation_items >= 0) + (self.test_items >= 0)
        return lengths < SHORT_USER_BELOW

    def tail_items(self) -> np.ndarray:
        """bool [I]: items with fewer than 4 training occurrences (0 included); all others are popular.

        A metric by item group takes the users whose test (or validation) item is in the group.
        """
        return self.item_train_counts < TAIL_ITEM_BELOW

    def sample_negatives(self, num_negatives: int = 100, seed: int | None = None) -> np.ndarray:
        """Fixed negatives: per evaluated user different items, uniform over all items the user never met.

        Args:
            num_negatives: per user.
            seed: default the split's; the result depends on nothing but the split, this and `num_negatives`.

        Returns:
            int32 [U, num_negatives]; -1 in the rows of users who are not evaluated.

        Raises:
            ValueError: a user met so many items that fewer than `num_negatives` remain.
        """
        rng = np.random.default_rng([self.seed if seed is None else seed, 1])
        users = self.evaluated_users
        counts = np.diff(self.train_offsets)[users] + 2
        if len(users) and self.num_items - counts.max() < num_negatives:
            raise ValueError(
                f"{num_negatives} negatives wanted, but a user met {counts.max()} of the {self.num_items} items"
            )
        own_keys = self._own_item_keys()
        negatives = np.full((self.num_users, num_negatives), -1, dtype=np.int32)
        filled = np.zeros(self.num_users, dtype=np.int64)
        while len(users):
            drawn = rng.integers(0, self.num_items, size=(len(users), num_negatives + 16), dtype=np.int32)
            candidates = np.concatenate([negatives[users, : filled[users].max()], drawn], axis=1)
            usable = _first_occurrences(candidates) & (candidates >= 0)
            keys = users[:, None] * np.int64(self.num_items) + candidates
            usable &= ~_is_member(keys, own_keys)
            rank = np.cumsum(usable, axis=1) - 1
            row, column = np.nonzero(usable & (rank < num_negatives))
            negatives[users[row], rank[row, column]] = candidates[row, column]
            filled[users] = np.minimum(usable.sum(axis=1), num_negatives)
            users = users[filled[users] < num_negatives]
        return negatives

    def _own_item_keys(self) -> np.ndarray:
        train_users = np.repeat(np.arange(self.num_users), np.diff(self.train_offsets))
        held_out = self.evaluated_users
        users = np.concatenate([train_users, held_out, held_out])
        items = np.concatenate([self.train_items, self.validation_items[held_out], self.test_items[held_out]])
        return np.sort(users * np.int64(self.num_items) + items)


def leave_one_out(interactions: Interactions, seed: int = 0) -> Split:
    """Split every user's history in time: last item = test, last but one = validation, the rest = training.

    Rows of one user with equal timestamps are put in random order by `seed`. A (user, item) pair that occurs again is
    used once, at its earliest time (repeated_interaction), so no held-out item is ever among the items seen before.
    Users who then have fewer than 3 items only train (few_interactions).
    """
    num_users, num_items = len(interactions.user_ids), len(interactions.item_ids)
    tie_breaker = np.random.default_rng([seed, 0]).random(len(interactions))
    order = np.lexsort((tie_breaker, interactions.timestamps, interactions.users))
    users, items = interactions.users[order].astype(np.int64), interactions.items[order]

    _, first = np.unique(users * num_items + items, return_index=True)
    first.sort()
    warnings: Counter[str] = Counter()
    if len(first) < len(order):
        warnings["repeated_interaction"] = len(order) - len(first)
    users, items = users[first], items[first]

    lengths = np.bincount(users, minlength=num_users)
    ends = np.cumsum(lengths)
    evaluated = lengths >= MIN_EVALUATED_LENGTH
    if not evaluated.all():
        warnings["few_interactions"] = int((~evaluated).sum())
    test_items = np.full(num_users, -1, dtype=np.int32)
    validation_items = np.full(num_users, -1, dtype=np.int32)
    test_items[evaluated] = items[ends[evaluated] - 1]
    validation_items[evaluated] = items[ends[evaluated] - 2]
    held_out = np.zeros(len(items), dtype=bool)
    held_out[ends[evaluated] - 1] = held_out[ends[evaluated] - 2] = True
    train_items = items[~held_out]
    train_offsets = np.concatenate([[0], np.cumsum(lengths - 2 * evaluated)]).astype(np.int64)
    log_warnings(logger, "leave-one-out split", warnings)
    return Split(
        interactions.user_ids,
        interactions.item_ids,
        train_offsets,
        train_items,
        validation_items,
        test_items,
        np.bincount(train_items, minlength=num_items),
        seed,
        warnings,
    )


def _first_occurrences(rows: np.ndarray) -> np.ndarray:
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    is_first = np.ones(rows.shape, dtype=bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    result = np.empty_like(is_first)
    np.put_along_axis(result, order, is_first, axis=1)
    return result


def _is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    position = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return sorted_keys[position] == keys
