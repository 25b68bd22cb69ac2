"""One layer, several ways to adapt it: what `sda_fast.MoDALinear` is measured against.

Every builder takes the same frozen weight and settings and returns a module called with x alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """One case: `dtype` of activations and frozen weight, total rank r over num_experts experts."""

    in_features: int
    out_features: int
    r: int = 8
    num_experts: int = 8
    lora_alpha: float = 32
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def base_layer(self) -> nn.Linear:
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype)
        weight = torch.randn(layer.weight.shape, generator=generator) * self.in_features**-0.5
        layer.weight.data.copy_(weight)
        return layer.requires_grad_(False)


def initial_adapter(settings: Settings) -> tuple[Tensor, Tensor]:
    """A and B with the experts stacked, float32, B not zero so that checks see it."""
    generator = torch.Generator().manual_seed(1)
    lora_A = torch.randn(settings.r, settings.in_features, generator=generator) * 0.01
    return lora_A, torch.randn(settings.out_features, settings.r, generator=generator) * 0.01


class ExpertLoop(nn.Module):
    """MoDA as published: one small LoRA per expert in a Python loop, each with its own dropout, all in float32."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.base_layer = settings.base_layer()
        self.scaling = settings.lora_alpha / settings.r
        rank = settings.r // settings.num_experts
        lora_A, lora_B = initial_adapter(settings)
        experts = range(settings.num_experts)
        self.lora_A = nn.ParameterList([nn.Parameter(lora_A[e * rank : (e + 1) * rank].clone()) for e in experts])
        self.lora_B = nn.ParameterList([nn.Parameter(lora_B[:, e * rank : (e + 1) * rank].clone()) for e in experts])
        self.dropout = nn.ModuleList([nn.Dropout(settings.dropout) for _ in experts])
        self.gate_embedding = nn.Embedding(2, 64)
        self.gate_proj = nn.Linear(64, settings.num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        modality = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        gates = torch.softmax(self.gate_proj(self.gate_embedding(modality)), dim=-1)
        wide = x.to(self.lora_A[0].dtype)
        for expert, (A, B, dropout) in enumerate(zip(self.lora_A, self.lora_B, self.dropout, strict=True)):
            update = nn.functional.linear(nn.functional.linear(dropout(wide), A), B) * self.scaling
            result = result + (update * gates[:, expert].view(-1, *[1] * (x.dim() - 1))).to(result.dtype)
        return result


class ConcatenatedExperts(nn.Module):
    """MoDA with the experts stacked, in plain PyTorch and the activations' dtype: what one writes by hand."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.base_layer = settings.base_layer()
        self.scaling = settings.lora_alpha / settings.r
        self.rank = settings.r // settings.num_experts
        lora_A, lora_B = initial_adapter(settings)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.dropout = nn.Dropout(settings.dropout)
        self.gate_embedding = nn.Embedding(2, 64)
        self.gate_proj = nn.Linear(64, settings.num_experts, bias=False)

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


def frozen(settings: Settings) -> nn.Module:
    """The layer without an adapter: the floor."""
    return settings.base_layer()


def moda(settings: Settings) -> nn.Module:
    """Ours."""
    from sda_fast import MoDALinear

    layer = MoDALinear(
        settings.base_layer(),
        r=settings.r,
        num_experts=settings.num_experts,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
    )
    lora_A, lora_B = initial_adapter(settings)
    layer.lora_A.data.copy_(lora_A)
    layer.lora_B.data.copy_(lora_B)
    return FixedModality(layer)


def peft_lora(settings: Settings) -> nn.Module:
    """PEFT's LoRA of the same total rank, as `get_peft_model` makes it: float32 adapter, x cast to it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.dropout, target_modules=["0"]
    )
    adapted = get_peft_model(nn.Sequential(settings.base_layer()), config).base_model.model[0]
    lora_A, lora_B = initial_adapter(settings)
    adapted.lora_A["default"].weight.data.copy_(lora_A)
    adapted.lora_B["default"].weight.data.copy_(lora_B)
    return adapted


def expert_loop(settings: Settings) -> nn.Module:
    return ExpertLoop(settings)


def concatenated(settings: Settings) -> nn.Module:
    return ConcatenatedExperts(settings)


CONTESTANTS: dict[str, Callable[[Settings], nn.Module]] = {
    "frozen layer": frozen,
    "MoDA": moda,
    "PEFT LoRA": peft_lora,
    "concatenated PyTorch": concatenated,
    "loop over experts": expert_loop,
}
