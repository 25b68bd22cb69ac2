"""Folded weights that stay: kept per layer and modality if told to, gone when anything they are made of changes.

Without this a layer in evaluation folds anew in every pass (docs/folding.md) and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sda_fast.moda.adapted import AdaptedLayer, frozen_weight
from sda_fast.ops import cuda_library
from sda_fast.ops.folding import folded_weight
from sda_fast.ops.kept_gates import KeptGates
from sda_fast.ops.moda_group import resolve_backend
from sda_fast.ops.moda_linear import as_one_id
from sda_fast.ops.moda_torch import Member
from sda_fast.ops.not_copied import NotCopied
from sda_fast.ops.quantized import describe_weight, is_4bit, state_of, statistics_of
from sda_fast.ops.repacked import RepackedWeights
from sda_fast.ops.watched import Watched


class OptimizerSteps:
    """Counts the steps of all optimizers once the first weight is kept.

    A fused optimizer changes parameters without raising their version.
    """

    def __init__(self) -> None:
        self.count = 0
        self.counting = False

    def start(self) -> None:
        if not self.counting:
            self.counting = True
            register_optimizer_step_post_hook(self.step)

    def step(self, *arguments: Any) -> None:
        self.count += 1


steps = OptimizerSteps()


class FoldedWeight:
    """One layer's folded weight for one modality, and what it was made of."""

    def __init__(self, layer: AdaptedLayer, modality_id: int, dtype: torch.dtype) -> None:
        steps.start()
        self.dtype, self.scaling, self.steps = dtype, layer.scaling, steps.count
        self.weight = fold_layer(layer, modality_id, dtype)
        self.sources = Watched(sources_of(layer))

    def is_valid(self, layer: AdaptedLayer, dtype: torch.dtype) -> bool:
        return (
            self.dtype == dtype
            and self.scaling == layer.scaling
            and self.steps == steps.count
            and self.sources.are_still(sources_of(layer))
        )


def sources_of(layer: AdaptedLayer) -> list[Tensor]:
    """What a folded weight is made of, the statistics of a 4-bit weight included."""
    weight = frozen_weight(layer.base_layer)
    return [weight, *(statistics_of(state_of(weight)) if is_4bit(weight) else ()), *layer.adapter_tensors()]


def fold_layer(layer: AdaptedLayer, modality_id: int, dtype: torch.dtype) -> Tensor:
    """W + scaling * B diag(g) A of a layer for one modality, a new [N, K] in `dtype`."""
    layout, data, statistics = describe_weight(frozen_weight(layer.base_layer))
    gates = layer.gates(modality_id)
    ranks = slice(0, layer.lora_A.shape[0])
    member = Member(layout, data, statistics, None, layer.lora_A, layer.lora_B, gates, layer.scaling, ranks)
    out = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=data.device)
    backend = resolve_backend(layer.backend, out)
    with torch.autocast(data.device.type, enabled=False):
        use_library = layer.backend == "auto" and cuda_library.is_available(data.device)
        return folded_weight(member, dtype, backend=backend, use_library=use_library, out=out)


class FoldedWeights(NotCopied):
    """The kept weights of one layer, by modality id. Copies of the layer start without any."""

    def __init__(self) -> None:
        self.by_modality: dict[int, FoldedWeight] = {}

    def get(self, layer: AdaptedLayer, modality_id: int, dtype: torch.dtype) -> Tensor:
        """The layer's folded weight, made now if there is none that still holds; call without gradients.

        Raises:
            RuntimeError: a parameter's changes cannot be noticed.
        """
        kept = self.by_modality.get(modality_id)
        if kept is None or not kept.is_valid(layer, dtype):
            # Before the new one is allocated.
            self.by_modality.pop(modality_id, None)
            del kept
            kept = self.by_modality[modality_id] = FoldedWeight(layer, modality_id, dtype)
        return kept.weight

    def clear(self) -> None:
        """Free all of them."""
        self.by_modality.clear()


class FoldableLayer(nn.Module):
    """What an adapted layer inherits to keep weights between passes in evaluation.

    `cache_folded` says whether to keep folded ones: False (the start), True for every modality that passes, or one
    modality's name or id. It costs a weight in the dtype of the activations for each; a 4-bit layer then holds four
    times its size more.

    `keep_repacked` says whether a 4-bit layer on a CPU may keep a second copy of its codes in the layout of
    bitsandbytes' product for few rows, once such rows pass: True at the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache_folded: bool | str | int = False
        self.folded = FoldedWeights()
        self.keep_repacked = True
        self.repacked = RepackedWeights()
        self.kept_gates = KeptGates()

    def free_kept_weights(self) -> None:
        """Free the folded weights and the repacked copy; the next pass that may keep them makes them anew."""
        self.folded.clear()
        self.repacked.clear()
        self.kept_gates.clear()

    def train(self, mode: bool = True) -> FoldableLayer:
        """As nn.Module's; training frees the weights that are kept."""
        if mode:
            self.free_kept_weights()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldableLayer:
        # Every change of device or dtype comes through here.
        self.free_kept_weights()
        super()._apply(fn, recurse)
        return self


def fold_model(model: nn.Module, modality: str | int) -> None:
    """From now on the adapted layers keep their folded weight of one modality, in evaluation and without gradients.

    Each layer folds in its first such pass, in the dtype of its input; passes of other modalities fold anew each time.
    Weights kept before are freed. Memory: one weight in the activations' dtype per adapted layer, so on a 4-bit model
    about what the 16-bit model takes, on top. Changes of the adapter and of the frozen weight with its quantisation
    state, by optimizers, loading or any operation that PyTorch counts, are noticed; writing in place through `.data`
    or `.detach().numpy()` is not: call this again after it.

    Args:
        model: adapted by `adapt_model` or by PEFT with MoDA.
        modality: a name that the layers know, or an id.
    Raises:
        ValueError: the model has no adapted layer, or one does not know the modality.
    """
    modality = as_one_id(modality)
    for layer in foldable_layers(model):
        check_kept(modality, layer.modality_names, layer.gates().shape[0])  # type: ignore[operator, arg-type]
    unfold_model(model)
    for layer in foldable_layers(model):
        layer.cache_folded = modality


def check_kept(modality: str | int, names: Sequence[str], count: int) -> None:
    """Whether a layer with so many modalities, of which some have names, can be told to keep the weight of this one.

    Raises:
        ValueError: it is not one of them.
    """
    is_id = isinstance(modality, int) and not isinstance(modality, bool)
    if not (0 <= modality < count if is_id else isinstance(modality, str) and modality in names):  # type: ignore[operator]
        raise ValueError(f"modality {modality!r} is not among the adapter's {count} modalities {tuple(names)}")


def unfold_model(model: nn.Module) -> None:
    """End `fold_model` and every `cache_folded`: nothing is kept, and what was is freed.

    Raises:
        ValueError: the model has no adapted layer.
    """
    for layer in foldable_layers(model):
        layer.cache_folded = False
        layer.free_kept_weights()


def foldable_layers(model: nn.Module) -> list[FoldableLayer]:
    layers = [module for module in model.modules() if isinstance(module, FoldableLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layers; call adapt_model or load_adapter first")
    return layers
