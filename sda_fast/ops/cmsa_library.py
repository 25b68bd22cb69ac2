"""CMSA's tiles where the matrix library forms every product and the Triton kernels read and write tiles in memory.

A visit is a block of items against a block of items. Operations, in units of B^2 D, against the floor of 12 that
bench/cmsa_cases.py counts (4 for L and half of the symmetric S, 8 for four gradient products):

    first sweep     L 2, S 2; of bfloat16 vectors by halves      4, 3
    second sweep    S, for q and t need every s and c            2    none where products are kept
    backward        L and S anew                                 4, 3 none where products are kept
                    gradient products of 16-bit vectors          6    of float32 vectors: 8

so 14 for bfloat16 vectors, 10 where the products of all tiles fit the workspace; 18 and 12 in float32. A block against
itself has L^T for M, and its S costs three halves of what the pairs in it would; with n blocks every S is 2 + 1 / n.
The floor holds no recomputation: to keep S alone in float32 would take 8 GB at B = 65536.

By halves (`cmsa_halves`): L_ij, L_ji and S_ij of a pair of blocks come from three products in place of four. That
rounds x + y and x - y to float16, which for bfloat16 vectors costs a tenth or less of what rounding scores to bfloat16
does; for float16 vectors it would cost as much as rounding scores to float16, so they take four. A block against itself
takes x and y as they are.

Six gradient products: with A = tau/2 (dS + dS^T), dX = A X + dL Y and dY = dL^T X + A Y share A (X - Y),

    dX = A (X - Y) + (dL + A) Y        dY = (dL^T + A) X - A (X - Y)

X - Y is rounded to the tiles' dtype. Beside the roundings of bfloat16 tiles and results this makes a gradient's error 1
(vectors of unlike direction) to 1.3 times as large (alike, tau = 3); float32 results keep the four products.

Every pair of blocks is visited once, so the columns' gradients arrive in pieces. Float32 sums of them would take 8 B D
bytes beyond 16-bit results (1.8 GiB at B = 65536, D = 3584); completing one block of rows at a time needs none, but
visits both orders of each pair in backward, 4 more. So a sum's upper half lies in the result itself and a third byte
beside it (`split_sums`): 2 B D bytes. A batch that is one block has none of that: see `cmsa_blocks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.kernels import cmsa_halves, split_sums
from sda_fast.kernels.cmsa import Products
from sda_fast.ops.cmsa_blocks import HALVES_DTYPE, Batch, Cut, halves_bytes, pieces, whole_products
from sda_fast.ops.cmsa_products import add_product, side_by_side, write_symmetric_teacher, write_teacher
from sda_fast.ops.cmsa_sums import GradientSums, RowSums
from sda_fast.ops.cmsa_tiles import Form, Span, TileGradients, kept_tile
from sda_fast.ops.cmsa_triton import TritonTiles


class LibraryTiles(TritonTiles):
    """Visits of blocks cut as `cut` says; `kept` as in `TorchTiles`, or of one block L and S, [1, 2 B B]."""

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, batch: Batch, cut: Cut, kept: Tensor | None = None
    ) -> None:
        super().__init__(x, y, temperature, form, cut.block, 0)
        self.batch = batch
        self.split = batch.is_split
        self.teacher_added = self.split
        self.use_halves = batch.uses_halves and cut.block < batch.items
        self._kept = kept
        whole = kept is not None and cut.block >= batch.items and kept.numel() == whole_products(batch)
        self._strip = cut.strip if whole else 0
        self._memory: Tensor | None = None
        self._room: Tensor | None = None
        self._described: Tensor | None = None
        self._halves_of: dict[int, Span] = {}
        self._differences: tuple[Span, Tensor] | None = None
        pairs = side_by_side(x, y)
        self._sides = (x, y) if pairs is None else (pairs,)

    @property
    def completes_rows(self) -> bool:
        return self._strip > 0

    def columns_per_visit(self) -> int:
        return self.block_size

    def rows_per_gradient(self) -> int:
        return self._strip or self.block_size

    def scratch(self, matrices: int, height: int, width: int) -> Tensor:
        """[matrices, height, width] float32, the same memory at every call."""
        if self._memory is None:
            block, dimensions = min(self.block_size, len(self.x)), self.x.shape[1]
            size = block * max(self.batch.matrices * block, pieces(self.batch) * dimensions)
            if self.completes_rows:
                size = self._strip * (self.batch.soft + 2) * dimensions
            self._memory = torch.empty(size, dtype=torch.float32, device=self.x.device)
        return self._memory[: matrices * height * width].view(matrices, height, width)

    def room(self) -> Tensor:
        """Bytes in which a visit has its halves until the products are there, and then its tiles."""
        if self._room is None:
            block = min(self.block_size, len(self.x))
            tiles = self.rows_per_gradient() * self.batch.matrices * self.batch.tile_bytes
            of_item = max(tiles, halves_bytes(self.batch)) if self.use_halves else tiles
            self._room = torch.empty(block * of_item, dtype=torch.uint8, device=self.x.device)
        return self._room

    def products(self, rows: Span, columns: Span, *, logits: bool = True, first_time: bool = False) -> Products:
        """Those of a visit; L and M are left out unless asked for."""
        own_block = rows == columns
        matrices = self.batch.matrices
        if self.completes_rows:
            return self._of_one_block(rows, columns, first_time)
        kept = None
        if self._kept is not None and len(self._kept):
            # items against themselves have no M, and one block no room for it
            count = matrices - (own_block and self.block_size >= len(self.x))
            kept = kept_tile(self._kept, rows, columns, len(self.x), self.block_size, count)
        out = self.scratch(matrices, rows[1] - rows[0], columns[1] - columns[0]) if kept is None else kept
        first, last = out[0], out[-1]
        transposed = first.T if own_block else out[1]
        teacher = last if self.form.soft else None
        halves = self.use_halves and not own_block
        if kept is None or first_time:
            self._form(first, transposed, teacher, rows, columns, logits=logits)
        return Products(
            first if logits else None,
            transposed if logits or halves else None,
            teacher,
            self.described() if halves else None,
        )

    def _of_one_block(self, rows: Span, columns: Span, first_time: bool) -> Products:
        items = len(self.x)
        whole = self._kept.view(-1, items, items)  # type: ignore[union-attr]
        if first_time:
            self._form(whole[0], None, whole[1] if self.form.soft else None, rows, columns, logits=True)
        across = whole[0, slice(*columns), slice(*rows)].T
        own = slice(*rows), slice(*columns)
        return Products(whole[(0, *own)], across, whole[(1, *own)] if self.form.soft else None)

    def _form(
        self,
        first: Tensor,
        transposed: Tensor | None,
        teacher: Tensor | None,
        rows: Span,
        columns: Span,
        *,
        logits: bool,
    ) -> None:
        """Write x_i y_j, y_i x_j and S; M and S of items against themselves by symmetry, of others by halves if so."""
        own, across = slice(*rows), slice(*columns)
        if logits:
            add_product(first, self.x[own], self.y[across].T, beta=0)
        if rows == columns:
            if teacher is not None:
                write_symmetric_teacher(teacher, tuple(side[own] for side in self._sides))
        elif self.use_halves and teacher is not None and transposed is not None:
            for out, left, right in zip(
                (teacher, transposed), self._halves(0, rows), self._halves(2, columns), strict=True
            ):
                add_product(out, left, right.T, beta=0)
        else:
            if logits and transposed is not None:
                add_product(transposed, self.y[own], self.x[across].T, beta=0)
            if teacher is not None:
                write_teacher(teacher, self._sides, own, across)

    def described(self) -> Tensor:
        """What a kernel has to know of each item's halves."""
        if self._described is None:
            self._described = cmsa_halves.described(self.x, self.y)
        return self._described

    def _halves(self, slot: int, span: Span) -> tuple[Tensor, ...]:
        """x + y and x - y of the items in `span` over their scales, in the places `slot` and `slot` + 1."""
        items, dimensions = span[1] - span[0], self.x.shape[1]
        block = min(self.block_size, len(self.x))
        memory = self.room().view(-1)[: 4 * block * dimensions * HALVES_DTYPE.itemsize].view(HALVES_DTYPE)
        sums, differences = memory.view(4, -1)[slot : slot + 2, : items * dimensions].view(2, items, dimensions)
        if self._halves_of.get(slot) != span:
            cmsa_halves.write_halves(self.x, self.y, self.described(), span, sums, differences)
            self._halves_of[slot] = span
        return sums, differences

    def tile_buffers(self, rows: Span, columns: Span) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of items against themselves the second is the first one transposed, and has no memory."""
        self._halves_of.clear()
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        size = height * width * self.batch.tile_bytes
        tiles = [
            self.room()[number * size : (number + 1) * size].view(self.tile_dtype).view(height, width)
            for number in range(self.batch.matrices)
        ]
        return tiles[0], None if rows == columns else tiles[1], tiles[-1]

    def differences(self, span: Span) -> Tensor:
        """X - Y of the items in `span`, in the dtype of the gradient tiles; the last ones are kept."""
        if self._differences is None or self._differences[0] != span:
            self._differences = None
            x, y = self.operand(self.x, span), self.operand(self.y, span)
            self._differences = span, x - y
        return self._differences[1]

    def sums(self, needs_x: bool, needs_y: bool) -> GradientSums:
        return SplitSums(self, needs_x, needs_y) if self.split else super().sums(needs_x, needs_y)

    def row_sums(self, items: int, needs_x: bool, needs_y: bool) -> RowSums:
        return StripSums(self, items, needs_x, needs_y) if self.split else super().row_sums(items, needs_x, needs_y)


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
        memory = tiles.scratch(pieces(tiles.batch), own[1] - own[0], tiles.x.shape[1])
        piece, shared = memory[0], memory[-1]
        if tile.teacher is not None:
            add_product(shared, tile.teacher, tiles.differences(other), beta=0)
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


class StripSums:
    """Float32 sums of the gradients of a range of items, to which the products over all others are added."""

    def __init__(self, tiles: LibraryTiles, items: int, needs_x: bool, needs_y: bool) -> None:
        self._tiles = tiles
        shape = (tiles.batch.soft + 2, items, tiles.x.shape[1])
        if tiles.completes_rows:
            memory = tiles.scratch(*shape)
        else:
            memory = torch.empty(shape, dtype=torch.float32, device=tiles.x.device)
        self._sums = [memory[side] if needed else None for side, needed in enumerate((needs_x, needs_y))]
        self._shared = memory[-1]
        self._begun, self._has_shared = False, False

    def add(self, tile: TileGradients, other: Span) -> None:
        tiles, beta = self._tiles, int(self._begun)
        x, y = tiles.operand(tiles.x, other), tiles.operand(tiles.y, other)
        if tile.teacher is not None:
            add_product(self._shared, tile.teacher, tiles.differences(other), beta=beta)
            self._has_shared = True
        for sums, logits, across in zip(self._sums, (tile.logits, tile.transposed_logits), (y, x), strict=True):
            if sums is not None:
                add_product(sums, logits, across, beta=beta)
        self._begun = True

    def write(self, results: list[Tensor | None], scale: Tensor) -> None:
        for result, sums, sign in zip(results, self._sums, (1.0, -1.0), strict=True):
            if result is not None and sums is not None:
                split_sums.write(result, sums, self._shared if self._has_shared else None, (1.0, sign), scale)
