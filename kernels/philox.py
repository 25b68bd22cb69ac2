"""Dropout decided in registers: Philox4x32 with 7 rounds, keyed by (seed, element index), nothing stored.

For element (row, col) of an [M, K] matrix the counter is row * ceil(K / 8) + col // 8 and the lane is col % 8; one call
yields four 32-bit words, that is eight 16-bit samples, one for each of eight neighbouring columns. An element is kept
if its sample is at least round(p * 65536). The PyTorch path of the library follows the same rule.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, rows, first_column, column_groups, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of a [BLOCK_M, BLOCK_K] tile survive dropout.

    `first_column` is a multiple of 8, `column_groups` is ceil(K / 8), `rows` holds BLOCK_M row indices.
    """
    group = first_column // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows.to(tl.int64)[:, None] * column_groups + group[None, :]
    counter_low = (counter & 0xFFFFFFFF).to(tl.uint32)
    counter_high = (counter >> 32).to(tl.uint32)
    zero = counter_low * 0
    word0, word1, word2, word3 = tl.philox(seed, counter_low, counter_high, zero, zero, n_rounds=7)
    # The last two axes number the words 0..3, and the halves joined after them the samples 0..7.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    samples = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(samples, (BLOCK_M, BLOCK_K)).to(tl.int32) >= threshold


def dropout_threshold(dropout_p: float) -> int:
    """The sample below which an element is dropped; dropping has probability threshold / 65536 exactly."""
    return round(dropout_p * 65536)


def dropout_scale(dropout_p: float) -> float:
    """The factor of a kept element, 1 / (1 - threshold / 65536); 0 where everything is dropped."""
    threshold = dropout_threshold(dropout_p)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0
