"""Dropout decided in registers: Philox4x32 with 7 rounds, keyed by (seed, element index), nothing stored.

For element (row, col) of an [M, K] matrix the counter is row * ceil(K / 8) + col // 8 and the lane is col % 8; one call
yields four 32-bit words, that is eight 16-bit samples, one for each of eight neighbouring columns. An element is kept
if its sample is at least round(p * 65536). The PyTorch path of the library follows the same rule.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, counter_low, counter_high):
    """The four words of Philox4x32-7 for counter (low, high, 0, 0); one 32 x 32 -> 64-bit product gives both halves."""
    key = seed.to(tl.uint64)
    key0 = (key & 0xFFFFFFFF).to(tl.uint32)
    key1 = (key >> 32).to(tl.uint32)
    word0, word1 = counter_low, counter_high
    word2, word3 = counter_low * 0, counter_low * 0
    for _ in tl.static_range(7):
        product0 = word0.to(tl.uint64) * 0xD2511F53
        product1 = word2.to(tl.uint64) * 0xCD9E8D57
        word0 = (product1 >> 32).to(tl.uint32) ^ word1 ^ key0
        word1 = product1.to(tl.uint32)
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1
        word3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return word0, word1, word2, word3


@triton.jit
def keep_tile(seed, rows, first_column, column_groups, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of a [BLOCK_M, BLOCK_K] tile survive dropout.

    `first_column` is a multiple of 8, `column_groups` is ceil(K / 8), `rows` holds BLOCK_M row indices, `threshold` is
    from 1 to 65536.
    """
    group = first_column // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows.to(tl.int64)[:, None] * column_groups + group[None, :]
    word0, word1, word2, word3 = philox_words(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32))
    # The last two axes number the words 0..3, and the halves joined after them the samples 0..7. A sample is compared
    # in the upper half of a word, which spares the upper ones a shift; 65536 << 16 wraps to 0, and 0 - 1 is the top.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    samples = tl.join(words << 16, words)
    last_dropped = (tl.cast(threshold, tl.uint32) << 16) - 1
    return tl.reshape(samples > last_dropped, (BLOCK_M, BLOCK_K))


def dropout_threshold(dropout_p: float) -> int:
    """The sample below which an element is dropped; dropping has probability threshold / 65536 exactly."""
    return round(dropout_p * 65536)


def dropout_scale(dropout_p: float) -> float:
    """The factor of a kept element, 1 / (1 - threshold / 65536); 0 where everything is dropped."""
    threshold = dropout_threshold(dropout_p)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0
