"""cornac's networks behind one interface: batches equal cornac's own scores, shared look-ups equal single ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sda_fast.data.interactions import Interactions
from sda_fast.data.split import Split, leave_one_out
from sda_fast.recommend.config import RecommendConfig
from sda_fast.recommend.embedding import ContentEmbedding
from sda_fast.recommend.networks import SequenceNetwork, build_network
from sda_fast.recommend.training import network_scorer
from sda_fast.recommend.windows import pad_histories, pad_windows, training_windows, window_batches

NUM_ITEMS = 37
NETWORKS = ("sasrec", "bert4rec", "gru4rec")


@pytest.fixture
def config(tmp_path) -> RecommendConfig:
    return RecommendConfig(
        interactions=tmp_path / "none.tsv", output=tmp_path, embedding_dim=16, max_length=8, adapter_hidden=12
    )


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    lengths = [3, 4, 7, 10, 11, 12, 20]
    items = np.concatenate([rng.permutation(NUM_ITEMS)[:length] for length in lengths]).astype(np.int32)
    users = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    names = [str(user) for user in range(len(lengths))], [str(item) for item in range(NUM_ITEMS)]
    return leave_one_out(Interactions(*names, users, items, np.arange(len(users), dtype=np.float64)))


def network_with(name: str, config: RecommendConfig, content: bool) -> SequenceNetwork:
    torch.manual_seed(0)
    network = build_network(name, NUM_ITEMS, config)
    if content:
        embedding = ContentEmbedding(torch.randn(NUM_ITEMS, 10), 16, hidden=12, num_special=network.num_special)
        network.replace_embedding(embedding)
        assert network.embedding is embedding
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_batched_scores_equal_cornacs_score_per_user(name: str, content: bool, config, split) -> None:
    network = network_with(name, config, content)
    scores = network_scorer(network, split, config)(split.evaluated_users, True)
    recommender = network.to_cornac()
    for user, row in zip(split.evaluated_users, scores, strict=True):
        history = split.test_history(user)[-config.max_length :].tolist()
        expected = recommender.score(user, history)
        np.testing.assert_allclose(row.numpy(), expected[:NUM_ITEMS], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_do_not_depend_on_the_padding(name: str, content: bool, config, split) -> None:
    network = network_with(name, config, content)
    short = torch.tensor([[3, 5, 7]])
    padded = torch.cat([torch.full((1, 5), NUM_ITEMS), short], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            network.hidden_states(padded)[:, -3:], network.hidden_states(short), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_a_hidden_state_does_not_see_later_items(name: str, config, split) -> None:
    network = network_with(name, config, False)
    with torch.no_grad():
        first = network.hidden_states(torch.tensor([[1, 2, 3, 4]]))
        second = network.hidden_states(torch.tensor([[1, 2, 9, 8]]))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:])


def test_a_shared_look_up_equals_a_single_one_with_gradients() -> None:
    torch.manual_seed(0)
    embedding = ContentEmbedding(torch.randn(9, 5), 4, hidden=6, num_special=2)
    ids = torch.tensor([[9, 3, 3], [10, 0, 8]])
    single = embedding(ids)
    single.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in embedding.named_parameters()}
    embedding.zero_grad()
    with embedding.shared(torch.tensor([0, 3, 8])):
        shared = embedding(ids)
    shared.square().sum().backward()
    torch.testing.assert_close(shared, single)
    for name, parameter in embedding.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_padding_row_is_zero_and_the_table_gets_no_gradient() -> None:
    embedding = ContentEmbedding(torch.randn(9, 5), 4, hidden=6, num_special=1)
    assert not embedding(torch.tensor([9])).any()
    assert "table" not in dict(embedding.named_parameters())
    assert embedding.weight.shape == (10, 4)


def test_a_table_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="1 values that are NaN"):
        ContentEmbedding(torch.tensor([[1.0, float("nan")]]), 4)


def test_windows_cover_every_target_once_for_every_draw() -> None:
    offsets = np.array([0, 1, 3, 20, 20, 31])
    for seed in range(20):
        windows = training_windows(offsets, 6, 1, np.random.default_rng(seed))
        assert (windows[:, 1] - windows[:, 0] <= 6).all()
        targets = np.concatenate([np.arange(start + 1, end) for start, end in windows])
        assert sorted(targets) == [position for position in range(31) if position not in (0, 1, 3, 20)]
        users = np.searchsorted(offsets, windows, side="right")
        assert (users[:, 0] == np.searchsorted(offsets, windows[:, 1] - 1, side="right")).all()


def test_batches_hold_every_window_once_and_keep_to_the_size() -> None:
    rng = np.random.default_rng(0)
    starts = np.arange(200) * 50
    windows = np.stack([starts, starts + rng.integers(2, 40, 200)], axis=1)
    batches = list(window_batches(windows, 128, rng))
    assert sorted(np.concatenate(batches)[:, 0]) == starts.tolist()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (batch[:, 1] - batch[:, 0]).max() <= 128


def test_padding_by_hand() -> None:
    items = np.array([1, 2, 3, 4, 5])
    assert pad_windows(items, np.array([[0, 2], [2, 5]]), 9).tolist() == [[9, 1, 2], [3, 4, 5]]
    offsets = np.array([0, 2, 5])
    rows = pad_histories(items, offsets, np.array([1, 0]), 3, 9, np.array([7, 8]))
    assert rows.tolist() == [[4, 5, 7], [1, 2, 8]]
