import time

import numpy as np
import pytest

from sda_fast.data import leave_one_out
from sda_fast.data.interactions import Interactions


def log_of(rows, num_items=None):
    users, items, times = (np.array(column) for column in zip(*rows, strict=True))
    num_items = int(items.max()) + 1 if num_items is None else num_items
    return Interactions(
        [f"u{n}" for n in range(users.max() + 1)],
        [f"i{n}" for n in range(num_items)],
        users.astype(np.int32),
        items.astype(np.int32),
        times.astype(np.float64),
    )


def random_log(seed, num_rows=3000, num_users=200, num_items=150, num_times=40):
    rng = np.random.default_rng(seed)
    return log_of(
        list(
            zip(
                rng.integers(0, num_users, num_rows),
                rng.integers(0, num_items, num_rows),
                rng.integers(0, num_times, num_rows),
                strict=True,
            )
        ),
        num_items,
    )


def test_last_is_test_and_last_but_one_is_validation():
    split = leave_one_out(log_of([(0, 3, 30), (0, 1, 10), (0, 2, 20), (0, 0, 0), (1, 2, 5), (1, 3, 4), (1, 0, 6)]))
    assert split.train_sequence(0).tolist() == [0, 1]
    assert split.train_sequence(1).tolist() == [3]
    assert split.validation_items.tolist() == [2, 2]
    assert split.test_items.tolist() == [3, 0]
    assert split.test_history(0).tolist() == [0, 1, 2]
    assert split.item_train_counts.tolist() == [1, 1, 0, 1]
    assert split.evaluated_users.tolist() == [0, 1]
    assert not split.warnings


def test_users_with_fewer_than_three_items_only_train():
    split = leave_one_out(
        log_of([(0, 0, 1), (1, 0, 1), (1, 1, 2), (2, 0, 1), (2, 1, 2), (2, 2, 3), (3, 1, 1), (3, 1, 2)])
    )
    assert split.warnings == {"few_interactions": 3, "repeated_interaction": 1}
    assert split.evaluated_users.tolist() == [2]
    assert [split.train_sequence(user).tolist() for user in range(4)] == [[0], [0, 1], [0], [1]]
    assert split.test_history(1).tolist() == [0, 1]
    assert split.test_items.tolist() == [-1, -1, 2, -1]


def test_a_repeated_pair_counts_once_at_its_earliest_time():
    split = leave_one_out(log_of([(0, 5, 9), (0, 5, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (0, 2, 8)]))
    assert split.train_sequence(0).tolist() == [5, 2]
    assert (split.validation_items[0], split.test_items[0]) == (3, 4)
    assert split.warnings == {"repeated_interaction": 2}


@pytest.mark.parametrize("seed", range(3))
def test_split_equals_a_plain_loop_up_to_ties(seed):
    log = random_log(seed, num_times=10**9)
    split = leave_one_out(log, seed)
    for user in range(len(log.user_ids)):
        rows = sorted((t, i) for u, i, t in zip(log.users, log.items, log.timestamps, strict=True) if u == user)
        sequence = list(dict.fromkeys(int(item) for _, item in rows))
        if len(sequence) < 3:
            assert split.train_sequence(user).tolist() == sequence
        else:
            held_out = [split.validation_items[user], split.test_items[user]]
            assert [*split.train_sequence(user), *held_out] == sequence
    assert split.item_train_counts.sum() == len(split.train_items)


def test_ties_are_broken_at_random_by_the_seed():
    log = log_of([(user, item, 0) for user in range(400) for item in range(4)])
    first, again, other = leave_one_out(log, 1), leave_one_out(log, 1), leave_one_out(log, 2)
    assert np.array_equal(first.test_items, again.test_items)
    assert not np.array_equal(first.test_items, other.test_items)
    # 400 draws of one of four: 100 each, standard deviation 8.7.
    assert (np.abs(np.bincount(first.test_items, minlength=4) - 100) < 5 * 8.7).all()


def test_time_order_is_kept_where_times_differ():
    log = random_log(4)
    split = leave_one_out(log, 7)
    earliest = {}
    for user, item, moment in zip(log.users, log.items, log.timestamps, strict=True):
        key = (int(user), int(item))
        earliest[key] = min(moment, earliest.get(key, np.inf))
    for user in split.evaluated_users:
        sequence = [*split.test_history(user), split.test_items[user]]
        times = [earliest[int(user), int(item)] for item in sequence]
        assert times == sorted(times)


def test_groups_have_their_documented_borders():
    rows = [(0, item, item) for item in range(8)] + [(1, item, item) for item in range(9)]
    rows += [(2, 0, 0), (2, 1, 1), (2, 9, 2), (2, 8, 3), (3, 0, 0), (3, 9, 1), (3, 8, 2)]
    split = leave_one_out(log_of(rows))
    assert split.short_users().tolist() == [True, False, True, True]
    assert split.item_train_counts[[0, 1]].tolist() == [4, 3]
    assert split.tail_items()[[0, 1, 8]].tolist() == [False, True, True]


@pytest.mark.parametrize("num_negatives", [1, 100])
def test_negatives_are_fixed_different_and_never_the_users_own(num_negatives):
    split = leave_one_out(random_log(5, num_items=150))
    negatives = split.sample_negatives(num_negatives)
    assert negatives.shape == (split.num_users, num_negatives) and negatives.dtype == np.int32
    for user in split.evaluated_users:
        own = {*split.test_history(user).tolist(), int(split.test_items[user])}
        assert not own & set(negatives[user].tolist())
        assert len(set(negatives[user].tolist())) == num_negatives
        assert negatives[user].min() >= 0
    assert np.array_equal(negatives, split.sample_negatives(num_negatives))
    assert not np.array_equal(negatives, split.sample_negatives(num_negatives, seed=99))


def test_negatives_are_uniform_and_may_use_up_the_catalogue():
    rows = [(user, item, item) for user in range(2000) for item in range(3)]
    split = leave_one_out(log_of(rows, num_items=13))
    everything = split.sample_negatives(10)
    assert (np.sort(everything, axis=1) == np.arange(3, 13)).all()
    counts = np.bincount(split.sample_negatives(5).ravel(), minlength=13)[3:]
    # 2000 users each take 5 of 10: 1000 per item, standard deviation 22.4.
    assert (np.abs(counts - 1000) < 5 * 22.4).all()
    with pytest.raises(ValueError, match="11 negatives wanted, but a user met 3 of the 13 items"):
        split.sample_negatives(11)


def test_users_who_are_not_evaluated_have_no_negatives():
    split = leave_one_out(log_of([(0, 0, 1), (1, 0, 1), (1, 1, 2), (1, 2, 3)], num_items=30))
    negatives = split.sample_negatives(5)
    assert (negatives[0] == -1).all() and (negatives[1] >= 0).all()


def test_two_hundred_thousand_rows_take_about_a_second():
    log = random_log(6, 200_000, 20_000, 12_000, 10**9)
    start = time.process_time()
    leave_one_out(log).sample_negatives()
    assert time.process_time() - start < 3.0
