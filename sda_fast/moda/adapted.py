"""What an adapted layer is to the code that computes it: MoDALinear and the PEFT layer are both one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sda_fast.ops import repacked
from sda_fast.ops.fold_regimes import BITSANDBYTES, evaluation_way
from sda_fast.ops.gates import GateParameters
from sda_fast.ops.moda_linear import as_autocast, as_one_id, check_dtype, check_width, moda_linear_group
from sda_fast.ops.quantized import decode, describe_weight, is_4bit, layout_of, state_of, workspaces
from sda_fast.ops.repacked import RepackedWeight

if TYPE_CHECKING:
    from sda_fast.moda.fold import FoldedWeights
    from sda_fast.ops.kept_gates import KeptGates
    from sda_fast.ops.repacked import RepackedWeights


class AdaptedLayer(Protocol):
    """A frozen linear layer and the adapter that acts on it now."""

    base_layer: nn.Module
    backend: str
    training: bool
    cache_folded: bool | str | int
    folded: FoldedWeights
    keep_repacked: bool
    repacked: RepackedWeights
    kept_gates: KeptGates

    @property
    def lora_A(self) -> Tensor: ...
    @property
    def lora_B(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def num_modalities(self) -> int: ...
    @property
    def modality_names(self) -> tuple[str, ...]: ...
    def gates(self, modality: int | None = None) -> Tensor: ...
    def gate_parameters(self) -> GateParameters: ...
    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def free_kept_weights(self) -> None: ...


def apply_group(layers: Sequence[AdaptedLayer], x: Tensor, modality_ids: Tensor | Sequence[int] | int) -> list[Tensor]:
    """The outputs of layers that share x, dropout, backend and modality names.

    From one operation; in evaluation without gradients and with one modality for all, that operation may fold, and
    layers that keep folded weights use them.
    """
    modality_ids = as_one_id(modality_ids)
    may_fold = not torch.is_grad_enabled()
    for layer in layers:
        may_fold = may_fold and not layer.training
    if torch.compiler.is_compiling():
        return apply_in_one(layers, x, modality_ids, may_fold)
    if torch.is_grad_enabled():
        for layer in layers:
            layer.free_kept_weights()
    elif may_fold and isinstance(modality_ids, int):
        x = as_autocast(x)
        outputs = [apply_kept(layer, x, modality_ids) for layer in layers]
        left = [layer for layer, y in zip(layers, outputs, strict=True) if y is None]
        if left:
            rest = iter(apply_in_one(left, x, modality_ids, may_fold))
            outputs = [next(rest) if y is None else y for y in outputs]
        return outputs  # type: ignore[return-value]
    return apply_in_one(layers, x, modality_ids, may_fold)


def apply_kept(layer: AdaptedLayer, x: Tensor, modality_id: int) -> Tensor | None:
    """The layer's output from a weight that it keeps, folded or repacked, None where it keeps none for such an x."""
    if keeps_folded(layer, modality_id):
        return apply_folded(layer, x, modality_id)
    if x.is_cpu and x.dtype == torch.bfloat16 and layer.keep_repacked:
        return apply_repacked(layer, x, modality_id)
    return None


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
    check_dtype(x)
    check_width(x, layer.lora_A.shape[1])
    weight = layer.folded.get(layer, modality_id, x.dtype)
    bias: Tensor | None = layer.base_layer.bias  # type: ignore[assignment]
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def apply_repacked(layer: AdaptedLayer, x: Tensor, modality_id: int) -> Tensor | None:
    """The layer's output by bitsandbytes' product from the repacked copy that it keeps, None if that is not the way."""
    copy = repacked_copy(layer, x)
    if copy is None:
        return None
    bias: Tensor | None = layer.base_layer.bias  # type: ignore[assignment]
    lora_A, lora_B, gate_embedding, gate_proj = layer.adapter_tensors()
    gates = layer.kept_gates.get(gate_embedding, gate_proj, modality_id)
    return repacked.output_of(copy, x, bias, lora_A, lora_B, gates, layer.scaling)


def repacked_copy(layer: AdaptedLayer, x: Tensor) -> RepackedWeight | None:
    """The copy of the frozen weight that x is to be multiplied by, made if need be; None if that is not the way."""
    base = layer.base_layer
    copy = layer.repacked.valid(base.weight)  # type: ignore[arg-type]
    if copy is not None:
        layout = copy.layout
    else:
        weight = frozen_weight(base)
        if not repacked.watchable(weight):
            return None
        layout = layout_of(state_of(weight))
    # An x that does not fit is an error, which the other ways have words for.
    if layer.backend not in ("auto", "torch") or x.dim() == 0 or x.shape[-1] != layout.in_features:
        return None
    if evaluation_way(x, layout, "torch", False, may_repack=True) is not BITSANDBYTES:
        return None
    return layer.repacked.make(weight) if copy is None else copy


def apply_frozen(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """The frozen layer's output alone, its weight left as it is.

    In evaluation on a CPU bitsandbytes would repack a 4-bit weight in place, which rounds its scales for good.
    """
    base = layer.base_layer
    repacks = x.is_cpu and is_4bit(base.weight) and not base.training and not x.requires_grad  # type: ignore[arg-type]
    if torch.compiler.is_compiling() or not repacks:
        return base(x)
    x = as_autocast(x)
    check_dtype(x)
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    bias = None if bias is None else bias.to(x.dtype)
    copy = repacked_copy(layer, x) if layer.keep_repacked else None
    if copy is not None:
        return repacked.frozen_output_of(copy, x, bias)
    with workspaces.guard(x.device):
        return nn.functional.linear(x, decode(*describe_weight(frozen_weight(base)), x.dtype), bias)


def frozen_weight(base_layer: nn.Module) -> Tensor:
    """The layer's weight; a 4-bit one that lost its quantisation state on the way finds it again in its layer."""
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    if is_4bit(weight) and getattr(weight, "quant_state", None) is None:
        weight.quant_state = getattr(base_layer, "quant_state", None)  # type: ignore[attr-defined]
        state_of(weight)
    return weight
