"""Sums and differences of image and text vectors in float16, a power of two for each item taken out.

With u = x + y and v = x - y,

    x_i x_j + y_i y_j = (u_i u_j + v_i v_j) / 2        x_i y_j + y_i x_j = (u_i u_j - v_i v_j) / 2

so that three products of a pair of blocks, u u, v v and x y, give what four do. u and v of bfloat16 vectors are no
bfloat16 numbers: they are rounded to float16, whose spacing is an eighth of those vectors' own. Scaled so that an
item's largest |x| + |y| lies between 2^14 and 2^15, they neither overflow nor lose bits of any value above 2^-28 of it.

With u' the rounded u, u'_i u'_j exceeds u_i u_j by about d_i u_j + u_i d_j, d = u' - u. Half of what u'_i u'_i and
u'_j u'_j exceed is taken off: what is left, (d_i - d_j) (u_j - u_i), is nothing for equal items, so that those share a
target as they should, and little for items that are nearly equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sda_fast.kernels.configs import cdiv, next_power_of_2
from sda_fast.kernels.launching import kernel

LARGEST_EXPONENT = tl.constexpr(14)
# below, the scale's reciprocal would overflow
SMALLEST_EXPONENT = tl.constexpr(-100)
BLOCK_D, NUM_WARPS = 1024, 4


@triton.jit
def rounded(values, inverse):
    return (values * inverse).to(tl.float16)


@triton.jit
def excess(values, scale, inverse):
    """By how much the squares of the rounded values exceed those of the values."""
    others = rounded(values, inverse).to(tl.float32) * scale
    return (others - values) * (others + values)


@kernel
def described_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    x_ptrs = x_ptr + item * stride_x_item
    y_ptrs = y_ptr + item * stride_y_item
    largest = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        dimensions = first + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = dimensions < D
        x = tl.load(x_ptrs + dimensions * stride_x_dimension, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptrs + dimensions * stride_y_dimension, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x) + tl.abs(y))
    bits = tl.max(largest, 0).to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 0xFF) - 127, SMALLEST_EXPONENT) - LARGEST_EXPONENT
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    of_sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    of_differences = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        dimensions = first + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = dimensions < D
        x = tl.load(x_ptrs + dimensions * stride_x_dimension, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptrs + dimensions * stride_y_dimension, mask=mask, other=0.0).to(tl.float32)
        of_sums += excess(x + y, scale, inverse)
        of_differences += excess(x - y, scale, inverse)
    # half of the products' halves
    sums = 0.25 * tl.sum(of_sums, 0)
    differences = 0.25 * tl.sum(of_differences, 0)
    out_ptrs = out_ptr + 3 * item
    tl.store(out_ptrs, scale)
    tl.store(out_ptrs + 1, sums + differences)
    tl.store(out_ptrs + 2, sums - differences)


@kernel
def halves_kernel(
    x_ptr,
    y_ptr,
    described_ptr,
    sums_ptr,
    differences_ptr,
    first_item,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    BLOCK_D: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)
    item = first_item + local
    dimensions = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    mask = dimensions < D
    x = tl.load(x_ptr + item * stride_x_item + dimensions * stride_x_dimension, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + item * stride_y_item + dimensions * stride_y_dimension, mask=mask, other=0.0).to(tl.float32)
    bits = tl.load(described_ptr + 3 * item).to(tl.int32, bitcast=True)
    # of a power of two the reciprocal's exponent is the negative one
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    offsets = local * D + dimensions
    tl.store(sums_ptr + offsets, rounded(x + y, inverse), mask=mask)
    tl.store(differences_ptr + offsets, rounded(x - y, inverse), mask=mask)


def described(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B, 3] float32 for x, y [B, D], any strides: what `write_halves` takes out, and what is to be taken off.

    The power of two; and half of what an item's product with itself, formed of its halves, exceeds x x + y y by, and
    x y + y x.
    """
    items, dimensions = x.shape
    out = x.new_empty(items, 3, dtype=torch.float32)
    described_kernel[(items,)](
        x,
        y,
        out,
        dimensions,
        *x.stride(),
        *y.stride(),
        BLOCK_D=min(BLOCK_D, next_power_of_2(dimensions)),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


def write_halves(
    x: torch.Tensor,
    y: torch.Tensor,
    items: torch.Tensor,
    span: tuple[int, int],
    sums: torch.Tensor,
    differences: torch.Tensor,
) -> None:
    """Write x + y and x - y of the items in `span` over their scales.

    Args:
        x, y: [B, D], any strides.
        items: [B, 3], from `described`.
        sums, differences: [n, D] contiguous float16.
    """
    dimensions = x.shape[1]
    block = min(BLOCK_D, next_power_of_2(dimensions))
    halves_kernel[(span[1] - span[0], cdiv(dimensions, block))](
        x,
        y,
        items,
        sums,
        differences,
        span[0],
        dimensions,
        *x.stride(),
        *y.stride(),
        BLOCK_D=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
