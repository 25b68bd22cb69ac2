import pytest

from sda_fast.jobs.sampler import BatchOrder, length_buckets, rank_slice


def test_batch_is_a_function_of_seed_and_step_only():
    forward = BatchOrder(23, 5, seed=7)
    batches = [forward.batch(step) for step in range(12)]
    backward = BatchOrder(23, 5, seed=7)
    assert [backward.batch(step) for step in reversed(range(12))] == batches[::-1]
    assert BatchOrder(23, 5, seed=8).batch(0) != batches[0]


def test_an_epoch_visits_an_item_at_most_once_and_epochs_differ():
    order = BatchOrder(23, 5, seed=0)
    epochs = [[i for step in range(4) for i in order.batch(4 * epoch + step)] for epoch in range(3)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("items", "batch"), [(4, 5), (4, 1), (0, 2)])
def test_impossible_batches_are_refused(items, batch):
    with pytest.raises(ValueError, match=str(batch)):
        BatchOrder(items, batch, seed=0)


@pytest.mark.parametrize(("length", "world"), [(7, 2), (8, 3), (2, 3), (0, 2)])
def test_rank_slices_tile_the_rows_evenly(length, world):
    rows = list(range(length))
    parts = [rows[rank_slice(length, rank, world)] for rank in range(world)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_length_buckets_hold_every_position_once_longest_first():
    lengths = [3, 9, 1, 9, 4, 2, 8]
    buckets = length_buckets(lengths, 3)
    assert buckets == [[1, 3, 6], [4, 0, 5], [2]]
