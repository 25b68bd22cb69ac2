"""Dropout decided by Philox4x32-7 from (seed, element index): the same mask in PyTorch and in every kernel.

For element (row, col) of an [M, K] matrix, counter = row * ceil(K / 8) + col // 8 and key = seed; the four output words
hold eight 16-bit samples, and column col takes sample col % 8. The element is kept iff
sample >= round(p * 65536). Kept values are multiplied by 1 / (1 - round(p * 65536) / 65536).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
WORD = 0xFFFFFFFF
# Counters worked on at once: few enough for the second-level cache, many enough to hide the cost of a call.
COUNTERS_PER_CHUNK = 65536
# Multiplying eight bytes that are 0 or 1 by this number collects them as bits in the top byte.
GATHER_BITS = 0x0102040810204080


def dropout_threshold(dropout: float) -> int:
    """The 16-bit sample below which an element is dropped."""
    return round(dropout * 65536)


def dropout_scale(dropout: float) -> float:
    """The factor of a kept element; 0 where everything is dropped."""
    threshold = dropout_threshold(dropout)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def philox_words(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-7 written down plainly: the version that everything else is compared with.

    Args:
        counters: [n] int64, not negative.
        seed: 64-bit key.
    Returns:
        [n, 4] int64, each entry one 32-bit word.
    """
    key_0, key_1 = seed & WORD, (seed >> 32) & WORD
    c0, c1 = counters & WORD, (counters >> 32) & WORD
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & WORD) ^ c1 ^ key_0,
            product_1 & WORD,
            ((product_0 >> 32) & WORD) ^ c3 ^ key_1,
            product_0 & WORD,
        )
        key_0, key_1 = (key_0 + WEYL_0) & WORD, (key_1 + WEYL_1) & WORD
    return torch.stack((c0, c1, c2, c3), dim=1)


def keep_mask(rows: int, columns: int, dropout: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Which elements of a [rows, columns] matrix survive dropout: bool [rows, columns], in plain PyTorch."""
    groups = -(-columns // 8)
    words = philox_words(torch.arange(rows * groups, device=device), seed)
    samples = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return (samples >= dropout_threshold(dropout)).view(rows, groups * 8)[:, :columns]


def keep_bits(rows: int, columns: int, dropout: float, seed: Tensor) -> Tensor:
    """`keep_mask` packed, computed chunk by chunk in place.

    Args:
        seed: one int64 element on the device to compute on.
    Returns:
        uint8 [rows, ceil(columns / 8)]; bit j of a byte is column 8 * byte + j.
    """
    groups = -(-columns // 8)
    counters = rows * groups
    bits = torch.empty(counters, dtype=torch.uint8, device=seed.device)
    threshold = dropout_threshold(dropout)
    if threshold >= 65536:
        return bits.zero_().view(rows, groups)
    # Python integers are the faster operand on a CPU; elsewhere reading them would stop the stream.
    key = int(seed) if seed.device.type == "cpu" else seed.reshape(())
    chunk = min(counters, COUNTERS_PER_CHUNK)
    scratch = [torch.empty(chunk, dtype=torch.int64, device=seed.device) for _ in range(6)]
    words = torch.empty(chunk, 4, dtype=torch.int32, device=seed.device)
    for first in range(0, counters, COUNTERS_PER_CHUNK):
        n = min(COUNTERS_PER_CHUNK, counters - first)
        four = philox_in_place([buffer[:n] for buffer in scratch], first, key)
        for lane, word in enumerate(four):
            words[:n, lane].copy_(word)
        # The sign bit is flipped so that signed comparison orders the samples as unsigned.
        samples = words[:n].view(torch.int16).bitwise_xor_(-32768)
        kept = (samples >= threshold - 32768).view(torch.int64).view(n)
        bits[first : first + n] = kept.mul_(GATHER_BITS).bitwise_right_shift_(56).bitwise_and_(0xFF)
    return bits.view(rows, groups)


def philox_in_place(scratch: list[Tensor], first: int, seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of counters first, first + 1, ...; above bit 31 they hold rubbish.

    `scratch` is six int64 buffers of the wanted length. A value is cut to 32 bits only where a product needs it.
    """
    c0, c1, c2, c3, product_0, product_1 = scratch
    torch.arange(first, first + c0.numel(), out=c0)
    torch.bitwise_right_shift(c0, 32, out=c1)
    c0.bitwise_and_(WORD)
    c2.zero_()
    c3.zero_()
    for round_index in range(ROUNDS):
        key_0 = ((seed & WORD) + round_index * WEYL_0) & WORD
        key_1 = (((seed >> 32) & WORD) + round_index * WEYL_1) & WORD
        torch.mul(c0, MULTIPLIER_0, out=product_0)
        torch.mul(c2, MULTIPLIER_1, out=product_1)
        torch.bitwise_right_shift(product_1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(key_0).bitwise_and_(WORD)
        torch.bitwise_right_shift(product_0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(key_1).bitwise_and_(WORD)
        c1, product_1 = product_1, c1
        c3, product_0 = product_0, c3
    return c0, c1, c2, c3


@functools.cache
def byte_masks(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte, its eight bits as eight elements that are all ones or all zeros: [256, 8] of an integer dtype."""
    byte = torch.arange(256, device=device)[:, None]
    return ((byte >> torch.arange(8, device=device)) & 1).neg().to(dtype)


INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop(values: Tensor, bits: Tensor) -> Tensor:
    """`values` with the dropped elements set to zero and the kept ones as they are.

    Args:
        values: [M, K] floating point.
        bits: [M, ceil(K / 8)] from `keep_bits`.
    """
    rows, columns = values.shape
    integer = INTEGER_OF_SIZE[values.element_size()]
    masks = byte_masks(integer, values.device).index_select(0, bits.reshape(-1).int()).view(rows, bits.shape[1] * 8)
    return torch.bitwise_and(values.contiguous().view(integer), masks[:, :columns]).view(values.dtype)
