"""The host's time for decoder layers in training on a GPU: frozen, with PEFT's LoRA, and with ours; for `host_cost`.

Triton's side of a launch is in it (`without_device`), its launcher in C and the device are not. Layers are so narrow
that the products, which run on the CPU here, take next to no time; PEFT's small operations are launches on a GPU, too,
and cost the host more there than here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS, WIDTH, ROWS, RANK, EXPERTS, MULTIPROCESSORS = 4, 64, 8, 8, 8, 132
STEPS = 60
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("frozen", "PEFT LoRA", "MoDA")


class Attention(nn.Module):
    """The linear layers of attention, and as little else as has a gradient."""

    def __init__(self, linear: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


class MLP(nn.Module):
    """Those of the rest of a decoder layer."""

    def __init__(self, linear: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, linear: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(linear), MLP(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


def adapted(method: str) -> nn.Module:
    """Decoder layers in NF4 with nested statistics, with a method's adapters, in training."""
    from bitsandbytes.nn import Linear4bit

    from sda_fast import MoDAConfig, adapt_model

    def linear() -> nn.Module:
        return Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4")

    model = nn.Sequential(*(DecoderLayer(linear) for _ in range(LAYERS))).to("cpu").requires_grad_(False)
    if method == "MoDA":
        adapt_model(model, MoDAConfig(r=RANK, num_experts=EXPERTS, lora_dropout=0.1, target_modules=list(TARGETS)))
    elif method == "PEFT LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, target_modules=list(TARGETS)), model
        )
    return model.train()


def as_on_a_gpu() -> None:
    """Ours take Triton's kernels for tensors of the CPU, whose launches end at the driver."""
    from sda_fast.kernels import moda_backward, moda_forward, nf4_linear
    from sda_fast.ops import gates
    from without_device import without_device

    without_device()
    for module in (moda_backward, moda_forward, nf4_linear):
        module.programs_wanted = lambda device: 2 * MULTIPROCESSORS  # type: ignore[attr-defined]
    gates.takes_triton = lambda *layers: True
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sda_fast.") and hasattr(module, "resolve_backend"):
            module.resolve_backend = lambda backend, x: "triton"


def microseconds() -> dict[str, float]:
    """Processor time of forward and backward of one decoder layer, checkpointed, by method."""
    from sda_fast import modality

    torch.set_num_threads(1)
    as_on_a_gpu()
    x = torch.zeros(ROWS, WIDTH, requires_grad=True)
    models = {method: adapted(method) for method in METHODS}

    def step(model: nn.Module) -> float:
        started = time.thread_time()
        with modality("text"):
            y = x
            for layer in model:  # type: ignore[union-attr]
                y: Any = checkpoint(layer, y, use_reentrant=False)
            y.sum().backward()
        taken = time.thread_time() - started
        model.zero_grad()
        return taken

    for model in models.values():
        for _ in range(5):
            step(model)
    times = [{method: step(model) for method, model in models.items()} for _ in range(STEPS)]
    return {method: 1e6 / LAYERS * median(one[method] for one in times) for method in METHODS}
