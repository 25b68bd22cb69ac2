"""Sums and differences of image and text vectors in float16, a power of two for each item taken out.

With u = x + y and v = x - y,

    x_i x_j + y_i y_j = (u_i u_j + v_i v_j) / 2        x_i y_j + y_i x_j = (u_i u_j - v_i v_j) / 2

so that three products of a pair of blocks, u u, v v and x y, give what four do. u and v of bfloat16 vectors are no
bfloat16 numbers: they are rounded to float16, whose spacing is an eighth of those vectors' own. Scaled so that an
item's largest |x| + |y| lies between 2^14 and 2^15, they neither overflow nor lose bits of any value above 2^-28 of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sda_fast.kernels.configs import next_power_of_2

LARGEST_EXPONENT = tl.constexpr(14)
# of a float32 exponent's 8 bits; below, the scale's reciprocal would overflow
SMALLEST_EXPONENT = tl.constexpr(-100)
BLOCK_D, NUM_WARPS = 1024, 4


@triton.jit
def halves_kernel(
    x_ptr,
    y_ptr,
    sums_ptr,
    differences_ptr,
    scales_ptr,
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
    tl.store(scales_ptr + item, scale)
    out = local * D
    for first in range(0, D, BLOCK_D):
        dimensions = first + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = dimensions < D
        x = tl.load(x_ptrs + dimensions * stride_x_dimension, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptrs + dimensions * stride_y_dimension, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums_ptr + out + dimensions, ((x + y) * inverse).to(tl.float16), mask=mask)
        tl.store(differences_ptr + out + dimensions, ((x - y) * inverse).to(tl.float16), mask=mask)


def write_halves(
    x: torch.Tensor,
    y: torch.Tensor,
    span: tuple[int, int],
    sums: torch.Tensor,
    differences: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Write x + y and x - y of the items in `span` over their scales, and the scales.

    Args:
        x, y: [B, D], any strides.
        sums, differences: [n, D] contiguous float16.
        scales: [B] float32, powers of two; those of other items stay.
    """
    dimensions = x.shape[1]
    halves_kernel[(span[1] - span[0],)](
        x,
        y,
        sums,
        differences,
        scales,
        span[0],
        dimensions,
        *x.stride(),
        *y.stride(),
        BLOCK_D=min(BLOCK_D, next_power_of_2(dimensions)),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
