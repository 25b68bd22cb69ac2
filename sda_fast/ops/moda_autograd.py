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

from sda_fast.ops.moda_group import keeps_bits, library, split_layouts


@dataclass(frozen=True)
class Constants:
    """The arguments of `moda_group` that are not tensors."""

    layouts: list[int]
    scalings: list[float]
    dropout: float
    backend: str
    outputs_later: bool


class MoDAGroup(torch.autograd.Function):
    """The autograd formula of `moda_group`; `tensors` are the frozen ones and the adapters.

    With `outputs_later` y has the right shape and no values: `Outputs` puts them in.
    """

    @staticmethod
    def forward(
        ctx: Any, constants: Constants, x: Tensor, modality_ids: Tensor | None, seed: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(constants.scalings)
        frozen, adapters = tensors[: -3 * count], tensors[-3 * count :]
        if constants.outputs_later:
            y, h, bits = without_outputs(x, adapters, seed, constants)
        else:
            y, h, bits = below_autograd(x, frozen, adapters, modality_ids, seed, constants)
        ctx.mark_non_differentiable(h, bits)
        ctx.set_materialize_grads(False)
        of_adapters = ctx.needs_input_grad[-3 * count :]
        needs_x, needs_A, needs_B, needs_gates = ctx.needs = [
            ctx.needs_input_grad[1],
            *(any(of_adapters[first::3]) for first in range(3)),
        ]
        ctx.constants, ctx.rows = constants, x.shape[0]
        needs_mask = constants.dropout > 0 and (needs_x or needs_A)
        kept_bits = bits if needs_mask and keeps_bits(x, constants.dropout, constants.backend) else None
        ctx.save_for_backward(
            x if needs_A else None,
            h if needs_B or needs_gates else None,
            kept_bits,
            modality_ids,
            seed if needs_mask and kept_bits is None else None,
            *tensors,
        )
        return *y, h, bits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, h, bits, modality_ids, seed, *tensors = ctx.saved_tensors
        constants = ctx.constants
        count = len(constants.scalings)
        frozen, adapters = tensors[: -3 * count], tensors[-3 * count :]
        dy = gradients[:count]
        given = next((gradient for gradient in dy if gradient is not None), None)
        if given is None:
            return (None,) * (4 + len(tensors))
        complete = [
            given.new_zeros(ctx.rows, layout.out_features) if gradient is None else gradient
            for gradient, (layout, _) in zip(dy, split_layouts(constants.layouts), strict=True)
        ]
        needs_x, needs_A, needs_B, needs_gates = ctx.needs
        flat = torch.ops.sda_fast.moda_group_backward(
            complete, x, h, bits, frozen, adapters, constants.layouts, constants.scalings, modality_ids,
            constants.dropout, seed, ctx.needs, constants.backend,
        )  # fmt: skip
        left = iter(flat)
        dx = next(left) if needs_x else None
        of_adapters: list[Tensor | None] = [None] * (3 * count)
        if needs_A:
            parts = next(left).split([lora_A.shape[0] for lora_A in adapters[::3]])
            of_adapters[::3] = [part.to(lora_A.dtype) for part, lora_A in zip(parts, adapters[::3], strict=True)]
        if needs_B:
            of_adapters[1::3] = islice(left, count)
        if needs_gates:
            of_adapters[2::3] = islice(left, count)
        return None, dx, None, None, *[None] * len(frozen), *of_adapters


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
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(
                torch.ops.sda_fast.moda_group_outputs(
                    x, h, frozen, adapters, c.layouts, c.scalings, modality_ids, c.backend
                )
            )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *(None,) * 6, *gradients


def without_outputs(
    x: Tensor, adapters: Sequence[Tensor], seed: Tensor | None, constants: Constants
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`moda_group` with y of the right shapes that take no memory and hold no values."""
    with torch._C._AutoDispatchBelowAutograd():
        h, bits = torch.ops.sda_fast.moda_group_hidden(x, adapters, constants.dropout, seed, constants.backend)
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
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sda_fast.moda_group(
            x, frozen, adapters, c.layouts, c.scalings, modality_ids, c.dropout, seed, c.backend
        )


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
    """`moda_group` where gradients may be wanted.

    Written out because `torch.library.register_autograd` takes lists of tensors apart and together in Python several
    times per call, which costs more than the products of a small layer.
    """
    wants_gradients = torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in adapters))
    constants = Constants(layouts, scalings, dropout, backend, outputs_later=wants_gradients and within_backward())
    if not wants_gradients:
        return below_autograd(x, frozen, adapters, modality_ids, seed, constants)
    *y, h, bits = MoDAGroup.apply(constants, x, modality_ids, seed, *frozen, *adapters)
    if constants.outputs_later:
        y = list(Outputs.apply(constants, x, h, modality_ids, frozen, adapters, *y))
    return y, h, bits


def within_backward() -> bool:
    """Whether this runs inside a backward pass, as recomputation does."""
    return torch._C._current_graph_task_id() != -1


library.impl("moda_group", moda_group_autograd, "Autograd")
