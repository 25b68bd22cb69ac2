"""Layers that share x in one launch: their blocks of columns follow each other, a block finds its layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import triton
import triton.language as tl

LAYERS_PER_LAUNCH = 3
Value = TypeVar("Value")


@triton.jit
def layer_of_block(block, first_1, first_2, LAYERS: tl.constexpr):
    """The layer of a block, for layers 1 and 2 that begin with these blocks."""
    if LAYERS == 1:
        return 0
    elif LAYERS == 2:
        return (block >= first_1).to(tl.int32)
    else:
        return (block >= first_1).to(tl.int32) + (block >= first_2).to(tl.int32)


@triton.jit
def pointer_of(layer, first, second, third, LAYERS: tl.constexpr):
    """The pointer that belongs to a layer."""
    pointer = first
    if LAYERS > 1:  # noqa: SIM102 - the outer condition is the compiler's, and decides whether there is a second one
        if layer == 1:
            pointer = second
    if LAYERS > 2:  # noqa: SIM102
        if layer == 2:
            pointer = third
    return pointer


@triton.jit
def number_of(layer, first, second, third, LAYERS: tl.constexpr):
    """The number that belongs to a layer."""
    if LAYERS == 1:
        return first
    elif LAYERS == 2:
        return tl.where(layer == 1, second, first)
    else:
        return tl.where(layer == 1, second, tl.where(layer == 2, third, first))


def filled(values: Sequence[Value], absent: Value) -> list[Value]:
    """One value for each layer that a kernel has arguments for."""
    return [*values, *[absent] * (LAYERS_PER_LAUNCH - len(values))]
