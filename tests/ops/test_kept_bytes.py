"""What forward keeps for backward: x once for all its readers, and little more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDAConfig, MoDALinear, adapt_model, modality
from sda_fast.ops.moda_linear import moda_linear_group

ROWS, WIDTH = 256, 512
# Gates, ids and seeds; with dropout on a CPU one bit per element of x, a sixteenth of its bytes.
LITTLE_MORE = {0.0: 1.06, 0.1: 1.13}


def bytes_kept(function: Callable[[], object], frozen: list[Tensor]) -> int:
    """Bytes of what autograd saves while `function` runs, parameters and the frozen tensors excepted."""
    known = {tensor.data_ptr() for tensor in frozen}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            # Held, so that no other tensor takes its place in memory while the function runs.
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dropout", list(LITTLE_MORE))
@pytest.mark.parametrize("layers", [1, 3])
def test_one_layer_and_a_group_keep_x_once(layers: int, dropout: float) -> None:
    x = torch.randn(4, ROWS // 4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(layers)]
    lora_A = [torch.randn(8, WIDTH, requires_grad=True) for _ in range(layers)]
    lora_B = [torch.randn(WIDTH, 8, requires_grad=True) for _ in range(layers)]
    gates = [torch.rand(2, 8, requires_grad=True) for _ in range(layers)]
    ids = torch.tensor([0, 1, 1, 0])

    def forward() -> list[Tensor]:
        return moda_linear_group(
            x,
            weights,
            lora_A,
            lora_B,
            gates,
            ids,
            scalings=[4.0] * layers,
            biases=[None] * layers,
            dropout=dropout,
        )

    kept = bytes_kept(forward, [*weights, *lora_A, *lora_B, *gates])
    h = layers * ROWS * 8 * 4
    assert x.nbytes + h <= kept <= LITTLE_MORE[dropout] * x.nbytes + h


@pytest.mark.parametrize("dropout", list(LITTLE_MORE))
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layers", [1, 3])
def test_with_4bit_weights_no_decoded_weight_is_kept(layers: int, backend: str, dropout: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    # bfloat16 is not computed rightly by Triton's interpreter.
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
    rows, width = 64, 256
    x = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
    weights = [
        bnb.nn.Params4bit(torch.randn(width, width), requires_grad=False, quant_type="nf4").to(device)
        for _ in range(layers)
    ]
    states = [weight.quant_state for weight in weights]
    statistics = [part for s in states for part in (s.absmax, s.code, s.state2.absmax, s.state2.code, s.offset)]
    lora_A = [torch.randn(8, width, device=device, requires_grad=True) for _ in range(layers)]
    lora_B = [torch.randn(width, 8, device=device, requires_grad=True) for _ in range(layers)]
    gates = [torch.rand(2, 8, device=device, requires_grad=True) for _ in range(layers)]

    def forward() -> list[Tensor]:
        return moda_linear_group(
            x, weights, lora_A, lora_B, gates, torch.arange(rows) % 2, scalings=[4.0] * layers, biases=[None] * layers,
            dropout=dropout, backend=backend,
        )  # fmt: skip

    kept = bytes_kept(forward, [*weights, *statistics, *lora_A, *lora_B, *gates])
    h, ids, seed = layers * rows * 8 * 4, rows * 8, 8
    bits = rows * width // 8 if dropout and backend == "torch" else 0
    assert x.nbytes + h <= kept <= x.nbytes + h + ids + seed + bits


@pytest.mark.parametrize("dropout", list(LITTLE_MORE))
def test_a_decoder_layer_keeps_each_input_of_its_linear_layers_once_beyond_what_the_frozen_one_keeps(
    dropout: float,
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16,
    )
    model = LlamaModel(config).to(torch.bfloat16).requires_grad_(False).train()
    embeddings = torch.randn(1, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def kept_by(model: nn.Module) -> int:
        return bytes_kept(lambda: model(inputs_embeds=embeddings, use_cache=False), list(model.parameters()))

    of_frozen = kept_by(model)
    adapt_model(model, MoDAConfig(r=8, num_experts=8, lora_dropout=dropout))
    with modality("image"):
        of_adapted = kept_by(model)
    # q, k, v share one input; o; gate and up share one; down reads the intermediate size.
    inputs = (3 * WIDTH + 2 * WIDTH) * ROWS * 2
    h = 7 * ROWS * 8 * 4
    assert of_adapted - of_frozen <= LITTLE_MORE[dropout] * inputs + h


def layer_and_input() -> tuple[MoDALinear, torch.Tensor]:
    layer = MoDALinear(nn.Linear(WIDTH, WIDTH), r=8, num_experts=8, lora_dropout=0.1).train()
    return layer, torch.randn(ROWS, WIDTH, requires_grad=True)


def test_hooks_for_saved_tensors_see_neither_frozen_weights_nor_parameters() -> None:
    layer, x = layer_and_input()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        y = layer(x, 0)
    known = {one.data_ptr() for one in layer.parameters()}
    assert len(saved) <= 4
    assert not known & {one.data_ptr() for one in saved}
    y.sum().backward()
    assert all(one.grad is not None for one in layer.adapter_tensors())


def test_adapters_that_were_computed_are_saved_as_ever() -> None:
    x = torch.randn(ROWS, WIDTH)
    factor = torch.ones(1, requires_grad=True)
    lora_A, lora_B, gates = torch.randn(8, WIDTH) * factor, torch.randn(WIDTH, 8) * factor, torch.rand(2, 8) * factor
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        moda_linear_group(x, [torch.eye(WIDTH)], [lora_A], [lora_B], [gates], 0, scalings=[1.0], biases=[None])
    assert {one.data_ptr() for one in (lora_A, lora_B)} <= {one.data_ptr() for one in saved}


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "gate_embedding", "gate_proj", "base_layer.weight"])
def test_a_change_in_place_between_forward_and_backward_is_an_error(name: str) -> None:
    layer, x = layer_and_input()
    y = layer(x, 0)
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
