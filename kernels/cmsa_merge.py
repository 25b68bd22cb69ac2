"""The parts that the CMSA kernels leave for an item, merged into its running statistics in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sda_fast.kernels.cmsa_device import BITS_PER_NAT
from sda_fast.kernels.configs import cdiv
from sda_fast.kernels.launching import kernel

BLOCK_PARTS, BLOCK_ITEMS, NUM_WARPS = 16, 32, 4


@triton.jit
def merge_sums(ptrs, stride, mask, largest, sums, scale):
    """Add sums relative to `largest` to a line of maxima and the one of sums after it.

    Returns what the sums that were there and the new ones had to be multiplied by.
    """
    before = tl.load(ptrs, mask=mask, other=0.0)
    overall = tl.maximum(before, largest)
    kept = tl.exp2((before - overall) * scale)
    added = tl.exp2((largest - overall) * scale)
    tl.store(ptrs, overall, mask=mask)
    tl.store(ptrs + stride, tl.load(ptrs + stride, mask=mask, other=0.0) * kept + sums * added, mask=mask)
    return kept, added


@triton.jit
def part_weights(largest_ptrs, sums_ptrs, mask, overall, scale):
    """Sums of exponentials, relative to the largest score of all parts."""
    largest = tl.load(largest_ptrs, mask=mask, other=float("-inf")).to(tl.float64)
    sums = tl.load(sums_ptrs, mask=mask, other=0.0).to(tl.float64)
    return sums * tl.exp2((largest - overall[None, :]) * scale)


@kernel
def merge_statistics_kernel(
    parts_ptr,
    temperature_ptr,
    running_ptr,
    parts_count,
    length,
    stride_running,
    SOFT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    items = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    item_mask = items < length
    temperature = tl.load(temperature_ptr).to(tl.float64)
    logits_scale = BITS_PER_NAT / temperature
    teacher_scale = temperature * (0.5 * BITS_PER_NAT)

    own_largest = tl.full((BLOCK_ITEMS,), float("-inf"), tl.float32)
    other_largest = tl.full((BLOCK_ITEMS,), float("-inf"), tl.float32)
    teacher_largest = tl.full((BLOCK_ITEMS,), float("-inf"), tl.float32)
    for first in range(0, parts_count, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        mask = (parts < parts_count)[:, None] & item_mask[None, :]
        ptrs = parts_ptr + parts.to(tl.int64)[:, None] * 8 * length + items[None, :]
        own_largest = tl.maximum(own_largest, tl.max(tl.load(ptrs, mask=mask, other=float("-inf")), 0))
        other = tl.load(ptrs + 2 * length, mask=mask, other=float("-inf"))
        other_largest = tl.maximum(other_largest, tl.max(other, 0))
        if SOFT:
            teacher = tl.load(ptrs + 4 * length, mask=mask, other=float("-inf"))
            teacher_largest = tl.maximum(teacher_largest, tl.max(teacher, 0))

    own_overall = own_largest.to(tl.float64)
    other_overall = other_largest.to(tl.float64)
    teacher_overall = teacher_largest.to(tl.float64)
    own_sums = tl.zeros((BLOCK_ITEMS,), tl.float64)
    other_sums = tl.zeros((BLOCK_ITEMS,), tl.float64)
    teacher_sums = tl.zeros((BLOCK_ITEMS,), tl.float64)
    target_logits = tl.zeros((BLOCK_ITEMS,), tl.float64)
    for first in range(0, parts_count, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        mask = (parts < parts_count)[:, None] & item_mask[None, :]
        ptrs = parts_ptr + parts.to(tl.int64)[:, None] * 8 * length + items[None, :]
        own_sums += tl.sum(part_weights(ptrs, ptrs + length, mask, own_overall, logits_scale), 0)
        other_sums += tl.sum(part_weights(ptrs + 2 * length, ptrs + 3 * length, mask, other_overall, logits_scale), 0)
        logits = tl.load(ptrs + 6 * length, mask=mask, other=0.0).to(tl.float64)
        if SOFT:
            weights = part_weights(ptrs + 4 * length, ptrs + 5 * length, mask, teacher_overall, teacher_scale)
            teacher_sums += tl.sum(weights, 0)
            logits += tl.load(ptrs + 7 * length, mask=mask, other=0.0).to(tl.float64)
            target_logits += tl.sum(weights * logits, 0)
        else:
            target_logits += tl.sum(logits, 0)

    ptrs = running_ptr + items
    merge_sums(ptrs, stride_running, item_mask, own_overall, own_sums, logits_scale)
    merge_sums(ptrs + 2 * stride_running, stride_running, item_mask, other_overall, other_sums, logits_scale)
    logits_ptrs = ptrs + 6 * stride_running
    before = tl.load(logits_ptrs, mask=item_mask, other=0.0)
    if SOFT:
        teacher_ptrs = ptrs + 4 * stride_running
        kept, added = merge_sums(teacher_ptrs, stride_running, item_mask, teacher_overall, teacher_sums, teacher_scale)
        tl.store(logits_ptrs, before * kept + target_logits * added, mask=item_mask)
    else:
        tl.store(logits_ptrs, before + target_logits, mask=item_mask)


@kernel
def add_target_sums_kernel(
    parts_ptr,
    running_ptr,
    parts_count,
    length,
    stride_running,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    items = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    item_mask = items < length
    received = tl.zeros((BLOCK_ITEMS,), tl.float64)
    given = tl.zeros((BLOCK_ITEMS,), tl.float64)
    high = tl.zeros((BLOCK_ITEMS,), tl.float64)
    low = tl.zeros((BLOCK_ITEMS,), tl.float64)
    for first in range(0, parts_count, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        mask = (parts < parts_count)[:, None] & item_mask[None, :]
        ptrs = parts_ptr + parts.to(tl.int64)[:, None] * 4 * length + items[None, :]
        received += tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float64), 0)
        given_part = tl.load(ptrs + length, mask=mask, other=0.0).to(tl.float64)
        given += tl.sum(given_part, 0)
        high += tl.sum(given_part * tl.load(ptrs + 2 * length, mask=mask, other=0.0), 0)
        low += tl.sum(tl.load(ptrs + 3 * length, mask=mask, other=0.0).to(tl.float64), 0)
    ptrs = running_ptr + items
    tl.store(ptrs, tl.load(ptrs, mask=item_mask, other=0.0) + received, mask=item_mask)
    ptrs += stride_running
    tl.store(ptrs, tl.load(ptrs, mask=item_mask, other=0.0) + given, mask=item_mask)
    ptrs += stride_running
    tl.store(ptrs, tl.load(ptrs, mask=item_mask, other=0.0) + high, mask=item_mask)
    ptrs += stride_running
    tl.store(ptrs, tl.load(ptrs, mask=item_mask, other=0.0) + low, mask=item_mask)


def add_target_sums(running: torch.Tensor, parts: torch.Tensor) -> None:
    """Add the parts of `cmsa.target_sums` to some items' sums, in place and in a fixed order.

    Args:
        running: [4, n] float64, items adjacent: sum_j T_ji, sum_j T_ij, and sum_j T_ij c_j in two parts: of the parts'
            references, and of what c_j exceeds them by.
        parts: [parts, 4, n] contiguous float32.
    """
    length = parts.shape[2]
    add_target_sums_kernel[(cdiv(length, BLOCK_ITEMS),)](
        parts,
        running,
        len(parts),
        length,
        running.stride(0),
        BLOCK_PARTS=BLOCK_PARTS,
        BLOCK_ITEMS=BLOCK_ITEMS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def merge_statistics(running: torch.Tensor, parts: torch.Tensor, temperature: torch.Tensor, *, soft: bool) -> None:
    """Add the parts of `cmsa.statistics` to some items' running statistics, in place and in a fixed order.

    Args:
        running: [7, n] float64, items adjacent: the largest product and the sum of exponentials relative to it of L's
            row, L's column and S's row; and the sum of S's exponentials times the target logits (hard: of the latter).
        parts: [parts, 8, n] contiguous float32.
        temperature: one float32 on the same device.
    """
    length = parts.shape[2]
    merge_statistics_kernel[(cdiv(length, BLOCK_ITEMS),)](
        parts,
        temperature,
        running,
        len(parts),
        length,
        running.stride(0),
        SOFT=soft,
        BLOCK_PARTS=BLOCK_PARTS,
        BLOCK_ITEMS=BLOCK_ITEMS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
