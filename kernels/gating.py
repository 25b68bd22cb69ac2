"""The gate of MoDA inside kernels: G[row, j] = scaling * gates[which(row), expert(j)].

`which(row)` is the row itself for gates given per row, and 0 for one line of gates, which all rows share; else it is
`modality_ids[row // rows_per_sequence]`: one id per sequence, or per row where rows_per_sequence is 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def gates_are_per_row(gates: torch.Tensor | None, modality_ids: torch.Tensor | None) -> bool:
    """Whether gates [lines, E] hold one line per row: without ids they do, unless they are one line for all."""
    return gates is not None and modality_ids is None and gates.shape[0] != 1


@triton.jit
def gate_rows(modality_ids_ptr, rows, row_mask, rows_per_sequence, GATE_PER_ROW: tl.constexpr):
    """The row of the gate table that belongs to each of `rows`, as int64."""
    if GATE_PER_ROW:
        return rows.to(tl.int64)
    elif modality_ids_ptr is None:
        return rows.to(tl.int64) * 0
    else:
        return tl.load(modality_ids_ptr + rows // rows_per_sequence, mask=row_mask, other=0).to(tl.int64)


@triton.jit
def load_gated(
    h_ptr,
    gates_ptr,
    modality_ids_ptr,
    rows,
    row_mask,
    first_rank,
    R,
    stride_h_row,
    stride_gates_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    GATE_PER_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h * G for the given rows and BLOCK_R ranks, float32, zero outside the mask and beyond R; without gates, h."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    mask = row_mask[:, None] & (ranks < R)[None, :]
    h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * stride_h_row + ranks[None, :], mask=mask, other=0.0)
    if gates_ptr is None:
        gated = h.to(tl.float32)
    else:
        which = gate_rows(modality_ids_ptr, rows, row_mask, rows_per_sequence, GATE_PER_ROW)
        experts = ranks // rank_per_expert
        gates = tl.load(gates_ptr + which[:, None] * stride_gates_row + experts[None, :], mask=mask, other=0.0)
        gated = h.to(tl.float32) * (gates.to(tl.float32) * scaling)
    return gated
