"""Towers attend to all their windows of one length at once, and to nothing beyond their window."""

import pytest
import torch

from sda_fast.lvlm.collate import collate_images
from sda_fast.lvlm.tower import run_tower
from sda_fast.lvlm.windows import (
    SDPA,
    WINDOWS_TOGETHER,
    attention_of_windows,
    plan_windows,
    windows_together,
)

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def attention_calls(operations):
    """How often attention was called, of an `operation_counter`."""
    return sum(count for name, count in operations.calls.items() if "scaled_dot_product" in name)


def attention_window_by_window(query, key, value, lengths):
    """[1, heads, S, head size] -> [1, S, heads, head size], by the definition."""
    splits = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    scale = query.shape[-1] ** -0.5
    own = [(q @ k.transpose(-1, -2) * scale).softmax(-1) @ v for q, k, v in zip(*splits, strict=True)]
    return torch.cat(own, dim=2).transpose(1, 2)


@pytest.mark.parametrize(
    "lengths", [[16], [16, 16, 16], [16, 4, 16, 4], [4, 4, 9], [1, 2, 3, 2, 1], [5, 0, 5], [64, 16, 16, 4] * 3], ids=str
)
def test_each_window_attends_to_itself_alone(lengths):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 3, sum(lengths), 8, generator=draw, dtype=torch.float64) for _ in range(3))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given, _ = attention_of_windows(torch.nn.Module(), query, key, value, cu_seq_lens_q=ends)
    torch.testing.assert_close(given, attention_window_by_window(query, key, value, lengths))


def test_gradients_reach_every_window():
    draw = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 3, 5, 8, 9])
    inputs = [torch.randn(1, 2, 9, 4, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    module = torch.nn.Module()
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_of_windows(module, q, k, v, cu_seq_lens_q=ends)[0], inputs
    )


def test_a_plan_moves_patches_only_where_equal_windows_lie_apart():
    together = plan_windows(torch.tensor([0, 4, 8, 12, 14, 16]))
    assert together.groups == ((3, 4), (2, 2))
    assert together.order is None
    apart = plan_windows(torch.tensor([0, 2, 3, 5]))
    assert apart.groups == ((2, 2), (1, 1))
    assert apart.order.tolist() == [0, 1, 3, 4, 2]
    assert apart.order[apart.inverse].tolist() == [0, 1, 2, 3, 4]


def test_a_mask_is_refused():
    tensor = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"takes no mask, got one of shape \(4, 4\)"):
        attention_of_windows(
            torch.nn.Module(), tensor, tensor, tensor, torch.zeros(4, 4), cu_seq_lens_q=torch.tensor([0, 4])
        )


@pytest.mark.parametrize("model_type", QWEN)
def test_the_tower_gives_what_one_call_per_window_gives_in_fewer_calls(
    loaded, items, monkeypatch, operation_counter, model_type
):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, [*items, *items])
    with operation_counter() as ours:
        together = run_tower(lvlm, batch, range(2 * len(items)))
    monkeypatch.setattr("sda_fast.lvlm.windows.SDPA", "never")
    with operation_counter() as theirs:
        apart = run_tower(lvlm, batch, range(2 * len(items)))
    for one, other in zip(together, apart, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
    assert 0 < 2 * attention_calls(ours) <= attention_calls(theirs)


def test_only_sdpa_is_replaced_and_it_is_put_back_after_an_error(loaded):
    config = loaded("qwen2_5_vl").model.visual.config
    assert config._attn_implementation == SDPA
    with pytest.raises(KeyError), windows_together(config):
        assert config._attn_implementation == WINDOWS_TOGETHER
        raise KeyError
    assert config._attn_implementation == SDPA
    config._attn_implementation = "eager"
    try:
        with windows_together(config):
            assert config._attn_implementation == "eager"
    finally:
        config._attn_implementation = SDPA
