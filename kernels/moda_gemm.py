"""y = x W^T + bias + (h * G) B^T in one GEMM whose accumulator starts from the low-rank product.

The alternative to a library GEMM followed by `expand_add`: it saves reading and writing y once more, and pays with the
distance between this GEMM and the library's. Which one runs is decided by a measured table, not here.
"""

from __future__ import annotations

import torch
import triton.language as tl

from sda_fast.kernels.configs import LaunchConfig, cdiv, padded_rank, rank_block
from sda_fast.kernels.gating import gates_are_per_row, load_gated
from sda_fast.kernels.launching import kernel

BLOCK_K = 64
# Bytes per element of the activations -> configuration
CONFIGS = {2: LaunchConfig(128, 128, 8, 3), 4: LaunchConfig(64, 64, 8, 2)}


def ranks_at_once(dtype: torch.dtype, rank: int) -> int:
    """How many ranks the accumulator starts from at a time: with 64 registers would spill on sm_100."""
    return min(rank_block(dtype, rank), 32)


@kernel
def gated_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    lora_B_ptr,
    gates_ptr,
    modality_ids_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_x_row,
    stride_weight_row,
    stride_h_row,
    stride_B_row,
    stride_gates_row,
    stride_y_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    HAS_BIAS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs run in groups of GROUP_M blocks of rows, so that a group's part of x and W stays in the L2 cache.
    blocks_of_rows = tl.cdiv(M, BLOCK_M)
    blocks_per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // blocks_per_group
    first_row_block = group * GROUP_M
    rows_in_group = tl.minimum(blocks_of_rows - first_row_block, GROUP_M)
    within = tl.program_id(0) % blocks_per_group
    rows = (first_row_block + within % rows_in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // rows_in_group * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    columns_wide = columns.to(tl.int64)[None, :]

    dtype = x_ptr.dtype.element_ty
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        gated = load_gated(
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
        lora_B = tl.load(
            lora_B_ptr + columns_wide * stride_B_row + ranks[:, None],
            mask=column_mask[None, :] & (ranks < R)[:, None],
            other=0.0,
        )
        accumulator = tl.dot(gated.to(dtype), lora_B.to(dtype), accumulator, input_precision="tf32x3")

    x_row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row
    weight_row_ptrs = weight_ptr + columns_wide * stride_weight_row
    for first in range(0, K, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        inner_mask = inner < K
        x = tl.load(x_row_ptrs + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        weight = tl.load(weight_row_ptrs + inner[:, None], mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
        accumulator = tl.dot(x, weight, accumulator, input_precision="tf32x3")
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_y_row + columns[None, :]
    tl.store(y_ptrs, accumulator.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    gates: torch.Tensor,
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + (h * G) B^T, accumulated in float32 and rounded once.

    Args:
        x: [M, K], float32, float16 or bfloat16, unit column stride; rows may be strided.
        weight: [N, K], dense, dtype of x, unit column stride.
        bias: [N] or None.
        h, lora_B, gates, modality_ids, scaling, rows_per_sequence: as in `expand_add`.
        out: [M, N] to write into, dtype of x, unit column stride; allocated if absent.
    Returns:
        y, [M, N], dtype of x.
    """
    (M, K), N, R = x.shape, weight.shape[0], h.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device) if out is None else out
    if M == 0 or N == 0:
        return y
    config = config or CONFIGS[x.element_size()]
    gated_linear_kernel[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        x,
        weight,
        bias,
        h,
        lora_B,
        gates,
        modality_ids,
        y,
        M,
        N,
        K,
        R,
        x.stride(0),
        weight.stride(0),
        h.stride(0),
        lora_B.stride(0),
        gates.stride(0),
        y.stride(0),
        rows_per_sequence,
        R // gates.shape[1],
        scaling,
        HAS_BIAS=bias is not None,
        GATE_PER_ROW=gates_are_per_row(gates, modality_ids),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K if x.element_size() == 2 else BLOCK_K // 2,
        BLOCK_R=ranks_at_once(x.dtype, R),
        PADDED_R=padded_rank(R),
        GROUP_M=8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return y
