"""The low-rank product inside kernels: h * G (or h, where nothing is gated) times the right factor, B^T or A."""

from __future__ import annotations

import triton
import triton.language as tl

from sda_fast.kernels.gating import load_gated


@triton.jit
def load_right(lora_ptr, columns, column_mask, first_rank, R, stride_column, stride_rank, BLOCK_R: tl.constexpr):
    """[BLOCK_R, columns] of the right factor, in its own dtype; zero outside."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    return tl.load(
        lora_ptr + columns.to(tl.int64)[None, :] * stride_column + ranks.to(tl.int64)[:, None] * stride_rank,
        mask=column_mask[None, :] & (ranks < R)[:, None],
        other=0.0,
    )


@triton.jit
def low_rank_product(
    h_ptr,
    lora_ptr,
    gates_ptr,
    modality_ids_ptr,
    rows,
    row_mask,
    columns,
    column_mask,
    R,
    stride_h_row,
    stride_lora_column,
    stride_lora_rank,
    stride_gates_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    DTYPE: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
):
    """(h * G) times the right factor, [BLOCK_M, BLOCK_N] float32, BLOCK_R ranks a step, of factors rounded to DTYPE."""
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        right = load_right(lora_ptr, columns, column_mask, first_rank, R, stride_lora_column, stride_lora_rank, BLOCK_R)
        left = load_gated(
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
            GATE_PER_ROW,
            BLOCK_R,
        )
        product = tl.dot(left.to(DTYPE), right.to(DTYPE), product, input_precision="tf32x3")
    return product
