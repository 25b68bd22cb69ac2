"""A frozen product and its low-rank update in one GEMM: y = x W^T + bias + (h * G) B^T, dx = dy W + mask/(1-p) (dh A).

The alternative to a library GEMM with a pass before or after it (`expand`, `expand_add`, `dx_pass`): it spares writing
y or dx once more and reading it, and pays with the distance between this GEMM and the library's. Which one runs is
decided by a measured table, not here. Where the device has a copy engine for tiles, `moda_gemm_tma` computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from sda_fast.kernels import moda_gemm_tma
from sda_fast.kernels.configs import LaunchConfig, cdiv, padded_rank, rank_block
from sda_fast.kernels.gating import gates_are_per_row
from sda_fast.kernels.launching import kernel
from sda_fast.kernels.low_rank import low_rank_product
from sda_fast.kernels.moda_forward import options, row_stride
from sda_fast.kernels.philox import dropout_scale, dropout_threshold, keep_tile

BLOCK_K = 64
# Bytes per element of the activations -> configuration
CONFIGS = {2: LaunchConfig(128, 128, 8, 3), 4: LaunchConfig(64, 64, 8, 2)}


def ranks_at_once(dtype: torch.dtype, rank: int) -> int:
    """How many ranks the accumulator starts from at a time: with 64 registers would spill on sm_100."""
    return min(rank_block(dtype, rank), 32)


@kernel
def updated_product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    lora_ptr,
    gates_ptr,
    modality_ids_ptr,
    seed_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_x_row,
    stride_weight_column,
    stride_weight_inner,
    stride_h_row,
    stride_lora_column,
    stride_lora_rank,
    stride_gates_row,
    stride_y_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y [M, N] from x [M, K]; for dx, dy stands for x and dh for h. The accumulator starts from the update."""
    # Programs run in groups of GROUP_M blocks of rows, so that a group's part of x and W stays in the L2 cache.
    first_row, first_column = moda_gemm_tma.origin_of_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    accumulator = low_rank_product(
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
        x_ptr.dtype.element_ty,
        GATE_PER_ROW,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        PADDED_R,
    )
    if HAS_DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), rows, first_column, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
        accumulator = tl.where(keep, accumulator * keep_scale, 0.0)
    x_row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row
    weight_column_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight_column
    for first in range(0, K, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        inner_mask = inner < K
        x = tl.load(x_row_ptrs + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        weight = tl.load(
            weight_column_ptrs + inner.to(tl.int64)[:, None] * stride_weight_inner,
            mask=inner_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
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
        config: that of the kernel without the copy engine, which then runs.
    Returns:
        y, [M, N], dtype of x.
    """
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    gating: dict[str, Any] = {
        "gates": gates,
        "modality_ids": modality_ids,
        "scaling": scaling,
        "rows_per_sequence": rows_per_sequence,
    }
    launch_updated_product(x, weight, h, lora_B.t(), y, bias=bias, config=config, **gating)
    return y


def input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor,
    lora_A: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """dx = dy W + mask / (1 - p) * (dh A), accumulated in float32 and rounded once.

    Args:
        dy: [M, N], float32, float16 or bfloat16, unit column stride; rows may be strided.
        weight: [N, K], dense, dtype of dy, unit column stride.
        dh, lora_A, dropout_p, seed: as in `dx_pass`.
        out: [M, K] to write into, dtype of dy, unit column stride; allocated if absent.
        config: that of the kernel without the copy engine, which then runs.
    Returns:
        dx, [M, K], dtype of dy.
    """
    dx = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device) if out is None else out
    launch_updated_product(dy, weight.t(), dh, lora_A, dx, dropout_p=dropout_p, seed=seed, config=config)
    return dx


def launch_updated_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    lora: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    modality_ids: torch.Tensor | None = None,
    scaling: float = 1.0,
    rows_per_sequence: int = 1,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """y = x weight^T + bias + mask / (1 - p) * (h * G) lora, for weight [N, K] and lora [R, N] of any strides."""
    (M, K), (R, N) = x.shape, lora.shape
    if M == 0 or N == 0:
        return
    by_copy_engine = config is None and moda_gemm_tma.serves(x, weight, y, R)
    config = config or CONFIGS[x.element_size()]
    threshold = dropout_threshold(dropout_p)
    pointers = (x, weight, bias, h, lora, gates, modality_ids, seed if threshold else None, y)
    after_weight = (h.stride(0), lora.stride(1), lora.stride(0), row_stride(gates), y.stride(0), rows_per_sequence)
    numbers = (*after_weight, 1 if gates is None else R // gates.shape[1], scaling, threshold, dropout_scale(dropout_p))
    constants: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "GATE_PER_ROW": gates_are_per_row(gates, modality_ids),
        "HAS_DROPOUT": threshold > 0,
    }
    if by_copy_engine:
        moda_gemm_tma.launch(pointers, (M, N, K, R, x.stride(0)), numbers, constants)
        return
    updated_product_kernel[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        *pointers,
        *(M, N, K, R, x.stride(0), *weight.stride()),
        *numbers,
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K if x.element_size() == 2 else BLOCK_K // 2,
        BLOCK_R=ranks_at_once(x.dtype, R),
        PADDED_R=padded_rank(R),
        GROUP_M=moda_gemm_tma.GROUP_M,
        **options(config),
    )
