"""How a batch is cut where the matrix library forms the products: as one block, or into blocks of equal size.

One block. Up to some 9000 items the products of the whole batch fit: L and S, M being L's transpose. Backward then
completes the gradients of a strip of rows at a time, each by products that run over all items.

Several blocks. A larger one means fewer passes over gradients, and fewer launches. But a chip multiplies in waves of
one tile for each multiprocessor, and a wave that is not full takes as long as one that is: 5120 x 5120 products are 800
tiles of 128 x 256, 6.06 waves of 132, and take seven. So among the sizes that fit, the one with the least of such waves
and traffic is taken; a last block that is small and ragged is avoided.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

ALIGNMENT = 128
MOST_BLOCKS_KEPT = 4
TILE_ROWS, TILE_COLUMNS = 128, 256
# A last block is no smaller than one in so many parts of the others.
SMALLEST_SHARE = 8
# of an H200: products in 16 bits of the time that a byte takes
OPERATIONS_PER_BYTE = 190
SPLIT_DTYPES = (torch.float16, torch.bfloat16)
HALVES_DTYPE = torch.float16


class Batch(NamedTuple):
    """What decides how a batch is cut: its size, the vectors' dtype, which loss, and the chip."""

    items: int
    dimensions: int
    dtype: torch.dtype
    soft: bool
    multiprocessors: int
    halves: bool = False

    @property
    def tile_bytes(self) -> int:
        return gradient_dtype(self.dtype).itemsize

    @property
    def matrices(self) -> int:
        """Products of a pair of blocks, and tiles of gradients."""
        return 3 if self.soft else 2

    @property
    def is_split(self) -> bool:
        return self.dtype in SPLIT_DTYPES

    @property
    def uses_halves(self) -> bool:
        return self.halves and self.soft and self.dtype == torch.bfloat16


class Cut(NamedTuple):
    """Blocks of `block` items, `kept` (how many tiles' products, and elements of each) from the first sweep on.

    `strip` rows' gradients are completed at a time; 0: gradients arrive in pieces.
    """

    block: int
    kept: tuple[int, int]
    strip: int = 0


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradient tiles for vectors of `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def operand_bytes(batch: Batch) -> int:
    """For each item: X - Y, and vectors that are widened to the tiles' dtype."""
    if not batch.is_split:
        return 0
    widened = 2 if batch.dtype != gradient_dtype(batch.dtype) else 0
    return batch.dimensions * batch.tile_bytes * (widened + batch.soft)


def workspace_of(batch: Batch, block: int) -> int:
    """Bytes of a visit of `block` x `block` items: products, or pieces of the sums in their place; tiles, or halves."""
    products = 4 * max(batch.matrices * block, pieces(batch) * batch.dimensions)
    tiles = max(batch.tile_bytes * batch.matrices * block, halves_bytes(batch))
    return block * (products + tiles + operand_bytes(batch))


def pieces(batch: Batch) -> int:
    """Float32 products [block, D] that a visit adds to the sums, those for both sides' use included."""
    return batch.soft + 1 if batch.is_split else 0


def halves_bytes(batch: Batch) -> int:
    """For an item of a block: the sum and the difference of its vectors, in a row's place and in a column's."""
    return 4 * batch.dimensions * HALVES_DTYPE.itemsize if batch.uses_halves else 0


def bytes_of_one_block(batch: Batch, strip: int) -> int:
    """Of the kept products of the whole batch, and of the gradients of `strip` rows."""
    sums = batch.soft + 2 if batch.is_split else 2
    of_row = batch.tile_bytes * batch.matrices * batch.items + 4 * sums * batch.dimensions
    return 4 * whole_products(batch) + strip * of_row + batch.items * operand_bytes(batch)


def whole_products(batch: Batch) -> int:
    return (batch.matrices - 1) * batch.items**2


def block_of(batch: Batch, block_size: int, workspace_bytes: int) -> Cut:
    """The cut into blocks of a given size, keeping what the workspace has room for."""
    if block_size >= batch.items:
        return one_block(batch, workspace_bytes) or Cut(batch.items, (0, whole_products(batch)))
    spare = max(0, workspace_bytes - workspace_of(batch, block_size)) // 4
    size = batch.matrices * block_size**2
    return Cut(block_size, (min(count_of_tiles(batch.items, block_size), spare // size), size))


@lru_cache
def cut_within(workspace_bytes: int, batch: Batch, *, keeps: bool = True) -> Cut:
    """The best cut that fits; the smallest blocks are of `ALIGNMENT` items, whatever they take.

    Args:
        keeps: whether products outlive a sweep.
    """
    if keeps:
        whole = one_block(batch, workspace_bytes)
        if whole is not None:
            return whole
        for blocks in range(2, MOST_BLOCKS_KEPT + 1):
            cut = block_of(batch, aligned(-(-batch.items // blocks)), workspace_bytes)
            if cut.kept[0] == count_of_tiles(batch.items, cut.block):
                return cut
    sizes = [size for size in range(ALIGNMENT, batch.items, ALIGNMENT) if workspace_of(batch, size) <= workspace_bytes]
    if workspace_of(batch, batch.items) <= workspace_bytes:
        sizes.append(batch.items)
    fitting = sizes[len(sizes) // 2 :] or [min(batch.items, ALIGNMENT)]
    fitting = [size for size in fitting if not 0 < batch.items % size < size // SMALLEST_SHARE] or fitting
    block = min(fitting, key=lambda size: (cost(batch, size), -size))
    return block_of(batch, block, workspace_bytes) if keeps else Cut(block, (0, batch.matrices * block**2))


def one_block(batch: Batch, workspace_bytes: int) -> Cut | None:
    """The batch as one block with the cheapest strips that fit, if any do."""
    fitting = [
        strip for strip in strips(batch.items) if bytes_of_one_block(batch, min(strip, batch.items)) <= workspace_bytes
    ]
    if not fitting:
        return None
    strip = min(fitting, key=lambda size: (_strips_cost(batch, size), -size))
    return Cut(batch.items, (1, whole_products(batch)), min(strip, batch.items))


def strips(items: int) -> range:
    return range(ALIGNMENT, aligned(items) + 1, ALIGNMENT)


def _strips_cost(batch: Batch, strip: int) -> float:
    heights = [min(strip, batch.items - start) for start in range(0, batch.items, strip)]
    return sum(product_cost(batch, height, batch.dimensions, batch.items) for height in heights)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def count_of_tiles(items: int, block: int) -> int:
    """Pairs of blocks, each with itself too."""
    count = -(-items // block)
    return count * (count + 1) // 2


def waves(height: int, width: int, multiprocessors: int) -> int:
    """Rounds of one tile for each multiprocessor that a product [height, width] takes."""
    return -(-(-(-height // TILE_ROWS) * -(-width // TILE_COLUMNS)) // multiprocessors)


def product_cost(batch: Batch, height: int, width: int, inner: int) -> float:
    """Operations that the chip could have done in the time of a product."""
    tiles = waves(height, width, batch.multiprocessors) * batch.multiprocessors
    return 2.0 * tiles * TILE_ROWS * TILE_COLUMNS * inner


def cost(batch: Batch, block: int) -> float:
    """Of a step in blocks of `block`, nothing kept, in operations that the chip could have done in its time."""
    whole, last = divmod(batch.items, block)
    total = 0.0
    for number, height, width in _kinds_of_visits(whole, block, last):
        if number:
            total += number * _cost_of_visit(batch, height, width)
    return total


def _kinds_of_visits(whole: int, block: int, last: int) -> Iterator[tuple[float, int, int]]:
    """How many visits there are of each shape; those of a block with itself cost about half."""
    yield whole * (whole - 1) / 2 + whole / 2, block, block
    if last:
        yield whole, block, last
        yield 0.5, last, last


def _cost_of_visit(batch: Batch, height: int, width: int) -> float:
    D = batch.dimensions
    formed = 2 * 2 if not batch.soft else 3 + 2 + 3 if batch.uses_halves else 4 + 2 + 4
    products = formed * product_cost(batch, height, width, D)
    of_gradients = (3 if batch.is_split else 4) if batch.soft else 2
    for rows, inner in ((height, width), (width, height)):
        products += of_gradients * product_cost(batch, rows, D, inner) * (1 if batch.soft else 0.5)
    matrices = batch.matrices
    # products written and read, tiles written; halves; pieces of sums written, read and added
    traffic = 8 * formed * height * width + batch.tile_bytes * matrices * height * width
    traffic += (40 + 16 * batch.uses_halves) * D * (height + width)
    return products + OPERATIONS_PER_BYTE * traffic
