"""The product of few rows with a 4-bit weight: decoded on its way to the tensor cores, bias and update at the end.

Few outputs leave multiprocessors idle, so programs split K as well: each writes the float32 sums of its part, and a
second kernel adds the parts in their order, with bias and (h * G) B^T, and rounds once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from sda_fast.kernels.configs import cdiv, next_power_of_2, padded_rank, programs_wanted, rank_block
from sda_fast.kernels.gating import gates_are_per_row, load_gated
from sda_fast.kernels.launching import kernel, prepare
from sda_fast.kernels.moda_forward import row_stride
from sda_fast.kernels.nf4 import as_words, decode_tile, placement_of, unpack_statistics

LARGEST_SMALL_M = 64
FINISH_COLUMNS = 32


@kernel
def small_product_kernel(
    x_ptr,
    data_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    parts_ptr,
    M,
    N,
    K,
    elements,
    stride_x_row,
    blocks_per_split,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PLACEMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One part of x W^T: the sum over this program's share of K, float32 [splits, M, N]."""
    rows = tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    x_row_ptrs = x_ptr + rows.to(tl.int64)[None, :] * stride_x_row
    table = tl.load(code_ptr + tl.arange(0, 16)).to(tl.float32)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first_block = split * blocks_per_split
    for block in range(first_block, tl.minimum(first_block + blocks_per_split, tl.cdiv(K, BLOCK_K))):
        first_column = block * BLOCK_K
        columns = first_column + tl.arange(0, BLOCK_K)
        x = tl.load(x_row_ptrs + columns[:, None], mask=(rows < M)[None, :] & (columns < K)[:, None], other=0.0)
        weight = decode_tile(
            data_ptr,
            absmax_ptr,
            table,
            nested_absmax_ptr,
            nested_code_ptr,
            offset_ptr,
            outputs,
            first_column,
            N,
            K,
            elements,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            PLACEMENT,
            BLOCK_N,
            BLOCK_K,
        )
        # Columns beyond K are zero in x, and the decoded weight is finite everywhere.
        accumulator = tl.dot(weight.to(x.dtype), x, accumulator, input_precision="tf32x3")
    parts_ptrs = parts_ptr + (split.to(tl.int64) * M + rows)[None, :] * N + outputs[:, None]
    tl.store(parts_ptrs, accumulator, mask=(rows < M)[None, :] & (outputs < N)[:, None])


@kernel
def finish_product_kernel(
    parts_ptr,
    bias_ptr,
    h_ptr,
    lora_B_ptr,
    gates_ptr,
    modality_ids_ptr,
    y_ptr,
    M,
    N,
    R,
    splits,
    stride_part,
    stride_h_row,
    stride_B_row,
    stride_gates_row,
    stride_y_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
):
    """Add up the parts, the bias and (h * G) B^T, and round once."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    parts_ptrs = parts_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    for _ in range(splits):
        total += tl.load(parts_ptrs, mask=mask, other=0.0)
        parts_ptrs += stride_part
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_LORA:
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
                lora_B_ptr + columns.to(tl.int64)[None, :] * stride_B_row + ranks[:, None],
                mask=column_mask[None, :] & (ranks < R)[:, None],
                other=0.0,
            )
            total = tl.dot(gated, lora_B.to(tl.float32), total, input_precision="tf32x3")
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_y_row + columns[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def small_product_blocks(M: int, element_size: int) -> tuple[int, int, int]:
    """Rows, outputs and inputs that a program of the small product works on at a time."""
    outputs, inputs = (64, 128) if element_size == 2 else (32, 32)
    return max(16, next_power_of_2(M)), outputs, inputs


class SmallProductLaunch(NamedTuple):
    """What a launch of `small_product_kernel` needs beside tensors: the split of K, grid and constants."""

    splits: int
    blocks_per_split: int
    grid: tuple[int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def prepare_small_product(
    M: int,
    N: int,
    K: int,
    element_size: int,
    blocksize: int,
    nested_blocksize: int,
    programs: int,
    splits: int,
    stride_x_row: int,
) -> tuple[Callable[..., None], int]:
    """The launch of `small_product_kernel`, and into how many parts it cuts K; see `small_product_launch`."""
    launch = small_product_launch(M, N, K, element_size, blocksize, nested_blocksize, programs, splits)
    numbers = (M, N, K, N * K, stride_x_row, launch.blocks_per_split)
    return prepare(small_product_kernel, launch.grid, numbers, launch.constants), launch.splits


def small_product_launch(
    M: int, N: int, K: int, element_size: int, blocksize: int, nested_blocksize: int, programs: int, splits: int
) -> SmallProductLaunch:
    """For M rows of x and an [N, K] weight; `splits` 0 gives every one of `programs` something to do."""
    block_m, block_n, block_k = small_product_blocks(M, element_size)
    blocks_of_outputs, blocks_of_columns = cdiv(N, block_n), cdiv(K, block_k)
    if splits == 0:
        splits = min(programs // blocks_of_outputs, blocks_of_columns // 2)
    blocks_per_split = cdiv(blocks_of_columns, min(max(1, splits), max(1, blocks_of_columns)))
    splits = cdiv(blocks_of_columns, max(1, blocks_per_split))
    constants = {
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": nested_blocksize,
        "PLACEMENT": placement_of(K, blocksize),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }
    return SmallProductLaunch(splits, blocks_per_split, (blocks_of_outputs, splits), constants)


@functools.lru_cache(maxsize=4096)
def prepare_finish(
    M: int,
    N: int,
    R: int,
    element_size: int,
    splits: int,
    strides: tuple[int, int, int, int],
    rows_per_sequence: int,
    rank_per_expert: int,
    scaling: float,
    has_bias: bool,
    gate_per_row: bool,
) -> Callable[..., None]:
    """The launch of `finish_product_kernel`; strides from row to row of h, lora_B, gates and y."""
    numbers = (M, N, R, splits, M * N, *strides, rows_per_sequence, rank_per_expert, scaling)
    constants = {
        "HAS_BIAS": has_bias,
        "HAS_LORA": R > 0,
        "GATE_PER_ROW": gate_per_row,
        "BLOCK_M": small_product_blocks(M, element_size)[0],
        "BLOCK_N": FINISH_COLUMNS,
        "BLOCK_R": rank_block(torch.float32, R),
        "PADDED_R": padded_rank(R),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return prepare(finish_product_kernel, (cdiv(N, FINISH_COLUMNS),), numbers, constants)


def small_linear_4bit(
    x: torch.Tensor,
    data: torch.Tensor,
    statistics: Sequence[torch.Tensor],
    out_features: int,
    blocksize: int,
    nested_blocksize: int = 0,
    *,
    bias: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    modality_ids: torch.Tensor | None = None,
    scaling: float = 1.0,
    rows_per_sequence: int = 1,
    splits: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + (h * G) B^T for few rows, with W decoded on the way to the tensor cores.

    Args:
        x: [M, K], M at most 64, float32, float16 or bfloat16, unit column stride; rows may be strided.
        data, statistics, blocksize, nested_blocksize: as in `decode_4bit`; the weight is [out_features, K].
        bias: [N] or None.
        h, lora_B, gates, modality_ids, scaling, rows_per_sequence: as in `expand_add`; h is None for the
            frozen layer alone.
        splits: into how many parts K is split, at most as many as there are blocks of it; 0 chooses.
        out: [M, N], dtype of x, unit column stride; allocated if absent.
    Returns:
        y, [M, N], dtype of x.
    Raises:
        ValueError: M exceeds 64.
    """
    (M, K), N = x.shape, out_features
    if M > LARGEST_SMALL_M:
        raise ValueError(f"x has {M} rows, the small product takes at most {LARGEST_SMALL_M}")
    y = torch.empty(M, N, dtype=x.dtype, device=x.device) if out is None else out
    if M == 0 or N == 0:
        return y
    element_size = x.element_size()
    programs = programs_wanted(x.device)
    shape = (M, N, K, element_size, blocksize, nested_blocksize)
    launch, splits = prepare_small_product(*shape, programs, splits, x.stride(0))
    parts = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    launch(x, as_words(data), *unpack_statistics(statistics), parts)
    R = 0 if h is None else h.shape[1]
    rank_per_expert = 1 if gates is None or R == 0 else R // gates.shape[1]
    strides = row_stride(h), row_stride(lora_B), row_stride(gates), y.stride(0)
    rows = (rows_per_sequence, rank_per_expert, scaling)
    kinds = (bias is not None, gates_are_per_row(gates, modality_ids))
    finish = prepare_finish(M, N, R, element_size, splits, strides, *rows, *kinds)
    finish(parts, bias, h, lora_B, gates, modality_ids, y)
    return y
