"""What an adapted layer is to the code that computes it: MoDALinear and the PEFT layer are both one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from sda_fast.ops.moda_linear import moda_linear_group
from sda_fast.ops.quantized import is_4bit, state_of


class AdaptedLayer(Protocol):
    """A frozen linear layer and the adapter that acts on it now."""

    base_layer: nn.Module
    backend: str
    training: bool

    @property
    def lora_A(self) -> Tensor: ...
    @property
    def lora_B(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def modality_names(self) -> tuple[str, ...]: ...
    def gates(self) -> Tensor: ...


def apply_group(layers: Sequence[AdaptedLayer], x: Tensor, modality_ids: Tensor | Sequence[int] | int) -> list[Tensor]:
    """The outputs of layers that share x, dropout, backend and modality names, from one operation."""
    first = layers[0]
    return moda_linear_group(
        x,
        [frozen_weight(layer.base_layer) for layer in layers],
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        [layer.gates() for layer in layers],
        modality_ids,
        scalings=[layer.scaling for layer in layers],
        biases=[layer.base_layer.bias for layer in layers],  # type: ignore[misc]
        dropout=first.lora_dropout if first.training else 0.0,
        backend=first.backend,
    )


def frozen_weight(base_layer: nn.Module) -> Tensor:
    """The layer's weight; a 4-bit one that lost its quantisation state on the way finds it again in its layer."""
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    if is_4bit(weight) and getattr(weight, "quant_state", None) is None:
        weight.quant_state = getattr(base_layer, "quant_state", None)  # type: ignore[attr-defined]
        state_of(weight)
    return weight
