"""The PyTorch path of MoDA for layers that share x, forward and backward, on 2-D tensors and without autograd.

Sizes: M rows, K inputs, N outputs of a layer, R its total rank, E its experts. Activation-sized products run in the
dtype of x; everything of size M x R is held in float32 (float64 for float64 activations) and rounded once before a
product. On a CPU with AMX the host library does many of the low-rank products (`host_products`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sda_fast.ops import host_products
from sda_fast.ops.dropout import drop, dropout_scale, dropping, keep_bits
from sda_fast.ops.quantized import WeightLayout, decode, workspaces

# Elements of x that are masked at once: the masked copy should stay in the cache.
ELEMENTS_PER_CHUNK = 1 << 20


@dataclass
class Member:
    """One layer of a group, as tensors. `gates` is [modalities, E], or with no ids [M, E] or [1, E]."""

    layout: WeightLayout
    weight: Tensor
    statistics: list[Tensor]
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    gates: Tensor
    scaling: float
    ranks: slice

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The [N, K] weight in `dtype`; see `decode`."""
        return decode(self.layout, self.weight, self.statistics, dtype)


@dataclass
class Gradients:
    """What backward gives; None where it was not asked for. dA belongs to the stacked A of the group."""

    dx: Tensor | None
    dA: Tensor | None
    dB: list[Tensor | None]
    dgates: list[Tensor | None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stacked_A(lora_A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of all layers in one [sum of R, K] matrix."""
    return in_one([one.to(dtype) for one in lora_A])


def dtype_of_factors(activations: Tensor, ranks: int) -> torch.dtype:
    """The dtype that A and B are wanted in: the host library rounds them itself."""
    return torch.float32 if host_products.can_take(activations, ranks) else activations.dtype


def gate_of_ranks(member: Member, modality_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scaling * gate for every rank, one line per id (or per line of gates): [n, R]."""
    gates = member.gates.to(dtype) * member.scaling
    if modality_ids is not None:
        gates = gates.index_select(0, modality_ids)
    ranks = member.lora_A.shape[0] // gates.shape[1]
    return gates if ranks == 1 else gates.repeat_interleave(ranks, dim=1)


def by_id(matrix: Tensor, lines: int) -> Tensor:
    """[M, R] as [lines, M / lines, R]: the rows that share one id side by side."""
    return matrix.reshape(lines, matrix.shape[0] // lines if lines else 0, matrix.shape[1])


def gated(matrix: Tensor, gate: Tensor) -> Tensor:
    """matrix * G for G given as one line per id: [M, R]."""
    if gate.shape[0] in (1, matrix.shape[0]):
        return matrix * gate
    return (by_id(matrix, gate.shape[0]) * gate.unsqueeze(1)).view(matrix.shape)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows with at most ELEMENTS_PER_CHUNK elements each, at least one."""
    step = max(1, ELEMENTS_PER_CHUNK // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, max(1, rows), step))


def rows_of(matrix: Tensor, rows: slice) -> Tensor:
    """The rows of a slice that starts within the matrix; all of them are the matrix itself."""
    return matrix if rows.stop - rows.start == matrix.shape[0] else matrix[rows]


def columns_of(matrix: Tensor, columns: slice) -> Tensor:
    """`rows_of` for columns."""
    return matrix if columns.stop - columns.start == matrix.shape[1] else matrix[:, columns]


def in_one(parts: list[Tensor], dim: int = 0) -> Tensor:
    """The parts side by side, a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def hidden(x: Tensor, lora_A: Sequence[Tensor], dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """h = dropout(x) A^T of all layers [M, sum of R], and the packed dropout mask (empty without dropout)."""
    dtype = dtype_of_factors(x, sum(one.shape[0] for one in lora_A))
    if dropout == 0:
        bits = torch.empty(0, dtype=torch.uint8, device=x.device)
        return project(x, stacked_A(lora_A, dtype)), bits
    assert seed is not None
    bits = keep_bits(x.shape[0], x.shape[1], dropout, seed)
    stacked = stacked_A(lora_A, dtype)
    parts = [project(drop(rows_of(x, rows), rows_of(bits, rows)), stacked) for rows in row_chunks(*x.shape)]
    return in_one(parts).mul_(dropout_scale(dropout)), bits


def project(x: Tensor, stacked: Tensor) -> Tensor:
    """x A^T in wide sums, [M, sum of R]."""
    if host_products.can_take(x, stacked.shape[0]):
        return host_products.project(x, stacked)
    return (x @ stacked.to(x.dtype).t()).to(wide(x.dtype))


def output_of(member: Member, x: Tensor, h: Tensor, modality_ids: Tensor | None) -> Tensor:
    """y = x W^T + bias + (h * G) B^T of one layer."""
    bias = None if member.bias is None else member.bias.to(x.dtype)
    with workspaces.guard(x.device):
        y = torch.nn.functional.linear(x, member.decoded(x.dtype), bias)
    return add_update(y, member, h, modality_ids)


def add_update(y: Tensor, member: Member, h: Tensor, modality_ids: Tensor | None) -> Tensor:
    """y + (h * G) B^T, in place."""
    gate = gate_of_ranks(member, modality_ids, h.dtype)
    if host_products.can_take(y, h.shape[1]):
        return host_products.expand_add(y, h, gate, member.lora_B.t())
    h_gated = gated(h, gate)
    return y.addmm_(h_gated.to(y.dtype), member.lora_B.to(y.dtype).t())


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    members: Sequence[Member],
    modality_ids: Tensor | None,
    dropout: float,
    *,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
    needs_gates: bool,
) -> Gradients:
    """Gradients from all dy of the group; DESIGN.md section 3. `x` and `h` may be None where they are not needed."""
    dtype = dys[0].dtype
    sums = wide(dtype)
    dx: Tensor | None = None
    needs_dh = needs_x or needs_A
    dh_parts: list[Tensor] = []
    gradients = Gradients(None, None, [], [])
    for member, dy in zip(members, dys, strict=True):
        if needs_x:
            with workspaces.guard(dy.device):
                dx = dy @ member.decoded(dtype) if dx is None else dx.addmm_(dy, member.decoded(dtype))
        gate = gate_of_ranks(member, modality_ids, sums)
        h_of_member = None if h is None else columns_of(h, member.ranks)
        wanted = {"needs_dh": needs_dh, "needs_B": needs_B, "needs_gates": needs_gates}
        if host_products.can_take(dy, gate.shape[1]):
            dh, dB, products = host_products.dy_pass(dy, member.lora_B, h_of_member, gate, **wanted)
        else:
            dh, dB, products = dy_pass(dy, member.lora_B, h_of_member, gate, **wanted)
        if dh is not None:
            dh_parts.append(dh)
        dgates = None if products is None else gate_gradient(products, member, modality_ids)
        gradients.dB.append(dB)
        gradients.dgates.append(dgates)
    gradients.dx = dx
    if needs_dh:
        gradients.dA = low_rank_backward(x, in_one(dh_parts, 1), bits, members, dx, dropout, dtype, needs_A)
    return gradients


def dy_pass(
    dy: Tensor, lora_B: Tensor, h: Tensor | None, gate: Tensor, *, needs_dh: bool, needs_B: bool, needs_gates: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh = (dy B) * G, dB = dy^T (h * G) and (dy B) * h, None where not asked for; `host_products.dy_pass`."""
    dh = dB = products = None
    if needs_B:
        assert h is not None
        dB = (gated(h, gate).to(dy.dtype).t() @ dy).t()
    if needs_dh or needs_gates:
        dhg = (dy @ lora_B.to(dy.dtype)).to(wide(dy.dtype))
        if needs_dh:
            dh = gated(dhg, gate)
        if needs_gates:
            assert h is not None
            products = dhg * h
    return dh, dB, products


def gate_gradient(products: Tensor, member: Member, modality_ids: Tensor | None) -> Tensor:
    """dg = scaling * sum of dhg * h over the rows of a modality and the ranks of an expert, in the shape of gates."""
    modalities, experts = member.gates.shape
    lines = modalities if modality_ids is None else modality_ids.shape[0]
    by_expert = by_id(products, lines).unflatten(2, (experts, products.shape[1] // experts))
    of_line = by_expert.sum((1, 3)) * member.scaling
    if modality_ids is None:
        return of_line
    # A product with the indicator of each modality, because index_add is not deterministic on a GPU.
    indicator = modality_ids[None, :] == torch.arange(modalities, device=modality_ids.device)[:, None]
    return indicator.to(of_line.dtype) @ of_line


def low_rank_backward(
    x: Tensor | None,
    dh: Tensor,
    bits: Tensor | None,
    members: Sequence[Member],
    dx: Tensor | None,
    dropout: float,
    dtype: torch.dtype,
    needs_A: bool,
) -> Tensor | None:
    """Add the low-rank part into dx in place and return dA of the stacked A, [sum of R, K], in float32 or float64."""
    matrices = [member.lora_A for member in members]
    activations = x if dx is None else dx
    if dropout == 0 and activations is not None and host_products.can_take(activations, dh.shape[1]):
        if dx is not None:
            host_products.expand_add(dx, dh, None, stacked_A(matrices, dh.dtype))
        return host_products.outer(x, dh) if needs_A and x is not None else None
    lora_A = stacked_A(matrices, dtype)
    if dropout == 0:
        narrow = dh.to(dtype)
        if dx is not None:
            dx.addmm_(narrow, lora_A)
        return (narrow.t() @ x).to(dh.dtype) if needs_A and x is not None else None
    assert bits is not None
    scaled = dh * dropout_scale(dropout)
    dA: Tensor | None = None
    for rows in row_chunks(dh.shape[0], lora_A.shape[1]):
        dropped = dropping(rows_of(bits, rows), lora_A.shape[1], dtype)
        dh_rows = rows_of(scaled, rows)
        narrow = dh_rows.to(dtype)
        if needs_A and x is not None:
            dropped_x = dropped(rows_of(x, rows))
            if host_products.can_take(dropped_x, dh.shape[1]):
                part = host_products.outer(dropped_x, dh_rows)
            else:
                part = (narrow.t() @ dropped_x).to(dh.dtype)
            dA = part if dA is None else dA.add_(part)
        if dx is not None:
            rows_of(dx, rows).add_(dropped(narrow @ lora_A))
    return dA
