"""Ranks and metrics: values by hand, groups by definition, agreement with cornac's own evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sda_fast.data.interactions import Interactions
from sda_fast.data.split import Split, leave_one_out
from sda_fast.recommend.ranking import (
    metrics_by_group,
    metrics_of_ranks,
    rank_held_out,
    rank_of_target,
    user_groups,
)


def split_of(sequences: list[list[int]], num_items: int) -> Split:
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences]).astype(np.int32)
    items = np.concatenate([np.array(sequence) for sequence in sequences]).astype(np.int32)
    names = [f"u{index}" for index in range(len(sequences))], [f"i{index}" for index in range(num_items)]
    return leave_one_out(Interactions(*names, users, items, np.arange(len(users), dtype=np.float64)))


def random_split(num_users: int, num_items: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    return split_of([rng.permutation(num_items)[: rng.integers(3, 14)].tolist() for _ in range(num_users)], num_items)


def test_rank_counts_items_above_and_half_of_the_ties() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank_of_target(scores, torch.tensor([1.5, 0.0])).tolist() == [2.0, 2.0]


def test_a_nan_target_is_ranked_last() -> None:
    assert rank_of_target(torch.tensor([[1.0, 2.0, torch.nan]]), torch.tensor([torch.nan])).tolist() == [3.0]


def test_metrics_by_hand() -> None:
    metrics = metrics_of_ranks(np.array([0.0, 2.0, 9.0, 10.0]))
    assert metrics["hit@10"] == 0.75
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(11)) / 4)
    assert metrics["users"] == 4


def test_metrics_of_an_empty_group_are_none() -> None:
    assert metrics_of_ranks(np.empty(0)) == {"hit@10": None, "ndcg@10": None, "users": 0}


def test_items_seen_before_are_masked_and_the_validation_item_only_for_the_test() -> None:
    split = split_of([[0, 1, 2, 3, 4]], 6)
    by_item = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 10.0]])

    def scorer(users: np.ndarray, with_validation_item: bool) -> torch.Tensor:
        return by_item.expand(len(users), -1)

    assert rank_held_out(scorer, split, np.array([0]), test=False).full.tolist() == [1.0]
    assert rank_held_out(scorer, split, np.array([0]), test=True).full.tolist() == [1.0]


def test_the_sampled_rank_is_among_the_given_negatives() -> None:
    split = split_of([[0, 1, 2], [2, 1, 0]], 6)
    by_item = torch.tensor([[0.5, 8.0, 4.5, 6.0, 5.0, 1.0]])
    negatives = np.array([[3, 4, 5], [3, 4, 5]], dtype=np.int32)
    ranks = rank_held_out(
        lambda users, _: by_item.expand(len(users), -1), split, np.arange(2), test=True, negatives=negatives
    )
    assert ranks.sampled is not None
    assert ranks.sampled.tolist() == [2.0, 3.0]


def test_the_batch_size_does_not_change_ranks() -> None:
    split = random_split(23, 40, 0)
    scores = torch.rand(split.num_users, split.num_items, generator=torch.Generator().manual_seed(1))
    negatives = split.sample_negatives(10)

    def ranks(batch_size: int):
        return rank_held_out(
            lambda users, _: scores[torch.as_tensor(users)],
            split,
            split.evaluated_users,
            test=True,
            negatives=negatives,
            batch_size=batch_size,
        )

    np.testing.assert_array_equal(ranks(1).full, ranks(100).full)
    np.testing.assert_array_equal(ranks(1).sampled, ranks(7).sampled)


def test_full_ranking_equals_cornacs_metrics() -> None:
    from cornac.metrics import NDCG, Recall

    split = random_split(40, 60, 2)
    scores = torch.rand(split.num_users, split.num_items, generator=torch.Generator().manual_seed(3))
    users = split.evaluated_users
    ours = metrics_of_ranks(
        rank_held_out(lambda batch, _: scores[torch.as_tensor(batch)], split, users, test=True).full
    )
    hits, gains = [], []
    for user in users:
        candidates = np.setdiff1d(np.arange(split.num_items), split.test_history(user))
        ranked = candidates[np.argsort(-scores[user].numpy()[candidates])]
        target = np.array([split.test_items[user]])
        hits.append(Recall(k=10).compute(gt_pos=target, pd_rank=ranked))
        gains.append(NDCG(k=10).compute(gt_pos=target, pd_rank=ranked))
    assert ours["hit@10"] == pytest.approx(np.mean(hits))
    assert ours["ndcg@10"] == pytest.approx(np.mean(gains))


def test_groups_are_tail_below_four_training_occurrences_and_short_below_nine_items() -> None:
    filler = [[6, 7, 8, 9, 10] for _ in range(4)]
    split = split_of([[0, 1, 2], [1, 0, 6], [*range(10, 18), 3], [*range(10, 17), 4], *filler], 20)
    groups = user_groups(split, split.evaluated_users)
    assert groups["all"].all()
    assert groups["tail items"][:4].tolist() == [True, False, True, True]
    assert groups["short users"][:4].tolist() == [True, True, False, True]
    assert (groups["tail items"] ^ groups["popular items"]).all()
    assert (groups["short users"] ^ groups["long users"]).all()


def test_the_first_user_is_counted_in_its_groups() -> None:
    split = split_of([[0, 1, 2], [3, 4, 5]], 8)
    users = split.evaluated_users
    target = torch.zeros(2, 8)
    target[0, 2] = 1.0
    ranks = rank_held_out(lambda batch, _: target[torch.as_tensor(batch)], split, users, test=True)
    metrics = metrics_by_group(ranks, user_groups(split, users))
    assert ranks.full[0] == 0.0
    assert metrics["full"]["tail items"]["users"] == 2
