"""How the Triton path of CMSA gets its products x_i y_j and x_i x_j + y_i y_j.

"library": the matrix library forms those of a block in memory and the kernels read them there. "in kernel": the kernels
form them themselves, tile by tile, and nothing goes through memory. "halves": as "library", with three products of a
pair of bfloat16 blocks in place of four (`kernels.cmsa_halves`); never chosen by itself: it was not timed, and equal
rows share a gradient unevenly once the loss is hundreds of nats (docs/cmsa.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

Products = Literal["in kernel", "library", "halves"]
THROUGH_MEMORY = ("library", "halves")
# From this many dimensions on the library's rate outweighs the products' way through memory. Not measured: a guess.
LIBRARY_DIMENSIONS = 256
# From so many items on S of items against themselves is formed in four strips in place of two.
LARGE_BLOCK = 4096

_forced: ContextVar[Products | None] = ContextVar("sda_fast_cmsa_products", default=None)


@contextmanager
def forced_products(way: Products) -> Iterator[None]:
    """Losses computed within this block (and their backward passes, wherever) go one way; for tests and measurements.

    Raises:
        ValueError: `way` is none of the ways.
    """
    if way not in get_args(Products):
        raise ValueError(f"the products must be one of {get_args(Products)}, got {way!r}")
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


def way_of_products(embeddings: Tensor) -> Products:
    """The way to take for vectors [B, D]."""
    return _forced.get() or ("library" if embeddings.shape[1] >= LIBRARY_DIMENSIONS else "in kernel")


def add_product(total: Tensor, left: Tensor, right: Tensor, *, beta: int = 1, alpha: float = 1.0) -> None:
    """total = beta total + alpha left @ right in float32, whatever the factors' dtype; beta = 0 does not read `total`.

    Args:
        total: [m, n] float32, rows at any distance.
        left, right: [m, k] and [k, n], one dtype.
    """
    library_product(total, left, right, beta, alpha)


def library_product(total: Tensor, left: Tensor, right: Tensor, beta: int, alpha: float) -> None:
    """`add_product` by one call of the matrix library; the planner puts a count in its place."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    elif not left.is_cuda:
        torch.addmm(total, left.float(), right.float(), beta=beta, alpha=alpha, out=total)
    elif beta == 0 and alpha == 1:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)


def side_by_side(x: Tensor, y: Tensor) -> Tensor | None:
    """[B, 2D] view of [x_i, y_i] if each such pair is one piece of memory, as in pairs[0::2] and pairs[1::2]."""
    items, dimensions = x.shape
    if x.stride() != y.stride() or x.stride(1) != 1 or x.stride(0) < 2 * dimensions:
        return None
    # not by addresses, which fake tensors do not have
    one_storage = x.untyped_storage()._cdata == y.untyped_storage()._cdata
    if not one_storage or y.storage_offset() != x.storage_offset() + dimensions:
        return None
    return x.as_strided((items, 2 * dimensions), (x.stride(0), 1))


def write_teacher(out: Tensor, sides: tuple[Tensor, ...], rows: slice, columns: slice) -> None:
    """out = the sum over `sides` of side[rows] @ side[columns]^T."""
    for beta, side in enumerate(sides):
        add_product(out, side[rows], side[columns].T, beta=beta)


def write_symmetric_teacher(out: Tensor, sides: tuple[Tensor, ...]) -> None:
    """`write_teacher` of all items against themselves: three quarters of it, of many five eighths, and a copy."""
    items = len(out)
    strips = 4 if items >= LARGE_BLOCK else 2
    strip = max(64, items // strips // 64 * 64)
    starts = [*range(0, items, strip)][:strips]
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else items
        write_teacher(out[start:stop, start:], sides, slice(start, stop), slice(start, items))
        if stop < items:
            out[stop:, start:stop].copy_(out[start:stop, stop:].T)
