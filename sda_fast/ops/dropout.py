"""Dropout decided by Philox4x32-7 from (seed, element index): the same mask in PyTorch and in every kernel.

For element (row, col) of an [M, K] matrix, counter = row * ceil(K / 8) + col // 8 and key = seed; the four output words
hold eight 16-bit samples, and column col takes sample col % 8. The element is kept iff
sample >= round(p * 65536). Kept values are multiplied by 1 / (1 - round(p * 65536) / 65536).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sda_fast.ops import host_library

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
WORD = 0xFFFFFFFF
# Counters worked on at once, a power of two: few enough for the second-level cache, many enough to hide a call's cost.
COUNTERS_PER_CHUNK = 16384
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
    """`keep_mask` packed: on a CPU by the host library or NumPy, elsewhere by PyTorch, chunk by chunk.

    Args:
        seed: one int64 element on the device to compute on.
    Returns:
        uint8 [rows, ceil(columns / 8)]; bit j of a byte is column 8 * byte + j.
    """
    groups = -(-columns // 8)
    bits = torch.empty(rows * groups, dtype=torch.uint8, device=seed.device)
    threshold = dropout_threshold(dropout)
    if threshold >= 65536:
        return bits.zero_().view(rows, groups)
    # NumPy's calls and integer loops cost half of PyTorch's on a CPU; elsewhere reading the seed would stop the stream.
    on_cpu = seed.device.type == "cpu"
    if on_cpu and host_library.is_available():
        host_library.keep_bits(bits, threshold, int(seed))
        return bits.view(rows, groups)
    key: Any = int(seed) if on_cpu else seed.reshape(())
    for first in range(0, bits.numel(), COUNTERS_PER_CHUNK):
        chunk = bits[first : first + COUNTERS_PER_CHUNK]
        if on_cpu:
            chunk.numpy()[:] = packed_by_numpy(first, chunk.numel(), threshold, key)
        else:
            chunk.copy_(packed_by_pytorch(first, chunk.numel(), threshold, key))
    return bits.view(rows, groups)


def packed_by_numpy(first: int, count: int, threshold: int, seed: int) -> np.ndarray:
    """The packed mask of counters first to first + count - 1, whose upper words are alike."""
    low = first & WORD
    words = np.empty((count, 4), np.uint32)
    for lane, word in enumerate(philox_rounds(np.arange(low, low + count, dtype=np.uint64), first >> 32, 0, 0, seed)):
        words[:, lane] = word
    return np.packbits(words.view(np.uint16) >= threshold, bitorder="little")


def packed_by_pytorch(first: int, count: int, threshold: int, seed: Tensor) -> Tensor:
    """`packed_by_numpy` on the device of the seed."""
    c0 = torch.arange(first, first + count, device=seed.device)
    c1, c2, c3 = c0 >> 32, torch.zeros_like(c0), torch.zeros_like(c0)
    words = torch.stack(philox_rounds(c0.bitwise_and_(WORD), c1, c2, c3, seed), dim=1).to(torch.int32)
    # The sign bit is flipped so that signed comparison orders the samples as unsigned.
    kept = words.view(torch.int16).bitwise_xor_(-32768) >= threshold - 32768
    return kept.view(torch.int64).view(count).mul_(GATHER_BITS).bitwise_right_shift_(56).bitwise_and_(0xFF)


def philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any) -> tuple[Any, Any, Any, Any]:
    """The four output words from the four input words, in 64-bit arrays of NumPy or PyTorch that it overwrites.

    With NumPy a word that is the same everywhere may be an integer, which makes the first rounds cheaper. Above bit 31
    the results hold rubbish: a value is cut to 32 bits only where a product needs it.
    """
    for round_index in range(ROUNDS):
        key_0 = ((seed & WORD) + round_index * WEYL_0) & WORD
        key_1 = (((seed >> 32) & WORD) + round_index * WEYL_1) & WORD
        c0 *= MULTIPLIER_0
        c2 *= MULTIPLIER_1
        next_0 = c2 >> 32
        next_0 ^= c1
        next_0 ^= key_0
        next_0 &= WORD
        next_2 = c0 >> 32
        next_2 ^= c3
        next_2 ^= key_1
        next_2 &= WORD
        c0, c1, c2, c3 = next_0, c2, next_2, c0
    return c0, c1, c2, c3


@functools.cache
def byte_masks(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte, its eight bits as eight elements that are all ones or all zeros: [256, 8] of an integer dtype."""
    byte = torch.arange(256, device=device)[:, None]
    return ((byte >> torch.arange(8, device=device)) & 1).neg().to(dtype)


INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def element_masks(bits: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`bits` from `keep_bits` as integers of the size of `dtype`, all ones where kept: [M, columns]."""
    masks = byte_masks(INTEGER_OF_SIZE[dtype.itemsize], bits.device).index_select(0, bits.reshape(-1).int())
    masks = masks.view(bits.shape[0], bits.shape[1] * 8)
    return masks if columns == masks.shape[1] else masks[:, :columns]


def masked(values: Tensor, masks: Tensor) -> Tensor:
    """`values` [M, K] with the dropped elements set to zero and the kept ones as they are; masks of `element_masks`."""
    return torch.bitwise_and(values.contiguous().view(masks.dtype), masks).view(values.dtype)


def dropping(bits: Tensor, columns: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What drops elements of matrices [M, columns] of `dtype` by the bits [M, ceil(columns / 8)] from `keep_bits`.

    The result has the dropped elements set to zero and the kept ones as they are.
    """
    if bits.device.type == "cpu" and host_library.is_available():
        return lambda values: host_library.drop(values, bits)
    masks = element_masks(bits, columns, dtype)
    return lambda values: masked(values, masks)


def drop(values: Tensor, bits: Tensor) -> Tensor:
    """`values` [M, K] with elements dropped by the bits [M, ceil(K / 8)] from `keep_bits`."""
    return dropping(bits, values.shape[1], values.dtype)(values)
