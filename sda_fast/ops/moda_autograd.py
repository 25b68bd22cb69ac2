"""Gradients of `sda_fast::moda_group`, and what gradient checkpointing's recomputation can leave out.

Recomputation is over once the last tensor is saved that backward needs, and a layer's y is none of them: where nothing
after a layer saves anything (down_proj, whose y is only added to the residual), its product with the frozen weight need
not be repeated. So within a backward pass a layer first saves what it keeps, which ends the recomputation of the last
one, and computes y afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sda_fast.ops import gates
from sda_fast.ops.held import HeldTensors
from sda_fast.ops.moda_group import (
    keeps_bits,
    library,
    moda_group_backward_kernel,
    moda_group_hidden_kernel,
    moda_group_kernel,
    moda_group_outputs_kernel,
    runs_here_and_now,
    split_layouts,
)


@dataclass(frozen=True)
class Constants:
    """The arguments of `moda_group` that are not tensors.

    Attributes:
        modality: whose gates are made here, from the layers' gate parameters (EVERY_MODALITY: all); None: gates are
            given.
        outputs_later: y gets the right shape and no values, `Outputs` puts them in.
    """

    layouts: list[int]
    scalings: list[float]
    dropout: float
    backend: str
    modality: int | None
    outputs_later: bool


@dataclass(frozen=True)
class Tensors:
    """The tensors of a group by kind; `gating` are all gates, or all gate_embeddings and then all gate_projs."""

    frozen: Sequence[Tensor]
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    gating: Sequence[Tensor]

    @staticmethod
    def of(frozen: Sequence[Tensor], trained: Sequence[Any], count: int) -> Tensors:
        """The inverse of `trained` for so many layers, also for what belongs to its tensors one by one."""
        return Tensors(frozen, trained[:count], trained[count : 2 * count], trained[2 * count :])

    def trained(self) -> tuple[Tensor, ...]:
        return *self.lora_A, *self.lora_B, *self.gating

    def adapters(self, gates: Sequence[Tensor] | None = None) -> list[Tensor]:
        """lora_A, lora_B and gates (`gating` if none are given) of every layer, as the operations take them."""
        layers = zip(self.lora_A, self.lora_B, gates or self.gating, strict=True)
        return [tensor for layer in layers for tensor in layer]


class MoDAGroup(torch.autograd.Function):
    """The autograd formula of `moda_group`; where it makes the gates, it returns them too, and has `moda_gates`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        constants: Constants,
        frozen: Sequence[Tensor],
        x: Tensor,
        modality_ids: Tensor | None,
        seed: Tensor | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(constants.scalings)
        tensors = Tensors.of(frozen, trained, count)
        made = () if constants.modality is None else gates.below_autograd(tensors.gating, constants.modality)
        adapters = tensors.adapters(made)
        if constants.outputs_later:
            y, h, bits = without_outputs(x, adapters, seed, constants)
        else:
            y, h, bits = below_autograd(x, frozen, adapters, modality_ids, seed, constants)
        ctx.mark_non_differentiable(h, bits, *made)
        ctx.set_materialize_grads(False)
        wanted = Tensors.of((), ctx.needs_input_grad[5:], count)
        needs_x, needs_A, needs_B, needs_gates = ctx.needs = [
            ctx.needs_input_grad[2],
            *map(any, (wanted.lora_A, wanted.lora_B, wanted.gating)),
        ]
        ctx.constants, ctx.rows, ctx.made = constants, x.shape[0], len(made)
        needs_mask = constants.dropout > 0 and (needs_x or needs_A)
        kept_bits = bits if needs_mask and keeps_bits(x, constants.dropout, constants.backend) else None
        ctx.frozen = HeldTensors(frozen)
        ctx.trained = HeldTensors(trained) if all(tensor.is_leaf for tensor in trained) else None
        ctx.save_for_backward(
            x if needs_A else None,
            h if needs_B or needs_gates else None,
            kept_bits,
            modality_ids,
            seed if needs_mask and kept_bits is None else None,
            *made,
            *(trained if ctx.trained is None else ()),
        )
        return *y, h, bits, *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        constants = ctx.constants
        count = len(constants.scalings)
        dy = gradients[:count]
        given = next((gradient for gradient in dy if gradient is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        x, h, bits, modality_ids, seed, *saved = ctx.saved_tensors
        made = saved[: ctx.made]
        trained = saved[ctx.made :] if ctx.trained is None else ctx.trained.get()
        tensors = Tensors.of(ctx.frozen.get(), trained, count)
        complete = [
            given.new_zeros(ctx.rows, layout.out_features) if gradient is None else gradient
            for gradient, (layout, _) in zip(dy, split_layouts(constants.layouts), strict=True)
        ]
        compute = moda_group_backward_kernel if runs_here_and_now() else torch.ops.sda_fast.moda_group_backward
        needs_x, needs_A, needs_B, needs_gates = ctx.needs
        left = iter(
            compute(
                complete, x, h, bits, tensors.frozen, tensors.adapters(made), constants.layouts,
                constants.scalings, modality_ids, constants.dropout, seed, ctx.needs, constants.backend,
            )
        )  # fmt: skip
        dx = next(left) if needs_x else None
        dA: Sequence[Tensor | None] = [None] * count
        dB: Sequence[Tensor | None] = [None] * count
        of_gating: Sequence[Tensor | None] = [None] * len(tensors.gating)
        if needs_A:
            stacked = next(left)
            parts = [stacked] if count == 1 else stacked.split([lora_A.shape[0] for lora_A in tensors.lora_A])
            dA = [part.to(lora_A.dtype) for part, lora_A in zip(parts, tensors.lora_A, strict=True)]
        if needs_B:
            dB = list(islice(left, count))
        if needs_gates:
            dgates = list(islice(left, count))
            of_gating = dgates
            if constants.modality is not None:
                wanted = ctx.needs_input_grad[-len(tensors.gating) :]
                of_gating = gates.parameter_gradients(dgates, made, tensors.gating, constants.modality, wanted)
        return None, None, dx, None, None, *dA, *dB, *of_gating


class Outputs(torch.autograd.Function):
    """y of the layers in place of `placeholders`, whose gradients are those of y; saves nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        constants: Constants,
        x: Tensor,
        h: Tensor,
        modality_ids: Tensor | None,
        frozen: Sequence[Tensor],
        adapters: Sequence[Tensor],
        *placeholders: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        c = constants
        arguments = x, h, frozen, adapters, c.layouts, c.scalings, modality_ids, c.backend
        if runs_here_and_now():
            return tuple(moda_group_outputs_kernel(*arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.sda_fast.moda_group_outputs(*arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *(None,) * 6, *gradients


def without_outputs(
    x: Tensor, adapters: Sequence[Tensor], seed: Tensor | None, constants: Constants
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`moda_group` with y of the right shapes that take no memory and hold no values."""
    arguments = x, adapters, constants.dropout, seed, constants.backend
    if runs_here_and_now():
        h, bits = moda_group_hidden_kernel(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            h, bits = torch.ops.sda_fast.moda_group_hidden(*arguments)
    M = x.shape[0]
    return [x.new_empty(1, 1).expand(M, layout.out_features) for layout, _ in split_layouts(constants.layouts)], h, bits


def below_autograd(
    x: Tensor,
    frozen: Sequence[Tensor],
    adapters: Sequence[Tensor],
    modality_ids: Tensor | None,
    seed: Tensor | None,
    constants: Constants,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`moda_group` for the keys after autograd."""
    c = constants
    arguments = x, frozen, adapters, c.layouts, c.scalings, modality_ids, c.dropout, seed, c.backend
    if runs_here_and_now():
        return moda_group_kernel(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sda_fast.moda_group(*arguments)


def moda_group(
    x: Tensor,
    tensors: Tensors,
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
    modality: int | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`sda_fast::moda_group` with gradients, called without its dispatcher.

    Written out because `torch.library.register_autograd` takes lists of tensors apart and together in Python several
    times per call, which costs more than the products of a small layer.

    Args:
        tensors, modality: `modality` says what `tensors.gating` is, as in `Constants`.
    """
    trained = tensors.trained()
    wants_gradients = torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in trained))
    constants = Constants(layouts, scalings, dropout, backend, modality, wants_gradients and within_backward())
    if not wants_gradients:
        made = () if modality is None else gates.below_autograd(tensors.gating, modality)
        adapters = tensors.adapters(made)
        return below_autograd(x, tensors.frozen, adapters, modality_ids, seed, constants)
    outputs = MoDAGroup.apply(constants, tensors.frozen, x, modality_ids, seed, *trained)
    y, (h, bits, *made) = list(outputs[: len(scalings)]), outputs[len(scalings) :]
    if constants.outputs_later:
        adapters = tensors.adapters(made)
        y = list(Outputs.apply(constants, x, h, modality_ids, tensors.frozen, adapters, *y))
    return y, h, bits


def within_backward() -> bool:
    """Whether this runs inside a backward pass, as recomputation does."""
    return torch._C._current_graph_task_id() != -1


def moda_group_autograd(
    x: Tensor,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`sda_fast::moda_group` where gradients may be wanted."""
    tensors = Tensors(frozen, adapters[::3], adapters[1::3], adapters[2::3])
    return moda_group(x, tensors, layouts, scalings, modality_ids, dropout, seed, backend)


library.impl("moda_group", moda_group_autograd, "Autograd")
