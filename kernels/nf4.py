"""bitsandbytes 4-bit weights in kernels: decoding, and decoding with a MoDA update folded in.

Layout: codes row-major over the flattened [N, K] matrix, two to a byte, the high nibble first; a block of `blocksize`
elements of the flattened matrix shares one scale, so blocks may straddle rows and the last may be partial. Scales are
float32, or 8-bit codes: absmax = nested_code[code8] * nested_absmax[block // nested_blocksize] + offset. Statistics are
a list: [absmax, code], or [absmax codes, code, nested absmax, nested code, offset].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sda_fast.kernels.configs import cdiv, padded_rank, rank_block
from sda_fast.kernels.launching import kernel, prepare
from sda_fast.kernels.moda_forward import row_stride

WORD_BYTES = 4
# How a tile of the weight lies on blocks and bytes.
ALIGNED, EVEN, ODD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def block_scale(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, NESTED_BLOCKSIZE: tl.constexpr
):
    """The float32 scales of the blocks with the given numbers."""
    if NESTED_BLOCKSIZE == 0:
        return tl.load(absmax_ptr + blocks, mask=mask, other=0.0).to(tl.float32)
    else:
        code = tl.load(absmax_ptr + blocks, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_absmax_ptr + blocks // NESTED_BLOCKSIZE, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(nested_code_ptr + code, mask=mask, other=0.0).to(tl.float32)
        return inner * outer + tl.load(offset_ptr).to(tl.float32)


@triton.jit
def decode_tile(
    data_ptr,
    absmax_ptr,
    table,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    rows,
    first_column,
    N,
    K,
    elements,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PLACEMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `rows`, columns first_column ... + BLOCK_K - 1 of the weight, float32, anything finite outside the matrix.

    `table` holds the 16 values. Looking them up with a gather (through shared memory) takes the fewest instructions.
    """
    row_start = rows.to(tl.int64)[:, None] * K + first_column
    row_mask = (rows < N)[:, None]
    if PLACEMENT == ODD:
        inner = tl.arange(0, BLOCK_K)[None, :]
        index = row_start + inner
        mask = row_mask & (first_column + inner < K) & (index < elements)
        byte = tl.load(data_ptr + index // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (index % 2)).to(tl.int32)) & 15
        value = tl.reshape(tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), 0), (BLOCK_N, BLOCK_K))
        scale = block_scale(
            absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, index // BLOCKSIZE, mask, NESTED_BLOCKSIZE
        )
        return value * scale
    elif PLACEMENT == EVEN:
        pair = 2 * tl.arange(0, BLOCK_K // 2)[None, :]
        index = row_start + pair
        mask = row_mask & (first_column + pair < K) & (index < elements)
        byte = tl.load(data_ptr + row_start // 2 + pair // 2, mask=mask, other=0).to(tl.int32)
        code = tl.join(byte >> 4, byte & 15)
        value = tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), 0)
        scale = block_scale(
            absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, index // BLOCKSIZE, mask, NESTED_BLOCKSIZE
        )
        return tl.reshape(tl.reshape(value, (BLOCK_N, BLOCK_K // 2, 2)) * scale[:, :, None], (BLOCK_N, BLOCK_K))
    else:
        code = codes_of_words(data_ptr, rows, row_mask, first_column, K, BLOCK_K)
        value = tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), 0)
        BLOCKS: tl.constexpr = BLOCK_K // BLOCKSIZE if BLOCK_K > BLOCKSIZE else 1
        start = tl.arange(0, BLOCKS)[None, :] * BLOCKSIZE
        mask = row_mask & (first_column + start < K)
        blocks = (row_start + start) // BLOCKSIZE
        scale = block_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, NESTED_BLOCKSIZE)
        value = tl.reshape(value, (BLOCK_N, BLOCKS, BLOCK_K // BLOCKS)) * scale[:, :, None]
        return tl.reshape(value, (BLOCK_N, BLOCK_K))


@triton.jit
def codes_of_words(data_ptr, rows, row_mask, first_column, K, BLOCK_K: tl.constexpr):
    """The codes of a tile, int32 [BLOCK_N, BLOCK_K / 8, 2, 2, 2], where rows are multiples of 32 and start a block.

    Read in words of eight codes, four words at once, which the compiler can also fetch ahead. Nibble i ^ 1 of a word,
    counted from its low end, is element i; joined last is the lowest bit of i.
    """
    row_words = K // 32 * 4
    inner = first_column // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    first_word = rows.to(tl.int64)[:, None] * row_words
    mask = row_mask & (inner < row_words)
    word = tl.load(data_ptr.to(tl.pointer_type(tl.uint32)) + first_word + inner, mask=mask, other=0)
    even = tl.join(tl.join(word >> 4, word >> 20), tl.join(word >> 12, word >> 28))
    odd = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
    return (tl.join(even, odd) & 15).to(tl.int32)


@kernel
def decode_kernel(
    data_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    weight_ptr,
    lora_A_ptr,
    lora_B_ptr,
    gates_ptr,
    N,
    K,
    R,
    elements,
    stride_A_row,
    stride_B_row,
    rank_per_expert,
    scaling,
    HAS_FOLD: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PLACEMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
):
    blocks_of_columns = tl.cdiv(K, BLOCK_K)
    rows = tl.program_id(0) // blocks_of_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(0) % blocks_of_columns * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if HAS_FOLD:
        for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            rank_mask = ranks < R
            gates = tl.load(gates_ptr + ranks // rank_per_expert, mask=rank_mask, other=0.0).to(tl.float32) * scaling
            lora_B = tl.load(
                lora_B_ptr + rows.to(tl.int64)[:, None] * stride_B_row + ranks[None, :],
                mask=(rows < N)[:, None] & rank_mask[None, :],
                other=0.0,
            )
            lora_A = tl.load(
                lora_A_ptr + ranks.to(tl.int64)[:, None] * stride_A_row + columns[None, :],
                mask=rank_mask[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            gated = lora_B.to(tl.float32) * gates[None, :]
            update = tl.dot(gated, lora_A.to(tl.float32), update, input_precision="tf32x3")
    weight = decode_tile(
        data_ptr,
        absmax_ptr,
        tl.load(code_ptr + tl.arange(0, 16)).to(tl.float32),
        nested_absmax_ptr,
        nested_code_ptr,
        offset_ptr,
        rows,
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
    if HAS_FOLD:
        weight += update
    index = rows.to(tl.int64)[:, None] * K + columns[None, :]
    mask = (rows < N)[:, None] & (columns < K)[None, :] & (index < elements)
    tl.store(weight_ptr + index, weight.to(weight_ptr.dtype.element_ty), mask=mask)


def placement_of(columns: int, blocksize: int) -> int:
    """ALIGNED if every row starts a block, EVEN if every row starts a byte, else ODD."""
    if columns % blocksize == 0:
        return ALIGNED.value
    return EVEN.value if columns % 2 == 0 else ODD.value


def decode_blocks(rank: int, placement: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile and its warps, for decoding with a fold of total rank `rank` (0: none)."""
    if rank == 0:
        return 8, 512, 4
    return 64, 64, 8 if placement == ODD.value else 4


class DecodeLaunch(NamedTuple):
    """What a launch of `decode_kernel` needs beside tensors: the matrix as the kernel sees it, grid and constants."""

    rows: int
    columns: int
    elements: int
    grid: tuple[int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def prepare_decode(
    N: int,
    K: int,
    blocksize: int,
    nested_blocksize: int,
    R: int,
    rank_per_expert: int,
    strides: tuple[int, int],
    scaling: float,
) -> Callable[..., None]:
    """The launch for an [N, K] weight with a fold of total rank R (0: none), A and B with these row strides."""
    launch = decode_launch(N, K, R, blocksize, nested_blocksize)
    numbers = (launch.rows, launch.columns, R, launch.elements, *strides, rank_per_expert, scaling)
    return prepare(decode_kernel, launch.grid, numbers, launch.constants)


def decode_launch(N: int, K: int, R: int, blocksize: int, nested_blocksize: int) -> DecodeLaunch:
    """For decoding an [N, K] weight with a fold of total rank R (0: none)."""
    elements = N * K
    if R == 0:
        # Nothing depends on where rows begin: cut the flattened matrix into rows of whole blocks.
        K = max(blocksize, 512)
        N = cdiv(elements, K)
    # Words of codes must not be read beyond the end of a last row that is cut short.
    placement = placement_of(K, blocksize) if elements == N * K else EVEN.value
    block_n, block_k, num_warps = decode_blocks(R, placement)
    constants = {
        "HAS_FOLD": R > 0,
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": nested_blocksize,
        "PLACEMENT": placement,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": rank_block(torch.float32, R),
        "PADDED_R": padded_rank(R),
        "num_warps": num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    return DecodeLaunch(N, K, elements, (cdiv(N, block_n) * cdiv(K, block_k),), constants)


def as_words(data: torch.Tensor) -> torch.Tensor:
    """The codes where words of four bytes can be read: a copy if they begin elsewhere, as a slice of a file may."""
    return data if data.data_ptr() % WORD_BYTES == 0 else data.clone()


def unpack_statistics(statistics: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """(absmax, code, nested absmax, nested code, offset); the last three None for plain statistics."""
    return (*statistics, *(None,) * (5 - len(statistics)))


def decode_4bit(
    data: torch.Tensor,
    statistics: Sequence[torch.Tensor],
    shape: tuple[int, int],
    blocksize: int,
    nested_blocksize: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The weight as a dense matrix, with scaling * B diag(g) A added in float32 before the only rounding.

    Args:
        data: packed codes, uint8, (N * K + 1) // 2 elements, contiguous.
        statistics: see the top of this module; absmax, nested absmax and codes float32, offset one element.
        shape: (N, K).
        blocksize: elements per scale, a power of two from 32 to 4096.
        nested_blocksize: scales per nested scale, a power of two; 0 for plain statistics.
        dtype: of the result, if `out` is absent: float32, float16 or bfloat16.
        out: [N, K] contiguous, to write into.
        lora_A, lora_B: [R, K] and [N, R], unit column stride; all of lora_A, lora_B, gates or none.
        gates: [E], the gate of one modality.
        scaling: alpha / r.
    Returns:
        [N, K].
    """
    weight = torch.empty(shape, dtype=dtype, device=data.device) if out is None else out
    if 0 in shape:
        return weight
    R = 0 if lora_A is None else lora_A.shape[0]
    rank_per_expert = 1 if gates is None or R == 0 else R // gates.numel()
    strides = row_stride(lora_A), row_stride(lora_B)
    launch = prepare_decode(*shape, blocksize, nested_blocksize, R, rank_per_expert, strides, scaling)
    launch(as_words(data), *unpack_statistics(statistics), weight, lora_A, lora_B, gates)
    return weight
