"""The Triton path of MoDA for layers that share x: library GEMMs for the frozen weights, our kernels around them.

The kernels of the low-rank passes are those that `passes` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.kernels.moda_forward import with_unit_columns
from sda_fast.kernels.moda_gemm import gated_linear
from sda_fast.kernels.nf4 import decode_4bit
from sda_fast.ops import cuda_library, regimes
from sda_fast.ops.folding import SIXTEEN_BITS, packed_bytes
from sda_fast.ops.moda_torch import Gradients, Member
from sda_fast.ops.passes import passes_for
from sda_fast.ops.quantized import workspaces


def stacked_A(lora_A: Sequence[Tensor]) -> Tensor:
    """The A of all layers in one [sum of R, K] matrix."""
    return lora_A[0].contiguous() if len(lora_A) == 1 else torch.cat(list(lora_A))


def rows_per_id(modality_ids: Tensor | None, rows: int) -> int:
    """How many of `rows` rows share one id."""
    return 1 if modality_ids is None else max(1, rows // max(1, modality_ids.shape[0]))


def hidden(x: Tensor, lora_A: Sequence[Tensor], dropout: float, seed: Tensor | None) -> Tensor:
    """h = dropout(x) A^T of all layers, [M, sum of R] float32; backward draws the mask again."""
    stacked = stacked_A(lora_A)
    return passes_for(stacked.shape[0], x).project(x, stacked, dropout_p=dropout, seed=seed)


def output_of(member: Member, x: Tensor, h: Tensor, modality_ids: Tensor | None) -> Tensor:
    """y = x W^T + bias + (h * G) B^T of one layer, in the way that `regimes` chooses for its shape."""
    bias = None if member.bias is None else member.bias.to(x.dtype)
    way = regimes.update_of_y(x, member.layout.out_features, h.shape[1])
    with workspaces.guard(x.device):
        weight = decoded(member, x.dtype)
        if way == "in place":
            y = torch.nn.functional.linear(x, weight, bias)
            return add_update(y, member, h, modality_ids)
        update = update_of(member, h, modality_ids)
        if way == "accumulator":
            return gated_linear(with_unit_columns(x), with_unit_columns(weight), bias, **update)
        y = x.new_empty(x.shape[0], member.layout.out_features)
        passes_for(h.shape[1], y).expand(**update, bias=bias, out=y)
        return y.addmm_(x, weight.t())


def decoded(member: Member, dtype: torch.dtype) -> Tensor:
    """The [N, K] weight in `dtype`, a view of the workspace where it has to be made: hold `workspaces.guard`."""
    layout, data = member.layout, member.weight
    if not layout.quant_type:
        return member.decoded(dtype)
    shape = (layout.out_features, layout.in_features)
    out = workspaces.take(layout.out_features * layout.in_features, dtype, data.device).view(shape)
    if dtype in SIXTEEN_BITS and cuda_library.is_available(data.device):
        return cuda_library.decode(layout, data, member.statistics, out)
    return decode_4bit(
        packed_bytes(member), member.statistics, shape, layout.blocksize, layout.nested_blocksize, out=out
    )


def add_update(y: Tensor, member: Member, h: Tensor, modality_ids: Tensor | None) -> Tensor:
    """y + (h * G) B^T, in place."""
    return passes_for(h.shape[1], y).expand_add(y, **update_of(member, h, modality_ids))


def update_of(member: Member, h: Tensor, modality_ids: Tensor | None) -> dict[str, Any]:
    """(h * G) B^T as the kernels take it."""
    return {
        "h": h,
        "lora_B": member.lora_B.contiguous(),
        "gates": member.gates.contiguous(),
        "modality_ids": modality_ids,
        "scaling": member.scaling,
        "rows_per_sequence": rows_per_id(modality_ids, h.shape[0]),
    }


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    seed: Tensor | None,
    members: Sequence[Member],
    modality_ids: Tensor | None,
    dropout: float,
    *,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
    needs_gates: bool,
) -> Gradients:
    """Gradients from all dy of the group: one pass over each dy, one over x."""
    M = dys[0].shape[0]
    needs_dh = needs_x or needs_A
    dh = torch.empty(M, members[-1].ranks.stop, dtype=torch.float32, device=dys[0].device)
    h = dh if h is None else h
    gradients = Gradients(None, None, [], [])
    for member, dy in zip(members, dys, strict=True):
        _, dB, dgates = passes_for(member.lora_B.shape[1], dy).dy_pass(
            dy,
            h[:, member.ranks],
            member.lora_B.contiguous(),
            member.gates.contiguous(),
            modality_ids,
            member.scaling,
            rows_per_sequence=rows_per_id(modality_ids, M),
            needs_dh=needs_dh,
            needs_dB=needs_B,
            needs_gates=needs_gates,
            dh_out=dh[:, member.ranks] if needs_dh else None,
        )
        gradients.dB.append(dB)
        gradients.dgates.append(dgates)
    if not needs_dh:
        return gradients
    lora_A = stacked_A([member.lora_A for member in members])
    dropping: dict[str, Any] = {"dropout_p": dropout, "seed": seed, "needs_dA": needs_A}
    if not needs_x:
        gradients.dA = dx_pass(x, dh, lora_A, None, **dropping)
    elif regimes.update_of_dx(dys[0], lora_A.shape[1], lora_A.shape[0]) == "before":
        dx = dys[0].new_empty(M, lora_A.shape[1])
        gradients.dA = dx_pass(x, dh, lora_A, dx, adds=False, **dropping)
        gradients.dx = add_frozen_products(dx, dys, members)
    else:
        gradients.dx = add_frozen_products(None, dys, members)
        gradients.dA = dx_pass(x, dh, lora_A, gradients.dx, **dropping)
    return gradients


def dx_pass(
    x: Tensor | None, dh: Tensor, lora_A: Tensor, dx: Tensor | None, *, needs_dA: bool, **options: Any
) -> Tensor | None:
    """dA, and dx updated in place where it is given."""
    activations = [matrix for matrix in (x if needs_dA else None, dx) if matrix is not None]
    if not activations:
        return None
    return passes_for(lora_A.shape[0], *activations).dx_pass(x, dh, lora_A, dx, needs_dA=needs_dA, **options)


def add_frozen_products(dx: Tensor | None, dys: Sequence[Tensor], members: Sequence[Member]) -> Tensor | None:
    """dx + the sum of dy W over the layers, in place where dx is given."""
    for member, dy in zip(members, dys, strict=True):
        with workspaces.guard(dy.device):
            weight = decoded(member, dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx
