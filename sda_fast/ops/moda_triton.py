"""The Triton path of MoDA for layers that share x: library GEMMs for the frozen weights, our kernels around them.

The kernels of the low-rank passes are those that `passes` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.kernels.moda_backward import fuses_dy
from sda_fast.kernels.moda_forward import with_unit_columns
from sda_fast.kernels.moda_gemm import gated_linear, input_gradient
from sda_fast.kernels.nf4 import decode_4bit
from sda_fast.ops import cuda_library, regimes
from sda_fast.ops.folding import SIXTEEN_BITS, packed_bytes
from sda_fast.ops.moda_torch import Gradients, Member
from sda_fast.ops.passes import passes_for
from sda_fast.ops.quantized import workspaces
from sda_fast.ops.runs import equal_runs


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


def outputs_of(members: Sequence[Member], x: Tensor, h: Tensor, modality_ids: Tensor | None) -> list[Tensor]:
    """`output_of` every layer of a group; layers that are alike get their updates in one launch."""
    outputs: list[Tensor] = []
    for run in alike(members):
        some = members[run]
        expand_group = passes_for(some[0].lora_B.shape[1], x).expand_group if len(some) > 1 else None
        if expand_group is None or {update_way(member, x) for member in some} != {"before"}:
            outputs += [output_of(member, x, part_of(h, member), modality_ids) for member in some]
            continue
        ys = [x.new_empty(x.shape[0], member.layout.out_features) for member in some]
        biases = [None if member.bias is None else member.bias.to(x.dtype) for member in some]
        expand_group(*adapters_of(some, h, modality_ids), biases=biases, outs=ys, **rows_of_ids(modality_ids, h))
        outputs += [add_frozen_product(y, member, x) for y, member in zip(ys, some, strict=True)]
    return outputs


def alike(members: Sequence[Member]) -> list[slice]:
    """The layers cut into runs whose adapters are of one size and kind."""
    if len(members) == 1:
        return [slice(0, 1)]
    kinds = [
        (one.lora_B.shape[1], one.lora_B.dtype, one.gates.shape, one.gates.dtype, one.scaling, one.bias is None)
        for one in members
    ]
    return equal_runs(kinds)


def part_of(h: Tensor, *members: Member) -> Tensor:
    """The columns of the group's h or dh that belong to neighbouring layers."""
    first, last = members[0].ranks.start, members[-1].ranks.stop
    return h if last - first == h.shape[1] else h.narrow(1, first, last - first)


def adapters_of(members: Sequence[Member], h: Tensor, modality_ids: Tensor | None) -> tuple[Any, ...]:
    """h, lora_B, gates, ids and scaling of layers that are alike, as the kernels take them."""
    lora_B, gates = (
        [member.lora_B.contiguous() for member in members],
        [member.gates.contiguous() for member in members],
    )
    return part_of(h, *members), lora_B, gates, modality_ids, members[0].scaling


def rows_of_ids(modality_ids: Tensor | None, h: Tensor) -> dict[str, int]:
    return {"rows_per_sequence": rows_per_id(modality_ids, h.shape[0])}


def update_way(member: Member, x: Tensor) -> regimes.Update:
    """How `regimes` wants y of one layer to be updated."""
    return regimes.update_of_y(x, member.layout.out_features, member.lora_B.shape[1])


def add_frozen_product(y: Tensor, member: Member, x: Tensor) -> Tensor:
    """y + x W^T, in place."""
    with workspaces.guard(x.device):
        return y.addmm_(x, decoded(member, x.dtype).t())


def output_of(member: Member, x: Tensor, h: Tensor, modality_ids: Tensor | None) -> Tensor:
    """y = x W^T + bias + (h * G) B^T of one layer, in the way that `regimes` chooses for its shape."""
    bias = None if member.bias is None else member.bias.to(x.dtype)
    way = update_way(member, x)
    if way == "before":
        y = x.new_empty(x.shape[0], member.layout.out_features)
        passes_for(h.shape[1], y).expand(**update_of(member, h, modality_ids), bias=bias, out=y)
        return add_frozen_product(y, member, x)
    with workspaces.guard(x.device):
        weight = decoded(member, x.dtype)
        if way == "in place":
            y = torch.nn.functional.linear(x, weight, bias)
            return add_update(y, member, h, modality_ids)
        update = update_of(member, h, modality_ids)
        return gated_linear(with_unit_columns(x), with_unit_columns(weight), bias, **update)


def decoded(member: Member, dtype: torch.dtype) -> Tensor:
    """The [N, K] weight in `dtype`, a view of the workspace where it has to be made: hold `workspaces.guard`."""
    layout, data = member.layout, member.weight
    if not layout.quant_type:
        return member.decoded(dtype)
    shape = (layout.out_features, layout.in_features)
    out = workspaces.take(shape, dtype, data.device)
    if dtype in SIXTEEN_BITS and cuda_library.is_available(data.device):
        return cuda_library.decode(layout, data, member.statistics, out)
    # A kernel asks for no shape.
    codes = data if data.dtype == torch.uint8 else packed_bytes(member)
    return decode_4bit(codes, member.statistics, shape, layout.blocksize, layout.nested_blocksize, out=out)


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
        **rows_of_ids(modality_ids, h),
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
    needs = {"needs_dh": needs_dh, "needs_dB": needs_B, "needs_gates": needs_gates}
    for run in alike(members):
        dB, dgates = dy_passes(members[run], dys[run], h, dh, modality_ids, needs)
        gradients.dB += dB
        gradients.dgates += dgates
    if not needs_dh:
        return gradients
    lora_A = stacked_A([member.lora_A for member in members])
    dropping: dict[str, Any] = {"dropout_p": dropout, "seed": seed, "needs_dA": needs_A}
    way = regimes.update_of_dx(dys[0], lora_A.shape[1], lora_A.shape[0]) if needs_x else None
    if way == "before":
        dx = dys[0].new_empty(M, lora_A.shape[1])
        gradients.dA = dx_pass(x, dh, lora_A, dx, adds=False, **dropping)
        gradients.dx = add_frozen_products(dx, dys, members)
    elif way == "in place":
        gradients.dx = add_frozen_products(None, dys, members)
        gradients.dA = dx_pass(x, dh, lora_A, gradients.dx, **dropping)
    else:
        gradients.dA = dx_pass(x, dh, lora_A, None, **dropping)
    if way == "accumulator":
        dx = first_product_with_update(dys[0], members[0], dh, lora_A, dropout, seed)
        gradients.dx = add_frozen_products(dx, dys[1:], members[1:])
    return gradients


def dy_passes(
    members: Sequence[Member],
    dys: Sequence[Tensor],
    h: Tensor,
    dh: Tensor,
    modality_ids: Tensor | None,
    needs: dict[str, bool],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """dB and dgates of layers that are alike, their columns of dh filled where it is needed: one pass over each dy."""
    R = members[0].lora_B.shape[1]
    passes, options = passes_for(R, *dys), {**rows_of_ids(modality_ids, h), **needs}
    if len(members) > 1 and passes.dy_pass_of_group is not None and fuses_dy(R):
        dh_out = part_of(dh, *members) if needs["needs_dh"] else None
        adapters = adapters_of(members, h, modality_ids)
        return passes.dy_pass_of_group(dys, *adapters, dh_out=dh_out, **options)[1:]
    dB, dgates = [], []
    for member, dy in zip(members, dys, strict=True):
        dh_out = part_of(dh, member) if needs["needs_dh"] else None
        _, dB_of_one, dgates_of_one = passes.dy_pass(
            dy, **update_of(member, part_of(h, member), modality_ids), dh_out=dh_out, **needs
        )
        dB.append(dB_of_one)
        dgates.append(dgates_of_one)
    return dB, dgates


def dx_pass(
    x: Tensor | None, dh: Tensor, lora_A: Tensor, dx: Tensor | None, *, needs_dA: bool, **options: Any
) -> Tensor | None:
    """dA, and dx updated in place where it is given."""
    activations = [matrix for matrix in (x if needs_dA else None, dx) if matrix is not None]
    if not activations:
        return None
    return passes_for(lora_A.shape[0], *activations).dx_pass(x, dh, lora_A, dx, needs_dA=needs_dA, **options)


def first_product_with_update(
    dy: Tensor, member: Member, dh: Tensor, lora_A: Tensor, dropout: float, seed: Tensor | None
) -> Tensor:
    """dx of one layer with the update of the whole group, from one GEMM."""
    with workspaces.guard(dy.device):
        weight = with_unit_columns(decoded(member, dy.dtype))
        return input_gradient(with_unit_columns(dy), weight, dh, lora_A, dropout_p=dropout, seed=seed)


def add_frozen_products(dx: Tensor | None, dys: Sequence[Tensor], members: Sequence[Member]) -> Tensor | None:
    """dx + the sum of dy W over the layers, in place where dx is given."""
    for member, dy in zip(members, dys, strict=True):
        with workspaces.guard(dy.device):
            weight = decoded(member, dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx
