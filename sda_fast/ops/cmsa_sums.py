"""Running sums of the gradients of a batch's vectors, to which `cmsa_blockwise` adds the products of each tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sda_fast.ops.cmsa_tiles import Span, TileGradients


class Operands(Protocol):
    """What a product of a gradient tile with vectors needs of a backend; see `cmsa_tiles.TorchTiles`."""

    x: Tensor
    y: Tensor

    def operand(self, embeddings: Tensor, span: Span) -> Tensor: ...

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None: ...


class GradientSums(Protocol):
    """Sums for a whole batch, filled by a symmetric sweep."""

    def add(self, tile: TileGradients, rows: Span, columns: Span, two_sided: bool) -> None: ...

    def rounded(self, scale: Tensor, dtype: torch.dtype) -> list[Tensor | None]: ...


class RowSums(Protocol):
    """Sums for a range of items, to which the products with the vectors of every other range are added in turn."""

    def add(self, tile: TileGradients, other: Span) -> None: ...

    def write(self, results: list[Tensor | None], scale: Tensor) -> None:
        """Scale times the sums into `results` [n, D], in their dtype."""
        ...


class Totals(NamedTuple):
    """Running sums of gradients for a range of items, [n, D] in the compute dtype; None where not needed."""

    x: Tensor | None
    y: Tensor | None

    @classmethod
    def zero(cls, like: Tensor, items: int, dtype: torch.dtype, needs: tuple[bool, bool]) -> Totals:
        shape = (items, like.shape[1])
        return cls(*(like.new_zeros(shape, dtype=dtype) if needed else None for needed in needs))

    def part(self, span: Span) -> Totals:
        return Totals(*(None if total is None else total[span[0] : span[1]] for total in self))

    def rounded(self, scale: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Scale the sums in place and give them in `dtype`."""
        return [None if total is None else total.mul_(scale).to(dtype) for total in self]


class WholeSums:
    """Sums in the compute dtype, 2 x B x D values."""

    def __init__(self, tiles: Operands, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
        self._tiles = tiles
        self._totals = Totals.zero(tiles.x, len(tiles.x), dtype, needs)

    def add(self, tile: TileGradients, rows: Span, columns: Span, two_sided: bool) -> None:
        add_products(self._tiles, tile, self._totals.part(rows), columns)
        if two_sided:
            add_products(self._tiles, tile.transposed(), self._totals.part(columns), rows)

    def rounded(self, scale: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        return self._totals.rounded(scale, dtype)


class PlainRowSums:
    """Sums in the compute dtype for a range of items."""

    def __init__(self, tiles: Operands, items: int, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
        self._tiles = tiles
        self._totals = Totals.zero(tiles.x, items, dtype, needs)

    def add(self, tile: TileGradients, other: Span) -> None:
        add_products(self._tiles, tile, self._totals, other)

    def write(self, results: list[Tensor | None], scale: Tensor) -> None:
        for result, total in zip(results, self._totals, strict=True):
            if result is not None and total is not None:
                result.copy_(total.mul_(scale))


def add_products(tiles: Operands, tile: TileGradients, totals: Totals, other: Span) -> None:
    """dX += dL Y_other / tau + tau/2 dS X_other, and dY likewise with dL's transpose."""
    x_other, y_other = tiles.operand(tiles.x, other), tiles.operand(tiles.y, other)
    for total, logits, across, along in (
        (totals.x, tile.logits, y_other, x_other),
        (totals.y, tile.transposed_logits, x_other, y_other),
    ):
        if total is None:
            continue
        tiles.accumulate(total, logits, across, tile.logits_factor)
        if tile.teacher is not None:
            along = along - across if tile.teacher_added else along
            tiles.accumulate(total, tile.teacher, along, tile.teacher_factor)
