"""One adapted layer, forward and backward in bfloat16 on a CPU: ours beside the frozen layer and three other ways.

    python -m pytest bench/test_bench_moda_linear.py --benchmark-sort=min --benchmark-json=bench/results/moda-cpu.json

Times are processor time on one thread, which a busy machine disturbs least. A contestant is timed only once its result
has been compared with float64. Extra columns of the JSON: `bytes_kept_per_x`, what it keeps for backward beside weights
in units of x, and `error`, its relative error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from baselines.moda_layers import CONTESTANTS, Settings, initial_adapter

ROWS = 1024
CASES = [
    pytest.param(Settings(3584, 3584, dropout=dropout), id=f"3584 to 3584, dropout {dropout}") for dropout in (0.0, 0.1)
] + [pytest.param(Settings(3584, 512, dropout=dropout), id=f"3584 to 512, dropout {dropout}") for dropout in (0.0, 0.1)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bytes_kept(layer: nn.Module, x: Tensor) -> int:
    """What forward keeps for backward, each storage once, parameters and what is cast from them excepted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def relative_error(layer: nn.Module, x: Tensor, settings: Settings, name: str) -> float:
    """Against float64, in evaluation; the gate is read from the layer."""
    exact = x.detach().double() @ settings.base_layer().weight.double().t()
    if name != "frozen layer":
        lora_A, lora_B = (matrix.double() for matrix in initial_adapter(settings))
        h = x.detach().double() @ lora_A.t() * (settings.lora_alpha / settings.r)
        exact = exact + (h * gate_of_ranks(layer, settings)) @ lora_B.t()
    layer.eval()
    error = (layer(x).detach().double() - exact).norm() / exact.norm()
    layer.train()
    return float(error)


def gate_of_ranks(layer: nn.Module, settings: Settings) -> Tensor:
    """The gate of modality 0 for every rank; ones for LoRA, which has none."""
    if hasattr(layer, "layer"):
        gates = layer.layer.gates()[0]
    elif hasattr(layer, "gate_proj"):
        gates = torch.softmax(layer.gate_proj(layer.gate_embedding.weight), dim=-1)[0]
    else:
        return torch.ones(settings.r, dtype=torch.float64)
    return gates.detach().double().repeat_interleave(settings.r // settings.num_experts)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("settings", CASES)
@pytest.mark.benchmark(timer=time.process_time, min_rounds=5, max_time=2.0, warmup=True, warmup_iterations=1)
def test_forward_and_backward(benchmark, name: str, settings: Settings, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    layer = CONTESTANTS[name](settings).train()
    x = torch.randn(ROWS, settings.in_features).to(settings.dtype).requires_grad_()
    dy = torch.randn(ROWS, settings.out_features).to(settings.dtype)
    benchmark.group = request.node.callspec.id.removesuffix(f"-{name}")
    benchmark.extra_info["error"] = relative_error(layer, x, settings, name)
    assert benchmark.extra_info["error"] < 2**-7
    benchmark.extra_info["bytes_kept_per_x"] = round(bytes_kept(layer, x) / x.nbytes, 3)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    benchmark(step)
