"""Float32 sums in the memory of 16-bit results plus one byte: a sum's upper 24 bits, the last rounded to nearest.

The upper 16 bits lie where the result will be, the next 8 beside it. Adding rounds by at most 2^-16 of the sum, 1/256
of what rounding the finished sum to bfloat16 may.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sda_fast.kernels.configs import cdiv
from sda_fast.kernels.launching import kernel

BLOCK, NUM_WARPS = 2048, 8


@triton.jit
def load_sums(high_ptrs, low_ptrs, mask):
    high = tl.load(high_ptrs, mask=mask, other=0).to(tl.int32)
    low = tl.load(low_ptrs, mask=mask, other=0).to(tl.int32)
    return ((high << 16) | (low << 8)).to(tl.float32, bitcast=True)


@triton.jit
def store_sums(high_ptrs, low_ptrs, sums, mask):
    bits = sums.to(tl.int32, bitcast=True)
    rounded = bits + 0x7F + ((bits >> 8) & 1)
    # a NaN's bits could carry over into the sign, or be cut to those of infinity
    rounded = tl.where(sums == sums, rounded, bits | 0x400000)
    tl.store(high_ptrs, (rounded >> 16).to(tl.int16), mask=mask)
    tl.store(low_ptrs, ((rounded >> 8) & 0xFF).to(tl.uint8), mask=mask)


@kernel
def add_kernel(
    high_ptr,
    low_ptr,
    first_ptr,
    second_ptr,
    count,
    first_factor,
    second_factor,
    FROM_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    sums = first_factor * tl.load(first_ptr + offsets, mask=mask, other=0.0)
    if second_ptr is not None:
        sums += second_factor * tl.load(second_ptr + offsets, mask=mask, other=0.0)
    if not FROM_ZERO:
        sums += load_sums(high_ptr + offsets, low_ptr + offsets, mask)
    store_sums(high_ptr + offsets, low_ptr + offsets, sums, mask)


@kernel
def finish_kernel(high_ptr, low_ptr, scale_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    sums = load_sums(high_ptr + offsets, low_ptr + offsets, mask) * tl.load(scale_ptr)
    tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def write_kernel(out_ptr, first_ptr, second_ptr, scale_ptr, count, first_factor, second_factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    sums = first_factor * tl.load(first_ptr + offsets, mask=mask, other=0.0)
    if second_ptr is not None:
        sums += second_factor * tl.load(second_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, (sums * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


def add(
    result: torch.Tensor,
    low: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None,
    factors: tuple[float, float],
    *,
    from_zero: bool,
) -> None:
    """sum += factors[0] first + factors[1] second; `from_zero`: whatever was there is not read.

    Args:
        result: [n, D] contiguous, a 16-bit dtype, holding the sums' upper 16 bits whatever its dtype.
        low: [n, D] contiguous uint8.
        first, second: [n, D] contiguous float32, or None for no second.
    """
    count = result.numel()
    add_kernel[(cdiv(count, BLOCK),)](
        result.view(torch.int16),
        low,
        first,
        second,
        count,
        *factors,
        FROM_ZERO=from_zero,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def finish(result: torch.Tensor, low: torch.Tensor, scale: torch.Tensor) -> None:
    """Replace the sums in `result` by scale times them, rounded to its dtype; `scale` is one float32."""
    count = result.numel()
    finish_kernel[(cdiv(count, BLOCK),)](
        result.view(torch.int16),
        low,
        scale,
        result,
        count,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def write(
    result: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None,
    factors: tuple[float, float],
    scale: torch.Tensor,
) -> None:
    """result = scale (factors[0] first + factors[1] second), rounded once to its dtype; shapes as in `add`."""
    count = result.numel()
    write_kernel[(cdiv(count, BLOCK),)](
        result,
        first,
        second,
        scale,
        count,
        *factors,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
