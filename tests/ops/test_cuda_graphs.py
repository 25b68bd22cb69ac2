"""A training step of an adapted layer can be captured as a CUDA graph, and its replay gives what running it gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDALinear, modality

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
K, N, ROWS = 256, 320, 96


def base_layer(four_bit: bool) -> nn.Module:
    torch.manual_seed(0)
    if not four_bit:
        return nn.Linear(K, N, device="cuda", dtype=torch.bfloat16)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(K, N, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")


def adapted(four_bit: bool, dropout: float) -> MoDALinear:
    layer = MoDALinear(base_layer(four_bit), r=8, num_experts=4, lora_dropout=dropout).cuda()
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def step(layer: MoDALinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    with modality("text"):
        y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.adapter_tensors()], dy)


def captured(layer: MoDALinear, x: Tensor, dy: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of a step, after it has run on a side stream as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, dy)
    return graph, results


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_replayed_step_gives_what_running_it_gives(four_bit: bool) -> None:
    layer = adapted(four_bit, dropout=0.0)
    x = torch.randn(ROWS, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(ROWS, N, device="cuda", dtype=torch.bfloat16)
    graph, results = captured(layer, x, dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
        layer.lora_A.mul_(1.5)
    graph.replay()
    for replayed, run in zip(results, step(layer, x, dy), strict=True):
        assert torch.equal(replayed, run)


@pytest.mark.parametrize("four_bit", [False, True])
def test_every_replay_drops_other_elements(four_bit: bool) -> None:
    layer = adapted(four_bit, dropout=0.5)
    x = torch.ones(ROWS, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.ones(ROWS, N, device="cuda", dtype=torch.bfloat16)
    graph, (y, *gradients) = captured(layer, x, dy)
    outputs = []
    for _ in range(2):
        graph.replay()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        outputs.append(y.clone())
    assert not torch.equal(*outputs)
