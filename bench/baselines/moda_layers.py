"""One layer, several ways to adapt it: what `sda_fast.MoDALinear` is measured against.

Every builder takes the same frozen layer and settings and returns a module called with x [M, K] alone, in training
mode, together with its adapter's parameters.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

GATE_DIM = 64


@dataclass(frozen=True)
class Settings:
    """One layer: `dtype` of activations, total rank r over num_experts experts, frozen weight "float" or "nf4"."""

    in_features: int
    out_features: int
    r: int = 8
    num_experts: int = 8
    lora_alpha: float = 32
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    base: str = "float"
    device: str = "cpu"

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    def base_layer(self) -> nn.Module:
        """The frozen layer, without bias; NF4 has nested statistics, as QLoRA has."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.out_features, self.in_features, generator=generator) * self.in_features**-0.5
        if self.base == "nf4":
            from bitsandbytes.nn import Linear4bit, Params4bit

            layer = Linear4bit(
                self.in_features, self.out_features, bias=False, compute_dtype=self.dtype, quant_type="nf4"
            )
            layer.weight = Params4bit(
                weight.to(self.dtype), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            return layer.to(self.device).train()
        layer = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype, device=self.device)
        layer.weight.data.copy_(weight)
        return layer.requires_grad_(False)


@dataclass
class Contestant:
    """A layer ready to run; A and B in one part or one per expert, `gate` its embedding and projection if any."""

    layer: nn.Module
    lora_A: list[nn.Parameter] = field(default_factory=list)
    lora_B: list[nn.Parameter] = field(default_factory=list)
    gate: tuple[nn.Parameter, nn.Parameter] | None = None


@dataclass(frozen=True)
class Method:
    """How a contestant is made, and why it cannot be (None if it can)."""

    build: Callable[[Settings, nn.Module], Contestant]
    reason_not_to: Callable[[Settings], str | None] = lambda settings: None


def initial_adapter(settings: Settings) -> tuple[Tensor, Tensor]:
    """A and B with the experts stacked, float32, B not zero so that checks see it."""
    generator = torch.Generator().manual_seed(1)
    lora_A = torch.randn(settings.r, settings.in_features, generator=generator) * 0.01
    lora_B = torch.randn(settings.out_features, settings.r, generator=generator) * 0.01
    return lora_A.to(settings.device), lora_B.to(settings.device)


class ExpertLoop(nn.Module):
    """MoDA as published: one small LoRA per expert in a Python loop, each with its own dropout, all in float32."""

    def __init__(self, settings: Settings, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = settings.scaling
        lora_A, lora_B = initial_adapter(settings)
        rank = settings.r // settings.num_experts
        self.lora_A = nn.ParameterList([nn.Parameter(part.clone()) for part in lora_A.split(rank)])
        self.lora_B = nn.ParameterList([nn.Parameter(part.clone()) for part in lora_B.split(rank, dim=1)])
        self.dropout = nn.ModuleList([nn.Dropout(settings.dropout) for _ in range(settings.num_experts)])
        self.gate_embedding = nn.Embedding(2, GATE_DIM, device=settings.device)
        self.gate_proj = nn.Linear(GATE_DIM, settings.num_experts, bias=False, device=settings.device)

    def modality_ids(self, x: Tensor) -> Tensor:
        """One id for each entry of x's first dimension."""
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        gates = torch.softmax(self.gate_proj(self.gate_embedding(self.modality_ids(x))), dim=-1)
        wide = x.to(self.lora_A[0].dtype)
        for expert, (A, B, dropout) in enumerate(zip(self.lora_A, self.lora_B, self.dropout, strict=True)):
            update = nn.functional.linear(nn.functional.linear(dropout(wide), A), B) * self.scaling
            gate = gates[:, expert].view(-1, *[1] * (x.dim() - 1))
            result = result + (update * gate).to(result.dtype)
        return result


class ConcatenatedExperts(nn.Module):
    """MoDA with the experts stacked, in plain PyTorch and the activations' dtype: what one writes by hand."""

    def __init__(self, settings: Settings, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = settings.scaling
        self.rank = settings.r // settings.num_experts
        lora_A, lora_B = initial_adapter(settings)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.dropout = nn.Dropout(settings.dropout)
        self.gate_embedding = nn.Embedding(2, GATE_DIM, device=settings.device)
        self.gate_proj = nn.Linear(GATE_DIM, settings.num_experts, bias=False, device=settings.device)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(self.gate_proj(self.gate_embedding.weight), dim=-1)[0].repeat_interleave(self.rank)
        h = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype)) * (gates * self.scaling).to(x.dtype)
        return self.base_layer(x) + nn.functional.linear(h, self.lora_B.to(x.dtype))


class FixedModality(nn.Module):
    """`MoDALinear` called with modality 0."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, 0)


class UnslothLayer(nn.Module):
    """A PEFT layer run by Unsloth's own autograd function, which takes [batch, length, K]."""

    def __init__(self, peft_layer: nn.Module) -> None:
        super().__init__()
        from unsloth.kernels.fast_lora import LoRA_W, get_lora_parameters

        self.peft_layer = peft_layer
        self.function, self.parameters_of = LoRA_W, get_lora_parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x[None], *self.parameters_of(self.peft_layer))[0]


def frozen(settings: Settings, base_layer: nn.Module) -> Contestant:
    """The layer without an adapter: the floor."""
    return Contestant(base_layer)


def moda(settings: Settings, base_layer: nn.Module) -> Contestant:
    """Ours."""
    from sda_fast import MoDALinear

    layer = MoDALinear(
        base_layer,
        r=settings.r,
        num_experts=settings.num_experts,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        gate_dim=GATE_DIM,
    )
    lora_A, lora_B = initial_adapter(settings)
    layer.lora_A.data.copy_(lora_A)
    layer.lora_B.data.copy_(lora_B)
    return Contestant(FixedModality(layer), [layer.lora_A], [layer.lora_B], (layer.gate_embedding, layer.gate_proj))


def peft_lora(settings: Settings, base_layer: nn.Module) -> Contestant:
    """PEFT's LoRA of the same total rank, as `get_peft_model` makes it: float32 adapter, x cast to it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.dropout, target_modules=["0"]
    )
    model = nn.Sequential(base_layer)
    model.is_loaded_in_4bit = settings.base == "nf4"
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, value in zip((A, B), initial_adapter(settings), strict=True):
        parameter.data.copy_(value)
    return Contestant(layer, [A], [B])


def unsloth_lora(settings: Settings, base_layer: nn.Module) -> Contestant:
    adapted = peft_lora(settings, base_layer)
    return Contestant(UnslothLayer(adapted.layer), adapted.lora_A, adapted.lora_B)


def concatenated(settings: Settings, base_layer: nn.Module) -> Contestant:
    layer = ConcatenatedExperts(settings, base_layer)
    return Contestant(layer, [layer.lora_A], [layer.lora_B], (layer.gate_embedding.weight, layer.gate_proj.weight))


def compiled(settings: Settings, base_layer: nn.Module) -> Contestant:
    made = concatenated(settings, base_layer)
    return Contestant(torch.compile(made.layer, dynamic=False), made.lora_A, made.lora_B, made.gate)


def expert_loop(settings: Settings, base_layer: nn.Module) -> Contestant:
    layer = ExpertLoop(settings, base_layer)
    return Contestant(
        layer, list(layer.lora_A), list(layer.lora_B), (layer.gate_embedding.weight, layer.gate_proj.weight)
    )


def without_peft(settings: Settings) -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def without_compiler(settings: Settings) -> str | None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return None if any(shutil.which(name) for name in names) else f"no C++ compiler ({', '.join(names)})"


def without_unsloth(settings: Settings) -> str | None:
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    if settings.device == "cpu":
        return "unsloth needs a GPU"
    return "unsloth's fast path has no dropout" if settings.dropout else without_peft(settings)


FROZEN, OURS, PEFT = "frozen layer", "MoDA", "PEFT LoRA"
CONCATENATED, COMPILED = "concatenated PyTorch", "concatenated, compiled"
METHODS: dict[str, Method] = {
    FROZEN: Method(frozen),
    OURS: Method(moda),
    PEFT: Method(peft_lora, without_peft),
    "Unsloth LoRA": Method(unsloth_lora, without_unsloth),
    CONCATENATED: Method(concatenated),
    COMPILED: Method(compiled, without_compiler),
    "loop over experts": Method(expert_loop),
}
