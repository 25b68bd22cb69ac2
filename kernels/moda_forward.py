"""MoDA forward: h = dropout(x) A^T in one pass over x; (h * G) B^T added to y in one pass, or written before y is.

Sizes: M rows, K inputs, N outputs, R total rank, E experts; expert e owns ranks e*R/E ... (e+1)*R/E - 1. Products are
accumulated in float32; A, B and h * G are rounded to the dtype of the activations before they meet the tensor cores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

from sda_fast.kernels.configs import LaunchConfig, cdiv, config_for, padded_rank, programs_wanted, rank_block
from sda_fast.kernels.gating import gates_are_per_row
from sda_fast.kernels.group import filled, layer_of_block, number_of, pointer_of
from sda_fast.kernels.launching import kernel, prepare
from sda_fast.kernels.low_rank import low_rank_product
from sda_fast.kernels.philox import dropout_scale, dropout_threshold, keep_tile

LARGEST_RANK_BLOCK = 256


@kernel
def project_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_x_row,
    stride_weight_rank,
    stride_weight_column,
    stride_h_split,
    stride_h_row,
    blocks_per_split,
    threshold,
    keep_scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < M
    rank_mask = ranks < R
    x_row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row
    weight_rank_ptrs = weight_ptr + ranks.to(tl.int64)[None, :] * stride_weight_rank
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first_block = split * blocks_per_split
    for block in range(first_block, tl.minimum(first_block + blocks_per_split, tl.cdiv(K, BLOCK_K))):
        first_column = block * BLOCK_K
        columns = first_column + tl.arange(0, BLOCK_K)
        column_mask = columns < K
        x = tl.load(x_row_ptrs + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        weight = tl.load(
            weight_rank_ptrs + columns.to(tl.int64)[:, None] * stride_weight_column,
            mask=column_mask[:, None] & rank_mask[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = keep_tile(seed, rows, first_column, tl.cdiv(K, 8), threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        accumulator = tl.dot(x, weight.to(x.dtype), accumulator, input_precision="tf32x3")
    if HAS_DROPOUT:
        accumulator *= keep_scale
    h_ptrs = h_ptr + split.to(tl.int64) * stride_h_split + rows.to(tl.int64)[:, None] * stride_h_row + ranks[None, :]
    tl.store(h_ptrs, accumulator, mask=row_mask[:, None] & rank_mask[None, :])


@kernel
def expand_add_kernel(
    y_ptr,
    y_1_ptr,
    y_2_ptr,
    bias_ptr,
    bias_1_ptr,
    bias_2_ptr,
    h_ptr,
    weight_ptr,
    weight_1_ptr,
    weight_2_ptr,
    gates_ptr,
    gates_1_ptr,
    gates_2_ptr,
    modality_ids_ptr,
    seed_ptr,
    M,
    N,
    N_1,
    N_2,
    R,
    stride_y_row,
    stride_y_1_row,
    stride_y_2_row,
    stride_h_row,
    stride_weight_column,
    stride_weight_rank,
    stride_gates_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    threshold,
    keep_scale,
    LAYERS: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
):
    # Programs that share rows follow each other, so that h and the gates stay in the cache.
    first_1 = tl.cdiv(N, BLOCK_N)
    first_2 = first_1 + tl.cdiv(N_1, BLOCK_N)
    blocks_of_columns = first_2 + tl.cdiv(N_2, BLOCK_N)
    rows = tl.program_id(0) // blocks_of_columns * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % blocks_of_columns
    layer = layer_of_block(block, first_1, first_2, LAYERS)
    y_ptr = pointer_of(layer, y_ptr, y_1_ptr, y_2_ptr, LAYERS)
    bias_ptr = pointer_of(layer, bias_ptr, bias_1_ptr, bias_2_ptr, LAYERS if HAS_BIAS else 1)
    weight_ptr = pointer_of(layer, weight_ptr, weight_1_ptr, weight_2_ptr, LAYERS)
    gates_ptr = pointer_of(layer, gates_ptr, gates_1_ptr, gates_2_ptr, LAYERS)
    N = number_of(layer, N, N_1, N_2, LAYERS)
    stride_y_row = number_of(layer, stride_y_row, stride_y_1_row, stride_y_2_row, LAYERS)
    h_ptr += layer * R
    first_column = (block - number_of(layer, 0, first_1, first_2, LAYERS)) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_y_row + columns[None, :]
    dtype = y_ptr.dtype.element_ty
    if ADDS:
        y = tl.load(y_ptrs, mask=mask, other=0.0)
    update = low_rank_product(
        h_ptr,
        weight_ptr,
        gates_ptr,
        modality_ids_ptr,
        rows,
        row_mask,
        columns,
        column_mask,
        R,
        stride_h_row,
        stride_weight_column,
        stride_weight_rank,
        stride_gates_row,
        rows_per_sequence,
        rank_per_expert,
        scaling,
        dtype,
        GATE_PER_ROW,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        PADDED_R,
    )
    if HAS_DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), rows, first_column, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
        update = tl.where(keep, update * keep_scale, 0.0)
    if HAS_BIAS:
        update += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        update += y.to(tl.float32)
    tl.store(y_ptrs, update.to(dtype), mask=mask)


def with_unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself if neighbouring columns are neighbours in memory, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def row_stride(matrix: torch.Tensor | None) -> int:
    """Elements from one row to the next; 0 for an absent matrix."""
    return 0 if matrix is None else matrix.stride(0)


def project(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    split_k: int | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """h = dropout(x) A^T, one pass over x for all adapters whose A are stacked.

    Args:
        x: [M, K], float32, float16 or bfloat16; rows may be strided.
        lora_A: [R, K], float32, float16 or bfloat16; the stacked A of every layer that reads x.
        dropout_p: probability of dropping an element of x; 0 switches dropout off.
        seed: one int64 element on x's device; needed when dropout_p > 0.
        out: [M, R] float32 to write into, unit column stride; allocated if absent.
        split_k: into how many parts K is cut, each summed separately and then together in a fixed order;
            chosen from M if absent.
    Returns:
        h, [M, R] float32.
    """
    M, R = x.shape[0], lora_A.shape[0]
    h = torch.empty(M, R, dtype=torch.float32, device=x.device) if out is None else out
    if M == 0 or R == 0:
        return h
    partials = project_partials(
        x, lora_A, dropout_p=dropout_p, seed=seed, out=h, split_k=split_k, config=config or config_of_rank(x, R)
    )
    return h if partials is None else torch.sum(partials, dim=0, out=h)


def config_of_rank(x: torch.Tensor, rank: int) -> LaunchConfig:
    """The configuration of `project` for a rank that may exceed one block."""
    return config_for("project", x.dtype, min(rank, LARGEST_RANK_BLOCK))


def project_partials(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out: torch.Tensor,
    split_k: int | None,
    config: LaunchConfig,
) -> torch.Tensor | None:
    """`project` without the last sum: fills `out` and returns None, or returns the partial sums [splits, M, R].

    `weight` is [R, K] with any strides.
    """
    x = with_unit_columns(x)
    (M, K), R = x.shape, weight.shape[0]
    strides = x.stride(0), weight.stride(0), weight.stride(1), out.stride(0)
    launch, splits = prepare_project(M, K, R, strides, dropout_p, split_k, config, programs_wanted(x.device))
    if splits == 1:
        launch(x, weight, out, seed)
        return None
    partials = torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    launch(x, weight, partials, seed)
    return partials


@functools.lru_cache(maxsize=1024)
def prepare_project(
    M: int,
    K: int,
    R: int,
    strides: tuple[int, int, int, int],
    dropout_p: float,
    split_k: int | None,
    config: LaunchConfig,
    programs: int,
) -> tuple[Callable[..., None], int]:
    """The launch of `project_partials` and into how many parts it cuts K.

    Args:
        strides: from row to row of x, of the weight's ranks and columns, from row to row of h where K is not cut.
        programs: how many fill the device.
    """
    block_r = min(padded_rank(R), LARGEST_RANK_BLOCK)
    blocks_of_rows, blocks_of_ranks, blocks_of_columns = (
        cdiv(M, config.block_m), cdiv(R, block_r), cdiv(K, config.block_n)
    )  # fmt: skip
    if split_k is None:
        # A part shorter than four blocks of columns does not pay for its share of the final sum.
        split_k = min(programs // (blocks_of_rows * blocks_of_ranks), blocks_of_columns // 4)
    blocks_per_split = cdiv(blocks_of_columns, max(1, min(split_k, blocks_of_columns)))
    splits = max(1, cdiv(blocks_of_columns, max(1, blocks_per_split)))
    *strides_of_inputs, stride_of_h = strides
    strides_of_target = (0, stride_of_h) if splits == 1 else (M * R, R)
    threshold = dropout_threshold(dropout_p)
    numbers = (M, K, R, *strides_of_inputs, *strides_of_target, blocks_per_split, threshold, dropout_scale(dropout_p))
    constants = {
        "HAS_DROPOUT": threshold > 0,
        "BLOCK_M": config.block_m,
        "BLOCK_R": block_r,
        "BLOCK_K": config.block_n,
        **options(config),
    }
    return prepare(project_kernel, (blocks_of_rows, splits, blocks_of_ranks), numbers, constants), splits


def options(config: LaunchConfig) -> dict[str, Any]:
    """Triton's own."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def expand_add(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    gates: torch.Tensor,
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """y += (h * G) B^T in place, rounded once.

    Args:
        y: [M, N], float32, float16 or bfloat16, unit column stride; rows may be strided.
        h: [M, R] float32 from `project`; may be a slice of a group's h (unit column stride).
        lora_B: [N, R], float32, float16 or bfloat16, unit column stride.
        gates: [modalities, E], or [M, E] or [1, E] when modality_ids is None; R must be a multiple of E.
        modality_ids: [ceil(M / rows_per_sequence)] integers, or None.
        scaling: alpha / r.
        rows_per_sequence: how many consecutive rows share one id; 1 means one id per row.
    Returns:
        y.
    """
    if y.numel() and h.shape[1]:
        launch_expand_add(
            [y],
            h,
            [lora_B.t()],
            [gates],
            modality_ids,
            scaling,
            rows_per_sequence=rows_per_sequence,
            config=config or config_for("expand_add", y.dtype, h.shape[1]),
        )
    return y


def expand(
    h: torch.Tensor,
    lora_B: torch.Tensor,
    gates: torch.Tensor,
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    bias: torch.Tensor | None = None,
    out: torch.Tensor,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """out = (h * G) B^T + bias, rounded once: what a library GEMM then adds x W^T to in its accumulator.

    Args:
        h, lora_B, gates, modality_ids, scaling, rows_per_sequence: as in `expand_add`.
        bias: [N] or None.
        out: [M, N], float32, float16 or bfloat16, unit column stride; overwritten.
    Returns:
        out.
    """
    return expand_group(
        h,
        [lora_B],
        [gates],
        modality_ids,
        scaling,
        rows_per_sequence=rows_per_sequence,
        biases=[bias],
        outs=[out],
        config=config,
    )[0]


def expand_group(
    h: torch.Tensor,
    lora_B: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    config: LaunchConfig | None = None,
) -> Sequence[torch.Tensor]:
    """`expand` for up to LAYERS_PER_LAUNCH layers that share x, in one launch.

    Args:
        h: [M, layers * R] float32, unit column stride, the layers' side by side.
        lora_B, gates: one per layer, of one R, number of lines and E, dtype, and strides.
        biases: of all layers or of none.
        outs: one [M, N] per layer, N may differ; overwritten.
    Returns:
        outs.
    """
    if any(out.numel() for out in outs):
        launch_expand_add(
            outs,
            h,
            [one.t() for one in lora_B],
            gates,
            modality_ids,
            scaling,
            rows_per_sequence=rows_per_sequence,
            adds=False,
            biases=biases,
            config=config or config_for("expand_add", outs[0].dtype, lora_B[0].shape[1]),
        )
    return outs


def launch_expand_add(
    ys: Sequence[torch.Tensor],
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    adds: bool = True,
    biases: Sequence[torch.Tensor | None] = (None,),
    config: LaunchConfig,
) -> None:
    """y += mask / (1 - p) * (h * G) weight + bias for each layer, for weights [R, N] of any equal strides.

    Args:
        gates: empty for no gate.
        adds: False to overwrite every y instead.
    """
    (R, _), gate = weights[0].shape, gates[0] if gates else None
    launch = prepare_expand(
        ys[0].dtype,
        ys[0].shape[0],
        tuple([y.shape[1] for y in ys]),
        R,
        (tuple([y.stride(0) for y in ys]), h.stride(0), *weights[0].stride(), row_stride(gate)),
        None if gate is None else R // gate.shape[1],
        gates_are_per_row(gate, modality_ids),
        rows_per_sequence,
        scaling,
        dropout_p,
        adds,
        biases[0] is not None,
        config,
    )
    launch(
        *filled(ys, None),
        *filled(biases, None),
        h,
        *filled(weights, None),
        *filled(gates, None),
        modality_ids,
        seed,
    )


@functools.lru_cache(maxsize=1024)
def prepare_expand(
    dtype: torch.dtype,
    M: int,
    widths: tuple[int, ...],
    R: int,
    strides: tuple[tuple[int, ...], int, int, int, int],
    rank_per_expert: int | None,
    gate_per_row: bool,
    rows_per_sequence: int,
    scaling: float,
    dropout_p: float,
    adds: bool,
    has_bias: bool,
    config: LaunchConfig,
) -> Callable[..., None]:
    """The launch of `launch_expand_add`.

    Args:
        widths: columns of every y.
        strides: from row to row of every y, of h, of the weight's ranks and columns, from line to line of the gates.
        rank_per_expert: None without gates.
    """
    of_ys, of_h, of_ranks, of_columns, of_gates = strides
    threshold = dropout_threshold(dropout_p)
    numbers = (
        *(M, *filled(widths, 0), R, *filled(of_ys, 0), of_h, of_columns, of_ranks, of_gates),
        *(rows_per_sequence, rank_per_expert or 1, scaling, threshold, dropout_scale(dropout_p)),
    )
    constants = {
        "LAYERS": len(widths),
        "ADDS": adds,
        "HAS_BIAS": has_bias,
        "GATE_PER_ROW": gate_per_row,
        "HAS_DROPOUT": threshold > 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": rank_block(dtype, R),
        "PADDED_R": padded_rank(R),
        **options(config),
    }
    blocks_of_columns = sum(cdiv(N, config.block_n) for N in widths)
    return prepare(expand_add_kernel, (cdiv(M, config.block_m) * blocks_of_columns,), numbers, constants)
