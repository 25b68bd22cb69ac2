"""CMSA's tiles where the matrix library forms every product and the Triton kernels read and write tiles in memory.

A visit is a block of items against a block of items. Operations, in units of B^2 D, against the floor of 12 that
bench/cmsa_cases.py counts (4 for L and half of the symmetric S, 8 for four gradient products):

    first sweep     L 2, S 2                                     4
    second sweep    S, for q and t need every s and c            2    none where products are kept
    backward        L and S anew                                 4    none where products are kept
                    gradient products of 16-bit vectors          6    of float32 vectors: 8

so 16 for 16-bit vectors, 10 where the products of all tiles fit the workspace; 18 and 12 in float32. A block against
itself has L^T for M, and its S costs three halves of what the pairs in it would; with n blocks every S is 2 + 1 / n.
The floor holds no recomputation: to keep S alone in float32 would take 8 GB at B = 65536.

Six gradient products: with A = tau/2 (dS + dS^T), dX = A X + dL Y and dY = dL^T X + A Y share A (X - Y),

    dX = A (X - Y) + (dL + A) Y        dY = (dL^T + A) X - A (X - Y)

X - Y is rounded to the tiles' dtype. Beside the roundings of bfloat16 tiles and results this makes a gradient's error 1
(vectors of unlike direction) to 1.3 times as large (alike, tau = 3); float32 results keep the four products.

Every pair of blocks is visited once, so the columns' gradients arrive in pieces. Float32 sums of them would take 8 B D
bytes beyond 16-bit results (1.8 GiB at B = 65536, D = 3584); completing one block of rows at a time needs none, but
visits both orders of each pair in backward, 4 more. So a sum's upper half lies in the result itself and a third byte
beside it (`split_sums`): 2 B D bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.kernels import split_sums
from sda_fast.ops.cmsa_products import add_product, side_by_side, write_symmetric_teacher, write_teacher
from sda_fast.ops.cmsa_sums import GradientSums
from sda_fast.ops.cmsa_tiles import Form, Span, TileGradients, kept_tile
from sda_fast.ops.cmsa_triton import TritonTiles, gradient_dtype

ALIGNMENT = 128
MOST_BLOCKS_KEPT = 8
PIECES = 2
SPLIT_DTYPES = (torch.float16, torch.bfloat16)


def workspace_of(block: int, dimensions: int, dtype: torch.dtype) -> int:
    """Bytes of a visit of `block` x `block` items: products, or pieces of the sums in their place; tiles; X - Y."""
    tile_dtype = gradient_dtype(dtype)
    scratch, differences = 3 * block, 0
    if dtype in SPLIT_DTYPES:
        scratch, differences = max(scratch, PIECES * dimensions), tile_dtype.itemsize * dimensions
    return block * (4 * scratch + 3 * tile_dtype.itemsize * block + differences)


def block_within(workspace_bytes: int, items: int, dimensions: int, dtype: torch.dtype, soft: bool) -> int:
    """The edge of a visit: the largest with which every tile's products can be kept too, or else that fits at all."""
    for blocks in range(1, MOST_BLOCKS_KEPT + 1):
        block = _aligned(items, blocks)
        if kept_shape(workspace_bytes, items, dimensions, dtype, block, soft)[0] == _tiles(items, block):
            return block
    blocks = 1
    while workspace_of(block := _aligned(items, blocks), dimensions, dtype) > workspace_bytes and block > ALIGNMENT:
        blocks += 1
    return block


def kept_shape(
    workspace_bytes: int, items: int, dimensions: int, dtype: torch.dtype, block_size: int, soft: bool
) -> tuple[int, int]:
    """How many tiles' products fit into the workspace beside a visit's memory, and the size of each."""
    block = min(block_size, items)
    size = (3 if soft else 2) * block**2
    spare = (workspace_bytes - workspace_of(block, dimensions, dtype)) // 4
    return max(0, min(_tiles(items, block), spare // size)), size


def _tiles(items: int, block: int) -> int:
    """Pairs of blocks, each with itself too."""
    count = -(-items // block)
    return count * (count + 1) // 2


def _aligned(items: int, blocks: int) -> int:
    """The size of equal blocks, a multiple of `ALIGNMENT` if there are several."""
    size = -(-items // blocks)
    return size if blocks == 1 else -(-size // ALIGNMENT) * ALIGNMENT


class LibraryTiles(TritonTiles):
    """Visits of at most `block_size` x `block_size` items; `kept` as in `TorchTiles`."""

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, kept: Tensor | None = None
    ) -> None:
        super().__init__(x, y, temperature, form, block_size, 0)
        self.split = x.dtype in SPLIT_DTYPES
        self.teacher_added = self.split
        self._kept = kept
        self._memory: Tensor | None = None
        pairs = side_by_side(x, y)
        self._sides = (x, y) if pairs is None else (pairs,)

    def columns_per_visit(self) -> int:
        return self.block_size

    def scratch(self, matrices: int, height: int, width: int) -> Tensor:
        """[matrices, height, width] float32, the same memory at every call."""
        if self._memory is None:
            block = min(self.block_size, len(self.x))
            longest = max(3 * block, PIECES * self.x.shape[1]) if self.split else 3 * block
            self._memory = torch.empty(block * longest, dtype=torch.float32, device=self.x.device)
        return self._memory[: matrices * height * width].view(matrices, height, width)

    def products(self, rows: Span, columns: Span, *, logits: bool = True, first_time: bool = False) -> Tensor:
        """[3 or 2, rows, columns] float32: L, M and S, bare products; L and M are left out unless asked for."""
        matrices = 3 if self.form.soft else 2
        kept = None
        if self._kept is not None:
            kept = kept_tile(self._kept, rows, columns, len(self.x), self.block_size, matrices)
            if kept is not None and not first_time:
                return kept
        out = self.scratch(matrices, rows[1] - rows[0], columns[1] - columns[0]) if kept is None else kept
        own, across = slice(*rows), slice(*columns)
        if logits:
            add_product(out[0], self.x[own], self.y[across].T, beta=0)
            if rows == columns:
                out[1].copy_(out[0].T)
            else:
                add_product(out[1], self.y[own], self.x[across].T, beta=0)
        if self.form.soft and rows == columns:
            write_symmetric_teacher(out[2], self._sides, rows[0])
        elif self.form.soft:
            write_teacher(out[2], self._sides, own, across)
        return out

    def sums(self, needs_x: bool, needs_y: bool) -> GradientSums:
        return SplitSums(self, needs_x, needs_y) if self.split else super().sums(needs_x, needs_y)


class SplitSums:
    """Sums of a whole batch's gradients in the results' memory and a byte beside each (`kernels.split_sums`).

    The pieces that a visit adds lie where its products were.
    """

    def __init__(self, tiles: LibraryTiles, needs_x: bool, needs_y: bool) -> None:
        self._tiles = tiles
        self._results, self._low = (
            [
                torch.empty(tiles.x.shape, dtype=dtype, device=tiles.x.device) if needed else None
                for needed in (needs_x, needs_y)
            ]
            for dtype in (tiles.x.dtype, torch.uint8)
        )
        self._begun: set[Span] = set()

    def add(self, tile: TileGradients, rows: Span, columns: Span, two_sided: bool) -> None:
        self._add(tile, rows, columns)
        if two_sided:
            self._add(tile.transposed(), columns, rows)

    def _add(self, tile: TileGradients, own: Span, other: Span) -> None:
        """Add a tile's products with the vectors of `other` to the sums of the items in `own`."""
        tiles = self._tiles
        x, y = tiles.operand(tiles.x, other), tiles.operand(tiles.y, other)
        shared, piece = tiles.scratch(PIECES, own[1] - own[0], tiles.x.shape[1])
        if tile.teacher is not None:
            add_product(shared, tile.teacher, x - y, beta=0)
        sides = zip(self._results, self._low, (tile.logits, tile.transposed_logits), (y, x), (1.0, -1.0), strict=True)
        for result, low, logits, across, sign in sides:
            if result is None or low is None:
                continue
            add_product(piece, logits, across, beta=0)
            split_sums.add(
                result[slice(*own)],
                low[slice(*own)],
                piece,
                None if tile.teacher is None else shared,
                (1.0, sign),
                from_zero=own not in self._begun,
            )
        self._begun.add(own)

    def rounded(self, scale: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """The finished gradients: scale times the sums, rounded once more."""
        for result, low in zip(self._results, self._low, strict=True):
            if result is not None and low is not None:
                split_sums.finish(result, low, scale)
        return self._results
