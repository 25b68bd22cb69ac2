"""The GEMM of `moda_gemm` by the copy engine (TMA) of Hopper and Blackwell: 16-bit activations, ranks up to 32.

One program per multiprocessor works off tile after tile. Tiles of x and W come through descriptors, without masks or
addresses in registers, several steps ahead of the tensor cores; on Hopper the two loops are one, so that the copies for
the next tile run while this one is finished. The update is added at the end of a tile, where dropout's mask can be
drawn for a few columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from sda_fast.kernels.configs import LaunchConfig, cdiv, multiprocessors, padded_rank
from sda_fast.kernels.gating import load_gated
from sda_fast.kernels.launching import POINTER_ALIGNMENT, kernel
from sda_fast.kernels.low_rank import load_right
from sda_fast.kernels.moda_forward import options
from sda_fast.kernels.philox import keep_tile

LARGEST_RANK = 32
BLOCK_K, GROUP_M = 64, 8
CONFIG = LaunchConfig(128, 256, 8, 4)
HOPPER, BLACKWELL = 9, 10


@triton.jit
def origin_of_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile, where tiles are numbered down GROUP_M blocks of rows, column by column."""
    blocks_of_rows = tl.cdiv(M, BLOCK_M)
    tiles_of_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_block = tile // tiles_of_group * GROUP_M
    blocks_of_group = tl.minimum(blocks_of_rows - first_block, GROUP_M)
    within = tile % tiles_of_group
    return (first_block + within % blocks_of_group) * BLOCK_M, within // blocks_of_group * BLOCK_N


@triton.jit
def finish_tile(
    tile,
    left,
    outputs,
    lora_ptr,
    bias_ptr,
    seed,
    rows,
    first_row,
    first_column,
    N,
    R,
    stride_lora_column,
    stride_lora_rank,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    ADDS_UPDATE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store a [BLOCK_M, BLOCK_N] tile, COLUMNS at a time, with bias and, where it lacks it, the update."""
    if BLOCK_N > COLUMNS:
        half: tl.constexpr = BLOCK_N // 2
        halves = tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, half)), (0, 2, 1)))
        for which in tl.static_range(2):
            finish_tile(
                halves[which],
                left,
                outputs,
                lora_ptr,
                bias_ptr,
                seed,
                rows,
                first_row,
                first_column + which * half,
                N,
                R,
                stride_lora_column,
                stride_lora_rank,
                threshold,
                keep_scale,
                HAS_BIAS,
                ADDS_UPDATE,
                HAS_DROPOUT,
                BLOCK_M,
                half,
                COLUMNS,
                BLOCK_R,
            )
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        if ADDS_UPDATE:
            right = load_right(lora_ptr, columns, columns < N, 0, R, stride_lora_column, stride_lora_rank, BLOCK_R)
            update = tl.dot(left, right.to(left.dtype))
            if HAS_DROPOUT:
                keep = keep_tile(seed, rows, first_column, tl.cdiv(N, 8), threshold, BLOCK_M, BLOCK_N)
                update = tl.where(keep, update * keep_scale, 0.0)
            tile += update
        if HAS_BIAS:
            tile += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        outputs.store([first_row, first_column], tile.to(left.dtype))


@kernel
def updated_product_tma_kernel(
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
    stride_weight_row,
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
    WEIGHT_IS_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    UPDATES_AT_ONCE: tl.constexpr,
    JOINS_LOOPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS_AT_ONCE: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`updated_product_kernel` for a weight in memory as [N, K], or as [K, N] where WEIGHT_IS_TRANSPOSED."""
    dtype = x_ptr.dtype.element_ty
    inputs = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_x_row, 1], [BLOCK_M, BLOCK_K])
    outputs = tl.make_tensor_descriptor(y_ptr, [M, N], [stride_y_row, 1], [BLOCK_M, COLUMNS_AT_ONCE])
    if WEIGHT_IS_TRANSPOSED:
        weights = tl.make_tensor_descriptor(weight_ptr, [K, N], [stride_weight_row, 1], [BLOCK_K, BLOCK_N])
    else:
        weights = tl.make_tensor_descriptor(weight_ptr, [N, K], [stride_weight_row, 1], [BLOCK_N, BLOCK_K])
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=JOINS_LOOPS):
        first_row, first_column = origin_of_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            x = inputs.load([first_row, step * BLOCK_K])
            if WEIGHT_IS_TRANSPOSED:
                weight = weights.load([step * BLOCK_K, first_column])
            else:
                weight = weights.load([first_column, step * BLOCK_K]).T
            accumulator = tl.dot(x, weight, accumulator)
        rows = first_row + tl.arange(0, BLOCK_M)
        left = load_gated(
            h_ptr,
            gates_ptr,
            modality_ids_ptr,
            rows,
            rows < M,
            0,
            R,
            stride_h_row,
            stride_gates_row,
            rows_per_sequence,
            rank_per_expert,
            scaling,
            GATE_PER_ROW,
            BLOCK_R,
        ).to(dtype)
        if UPDATES_AT_ONCE:
            columns = first_column + tl.arange(0, BLOCK_N)
            right = load_right(lora_ptr, columns, columns < N, 0, R, stride_lora_column, stride_lora_rank, BLOCK_R)
            accumulator = tl.dot(left, right.to(dtype), accumulator)
        finish_tile(
            accumulator,
            left,
            outputs,
            lora_ptr,
            bias_ptr,
            seed,
            rows,
            first_row,
            first_column,
            N,
            R,
            stride_lora_column,
            stride_lora_rank,
            threshold,
            keep_scale,
            HAS_BIAS,
            not UPDATES_AT_ONCE,
            HAS_DROPOUT,
            BLOCK_M,
            BLOCK_N,
            COLUMNS_AT_ONCE,
            BLOCK_R,
        )


@cache
def generation(device: torch.device) -> int:
    """The major compute capability, 0 for what is no GPU; asked once."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def has_copy_engine(device: torch.device) -> bool:
    """Whether a device is of a generation whose copy engine the kernel is written for."""
    return generation(device) in (HOPPER, BLACKWELL)


def is_described(matrix: torch.Tensor) -> bool:
    """Whether a descriptor can stand for a 16-bit matrix: unit column stride, rows that begin at 16-byte borders."""
    aligned = matrix.data_ptr() % POINTER_ALIGNMENT == 0 and matrix.stride(0) * 2 % POINTER_ALIGNMENT == 0
    return matrix.dim() == 2 and matrix.stride(1) == 1 and aligned


def serves(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, rank: int) -> bool:
    """Whether the copy engine is there, can take these, and has a tile for every multiprocessor."""
    if not has_copy_engine(x.device) or x.element_size() != 2 or not 1 <= rank <= LARGEST_RANK or x.shape[1] == 0:
        return False
    in_memory = weight.t() if is_transposed(weight) else weight
    return number_of_tiles(*y.shape) >= multiprocessors(x.device) and all(map(is_described, (x, in_memory, y)))


def number_of_tiles(M: int, N: int) -> int:
    return cdiv(M, CONFIG.block_m) * cdiv(N, CONFIG.block_n)


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether a weight [N, K] lies in memory as [K, N]."""
    return weight.stride(1) != 1


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors of one launch, 384 bytes a program."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(
    pointers: tuple[torch.Tensor, torch.Tensor, *tuple[torch.Tensor | None, ...]],
    sizes: tuple[int, ...],
    numbers: Sequence[Any],
    constants: dict[str, Any],
) -> None:
    """Launch with what `updated_product_kernel` takes.

    Args:
        pointers: in the kernel's order, x and weight first.
        sizes: M, N, K, R, and elements from one row of x to the next.
        numbers: those after the weight's stride.
        constants: those that do not belong to the configuration.
    """
    x, weight, *_ = pointers
    M, N, _, R, _ = sizes
    programs = min(number_of_tiles(M, N), multiprocessors(x.device) if x.is_cuda else 2)
    transposed = is_transposed(weight)

    def with_scratch() -> None:
        triton.set_allocator(scratch)
        updated_product_tma_kernel[(programs,)](
            *pointers,
            *(*sizes, weight.stride(1 if transposed else 0)),
            *numbers,
            **constants,
            **constants_of(R, constants["HAS_DROPOUT"], transposed, generation(x.device)),
            **options(CONFIG),
        )

    # Triton's allocator is set for this launch alone.
    copy_context().run(with_scratch)


def constants_of(rank: int, has_dropout: bool, transposed: bool, chip_generation: int) -> dict[str, Any]:
    """The kernel's constants that belong to its configuration, on a chip of this major compute capability."""
    at_once = not has_dropout and padded_rank(rank) == 16
    return {
        "WEIGHT_IS_TRANSPOSED": transposed,
        # A wider update, or one with its mask, does not fit the registers beside the tile.
        "UPDATES_AT_ONCE": at_once,
        # Triton 3.9 does not compile the joined loops for Blackwell.
        "JOINS_LOOPS": chip_generation == HOPPER,
        "BLOCK_M": CONFIG.block_m,
        "BLOCK_N": CONFIG.block_n,
        "BLOCK_K": BLOCK_K,
        "BLOCK_R": padded_rank(rank),
        "COLUMNS_AT_ONCE": 64 if at_once else 32,
        "GROUP_M": GROUP_M,
    }
