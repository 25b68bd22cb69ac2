"""MoDALinear as a module: gates, dtypes, copies, saving, compiling."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDALinear, modality
from sda_fast.ops.dropout import dropout_scale, keep_mask
from sda_fast.ops.moda_naive import moda_linear_naive
from sda_fast.ops.quantized import decode, describe_weight


def layer(base: nn.Module | None = None, **options: object) -> MoDALinear:
    torch.manual_seed(0)
    base = nn.Linear(12, 10).double() if base is None else base
    made = MoDALinear(base, **{"adapter_dtype": torch.float64, **options})  # type: ignore[arg-type]
    nn.init.normal_(made.lora_B)
    return made


def test_gates_are_the_softmax_of_a_projected_embedding() -> None:
    one = layer(num_experts=4)
    embedding, projection = nn.Embedding(2, 64).double(), nn.Linear(64, 4, bias=False).double()
    embedding.weight.data.copy_(one.gate_embedding)
    projection.weight.data.copy_(one.gate_proj)
    expected = torch.softmax(projection(embedding(torch.tensor([0, 1]))), dim=-1)
    torch.testing.assert_close(one.gates(), expected)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_all_gradients_equal_the_loop_over_experts(training: bool, quantised: bool) -> None:
    if quantised:
        bnb = pytest.importorskip("bitsandbytes")
        base = bnb.nn.Linear4bit(12, 10, compute_dtype=torch.float32, quant_type="nf4")
        one = layer(base.to("cpu"), num_experts=4, lora_dropout=0.3)
        weight = decode(*describe_weight(one.weight), torch.float64).clone()
    else:
        one = layer(num_experts=4, lora_dropout=0.3)
        weight = one.weight
    one.train(training)
    ids = torch.tensor([1, 0])
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, one.lora_A, one.lora_B, one.gate_embedding, one.gate_proj]
    torch.manual_seed(5)
    y = one(x, ids)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**63 - 1, (1,)))
    expected = moda_linear_naive(
        x.view(10, 12),
        weight,
        one.lora_A,
        one.lora_B,
        one.gates()[ids].repeat_interleave(5, 0),
        scaling=4.0,
        bias=one.bias.double(),
        kept=keep_mask(10, 12, 0.3, seed) if training else None,
        dropout_scale=dropout_scale(0.3) if training else 1.0,
    ).view(2, 5, 10)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_it_starts_as_the_frozen_layer_and_freezes_it() -> None:
    base = nn.Linear(12, 10)
    x = torch.randn(3, 12)
    expected = base(x)
    made = MoDALinear(base)
    assert torch.equal(made(x, 0), expected)
    assert not base.weight.requires_grad
    assert not base.bias.requires_grad
    assert made.weight is base.weight
    assert (made.in_features, made.out_features) == (12, 10)


def test_initial_values_have_the_stated_spread() -> None:
    made = MoDALinear(nn.Linear(4096, 8), num_experts=1)
    assert made.lora_A.std().item() == pytest.approx(0.01, rel=0.05)
    assert made.gate_proj.abs().max() <= 1 / 8
    assert made.scaling == 4.0
    assert MoDALinear(nn.Linear(8, 8), use_rslora=True).scaling == pytest.approx(32 / math.sqrt(8))


def test_one_expert_is_plain_lora() -> None:
    one = layer(num_experts=1)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = one.base_layer(x) + 4.0 * x @ one.lora_A.t() @ one.lora_B.t()
    for modality_id in (0, 1):
        torch.testing.assert_close(one(x, modality_id), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8, "num_experts": 3}, "num_experts must divide"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"num_modalities": 0}, "num_modalities"),
        *(({"cache_folded": which}, "is not among the adapter's 2 modalities") for which in ("imgae", 2, -1, 1.0)),
        ({"gate_dim": 0}, "gate_dim must be at least 1, got 0"),
        ({"modality_names": ("image", "text", "sound")}, "3 modality_names for num_modalities=2"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be one of .* got torch.int8"),
        ({"backend": "trition"}, "backend must be one of .* got 'trition'"),
    ],
)
def test_wrong_options_are_errors_when_the_layer_is_made(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoDALinear(nn.Linear(4, 4), **options)


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="Conv1d"):
        MoDALinear(nn.Conv1d(4, 4, 1))


def test_state_dict_copies_and_files_hold_the_whole_layer(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    one = layer(num_experts=4)
    x = torch.randn(2, 12, dtype=torch.float64)
    expected = one(x, 1)
    assert set(one.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "lora_A",
        "lora_B",
        "gate_embedding",
        "gate_proj",
    }
    assert torch.equal(copy.deepcopy(one)(x, 1), expected)
    stream = io.BytesIO()
    torch.save(one.state_dict(), stream)
    stream.seek(0)
    save_file(one.state_dict(), tmp_path / "layer.safetensors")
    for loaded in (torch.load(stream, weights_only=True), load_file(tmp_path / "layer.safetensors")):
        other = MoDALinear(nn.Linear(12, 10).double(), num_experts=4, adapter_dtype=torch.float64)
        other.load_state_dict(loaded)
        assert torch.equal(other(x, 1), expected)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(adapter_dtype: torch.dtype) -> None:
    one = layer(nn.Linear(12, 10), adapter_dtype=adapter_dtype)
    x = torch.randn(2, 3, 12, requires_grad=True)
    expected = one(x, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = one(x, 0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert one.lora_A.grad.dtype == adapter_dtype
    assert x.grad.dtype == torch.float32
    half = one.base_layer.bfloat16()
    assert one(x.detach().bfloat16(), 0).dtype == half.weight.dtype


def test_a_module_with_it_compiles_into_one_graph() -> None:
    model = nn.Sequential(layer(num_experts=4), nn.Tanh())
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def run(function: nn.Module, which: object) -> list[Tensor]:
        with modality(which):
            y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, model[0].lora_A, model[0].gate_proj])]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for which in ("image", [0, 1, 1, 0]):
        for ours, expected in zip(run(compiled, which), run(model, which), strict=True):
            torch.testing.assert_close(ours, expected)
