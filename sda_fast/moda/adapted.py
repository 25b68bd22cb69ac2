"""What an adapted layer is to the code that computes it: MoDALinear and the PEFT layer are both one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sda_fast.ops.gates import GateParameters
from sda_fast.ops.moda_linear import as_autocast, moda_linear_group
from sda_fast.ops.quantized import is_4bit, state_of

if TYPE_CHECKING:
    from sda_fast.moda.fold import FoldedWeights


class AdaptedLayer(Protocol):
    """A frozen linear layer and the adapter that acts on it now."""

    base_layer: nn.Module
    backend: str
    training: bool
    cache_folded: bool | str | int
    folded: FoldedWeights

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
    def gates(self, modality: int | None = None) -> Tensor: ...
    def gate_parameters(self) -> GateParameters: ...
    def adapter_tensors(self) -> tuple[Tensor, ...]: ...


def apply_group(layers: Sequence[AdaptedLayer], x: Tensor, modality_ids: Tensor | Sequence[int] | int) -> list[Tensor]:
    """The outputs of layers that share x, dropout, backend and modality names.

    From one operation; in evaluation without gradients and with one modality for all, that operation may fold, and
    layers that keep folded weights use them.
    """
    may_fold = not torch.is_grad_enabled() and not any(layer.training for layer in layers)
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            for layer in layers:
                layer.folded.clear()
        elif may_fold and isinstance(modality_ids, int) and any(keeps_folded(layer, modality_ids) for layer in layers):
            return [
                apply_folded(layer, x, modality_ids)
                if keeps_folded(layer, modality_ids)
                else apply_in_one(layers[index : index + 1], x, modality_ids, may_fold)[0]
                for index, layer in enumerate(layers)
            ]
    return apply_in_one(layers, x, modality_ids, may_fold)


def apply_in_one(
    layers: Sequence[AdaptedLayer], x: Tensor, modality_ids: Tensor | Sequence[int] | int, may_fold: bool
) -> list[Tensor]:
    """`apply_group` by one operation, without kept weights."""
    first = layers[0]
    return moda_linear_group(
        x,
        [frozen_weight(layer.base_layer) for layer in layers],
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        [layer.gate_parameters() for layer in layers],
        modality_ids,
        scalings=[layer.scaling for layer in layers],
        biases=[layer.base_layer.bias for layer in layers],  # type: ignore[misc]
        dropout=first.lora_dropout if first.training else 0.0,
        backend=first.backend,
        may_fold=may_fold,
    )


def keeps_folded(layer: AdaptedLayer, modality_id: int) -> bool:
    """Whether the layer was told to keep its folded weight of this modality."""
    wanted = layer.cache_folded
    if isinstance(wanted, bool):
        return wanted
    return modality_id == (layer.modality_names.index(wanted) if isinstance(wanted, str) else wanted)


def apply_folded(layer: AdaptedLayer, x: Tensor, modality_id: int) -> Tensor:
    """The layer's output from the folded weight that it keeps."""
    x = as_autocast(x)
    weight = layer.folded.get(layer, modality_id, x.dtype)
    bias: Tensor | None = layer.base_layer.bias  # type: ignore[assignment]
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def frozen_weight(base_layer: nn.Module) -> Tensor:
    """The layer's weight; a 4-bit one that lost its quantisation state on the way finds it again in its layer."""
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    if is_4bit(weight) and getattr(weight, "quant_state", None) is None:
        weight.quant_state = getattr(base_layer, "quant_state", None)  # type: ignore[attr-defined]
        state_of(weight)
    return weight
