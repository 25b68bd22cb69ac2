"""CMSA and InfoNCE without any B x B array: sweeps over tiles, the same for every backend.

With Z = [X, Y], S = tau/2 Z Z^T is symmetric, so a sweep over the whole batch visits each pair of blocks once and
serves both orders. A range of rows (one rank's share) is swept against all columns instead. Forward: one sweep for
the log-sum-exps of L's rows, L's columns and S's rows and for sum_j T_ij L_ij; for the published form a second one for
q_j = sum_i T_ij and sum_j T_ij c_j. Backward: one sweep that forms tiles of dL and dS and multiplies them by the
vectors. All statistics are in units of the products x_i y_j and x_i x_j + y_i y_j (see `cmsa_tiles`).

    loss  = 1/(2B) sum_i (r_i + t_i - 2 h_i) / tau   h_i = sum_j T_ij L_ij, t_i = sum_j T_ij c_j
    dS_ij = T_ij (c_j - t_i - 2 (L_ij - h_i)) / (2B)

With row-normalised transposed targets h_i = sum_j T_ij (L_ij + L_ji) / 2, q = 1, c_i takes the place of t_i, and
dS_ij = -T_ij (L_ij + L_ji - 2 h_i) / (2B).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sda_fast.ops.cmsa_sums import GradientSums, RowSums
from sda_fast.ops.cmsa_tiles import (
    Form,
    Scales,
    Span,
    TileGradients,
    compute_dtype,
)


class Tiles(Protocol):
    """A backend: what it computes on the tile (rows, columns) is documented at `cmsa_tiles.TorchTiles`."""

    x: Tensor
    y: Tensor
    form: Form
    block_size: int
    starts: tuple[int, ...]

    @property
    def temperature(self) -> float | Tensor: ...

    @property
    def completes_rows(self) -> bool: ...

    def columns_per_visit(self) -> int: ...

    def rows_per_gradient(self) -> int: ...

    def add_statistics(self, running: Tensor, rows: Span, columns: Span, two_sided: bool) -> None: ...

    def add_target_sums(self, running: Tensor, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> None: ...

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients: ...

    def operand(self, embeddings: Tensor, span: Span) -> Tensor: ...

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None: ...

    def sums(self, needs_x: bool, needs_y: bool) -> GradientSums: ...

    def row_sums(self, items: int, needs_x: bool, needs_y: bool) -> RowSums: ...


class Gradients(NamedTuple):
    """Gradients of the loss times the incoming gradient; None where not asked for."""

    x: Tensor | None
    y: Tensor | None
    temperature: Tensor


def row_blocks(rows: Span, block_size: int) -> Iterator[Span]:
    """Cut a range of rows into blocks."""
    for start in range(rows[0], rows[1], block_size):
        yield start, min(start + block_size, rows[1])


def visits(tiles: Tiles, own: Span, symmetric: bool) -> Iterator[tuple[Span, bool]]:
    """(columns, two_sided) for one block of rows: all columns from one side, or those after it for both sides."""
    if symmetric:
        yield own, False
        ranges = [(own[1], len(tiles.x))]
    else:
        ranges = list(zip(tiles.starts, (*tiles.starts[1:], len(tiles.x)), strict=True))
    for span in ranges:
        for columns in row_blocks(span, tiles.columns_per_visit()):
            yield columns, symmetric


def row_statistics(tiles: Tiles, rows: Span, symmetric: bool) -> Tensor:
    """First sweep: the sums [7, B] float64 of `TorchTiles.statistics`, complete for the items in `rows`."""
    running = torch.zeros(7, len(tiles.x), dtype=torch.float64, device=tiles.x.device)
    running[:6:2] = -torch.inf
    for own in row_blocks(rows, tiles.block_size):
        for columns, two_sided in visits(tiles, own, symmetric):
            tiles.add_statistics(running, own, columns, two_sided)
    return running


def item_statistics(tiles: Tiles, sums: Tensor) -> Tensor:
    """[11, B] in the compute dtype from the first sweep's sums: r, c, s, h, t as high and low part, and q.

    t and q are those of row-normalised and of hard targets, c and 1.
    """
    form, scales = tiles.form, Scales.at(tiles.temperature)
    statistics = torch.ones(11, sums.shape[1], dtype=compute_dtype(tiles.x.dtype), device=sums.device)
    pairs = 3 if form.soft else 2
    largest, added_up = sums[: 2 * pairs].view(pairs, 2, -1).unbind(1)
    logarithms = added_up.log2()
    logarithms[:2].div_(scales.logits)
    h = sums[6]
    if form.soft:
        logarithms[2].div_(scales.teacher)
        h = h / (2 / form.same_weight * sums[5])
    write_parts(statistics[: 2 * pairs], largest, logarithms)
    write_parts(statistics[6:8], h)
    statistics[8:10] = statistics[2:4]
    return statistics


def write_parts(parts: Tensor, values: Tensor, small: Tensor | None = None) -> None:
    """Write values + small [n, B] float64 as high and low part, [2n, B]; the sum itself is never rounded to float64."""
    high, low = parts.view(-1, 2, parts.shape[1]).unbind(1)
    high.copy_(values if small is None else values + small)
    rest = values - high
    low.copy_(rest if small is None else rest.add_(small))


def row_target_sums(tiles: Tiles, rows: Span, statistics: Tensor, symmetric: bool) -> Tensor:
    """Second sweep: the sums [4, B] float64 of `TorchTiles.target_sums`, complete for the items in `rows`."""
    running = torch.zeros(4, len(tiles.x), dtype=torch.float64, device=statistics.device)
    for own in row_blocks(rows, tiles.block_size):
        for columns, two_sided in visits(tiles, own, symmetric):
            tiles.add_target_sums(running, own, columns, statistics[2:6], two_sided)
    return running


def add_target_statistics(statistics: Tensor, sums: Tensor) -> None:
    """Write t and q of the published form from the second sweep's sums."""
    q, total, high, low = sums
    # the targets' rows sum to one only to rounding, which a large c would show
    write_parts(statistics[8:10], high / total, low / total)
    statistics[10] = q


def blockwise_forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and the statistics [11, B] of `item_statistics` that backward needs."""
    rows = (0, len(tiles.x))
    statistics = item_statistics(tiles, row_statistics(tiles, rows, symmetric=True))
    if tiles.form.needs_target_sums:
        add_target_statistics(statistics, row_target_sums(tiles, rows, statistics, symmetric=True))
    return total_loss(tiles, statistics), statistics


def total_loss(tiles: Tiles, statistics: Tensor) -> Tensor:
    """The loss in nats, in the compute dtype."""
    r, _, _, h, t = statistics[:10].double().view(5, 2, -1).unbind(0)
    # high and low parts apart: an item certain of its target has exactly no loss
    halves = (r + t).sub_(h, alpha=2)
    return (halves.mean() / tiles.temperature).to(statistics.dtype)


def blockwise_backward(
    tiles: Tiles,
    statistics: Tensor,
    rows: Span,
    scale: Tensor,
    *,
    symmetric: bool,
    through_teacher: bool,
    needs_x: bool,
    needs_y: bool,
) -> Gradients:
    """One sweep of gradient tiles over the items in `rows`.

    Symmetric: sums for the whole batch are kept (2 x B x D values, see `Tiles.sums`). Otherwise the gradients of one
    block of rows at a time are completed, at the price of visiting both orders of each pair.

    Args:
        tiles: the batch.
        statistics: [11, B] from `item_statistics`, for the published form with `add_target_statistics`.
        rows: the items whose vectors' gradients are wanted; all of them if symmetric.
        scale: the incoming gradient over 2B, a scalar of the compute dtype.
        symmetric, through_teacher, needs_x, needs_y: what to compute.

    Returns:
        Gradients [rows, D] in the vectors' dtype, rounded once, and the rows' share of the temperature's gradient.
    """
    x = tiles.x
    count = rows[1] - rows[0]

    temperature = torch.zeros((), dtype=torch.float64, device=x.device)
    if symmetric:
        whole = tiles.sums(needs_x, needs_y)
        for own in row_blocks(rows, tiles.block_size):
            for columns, two_sided in visits(tiles, own, symmetric):
                tile = tiles.gradients(own, columns, statistics, through_teacher, two_sided)
                temperature += tile.temperature
                whole.add(tile, own, columns, two_sided)
        results = whole.rounded(scale, x.dtype)
    else:
        results = [x.new_empty(count, x.shape[1]) if needed else None for needed in (needs_x, needs_y)]
        for own in row_blocks(rows, tiles.rows_per_gradient()):
            sums = tiles.row_sums(own[1] - own[0], needs_x, needs_y)
            for columns, two_sided in visits(tiles, own, symmetric):
                tile = tiles.gradients(own, columns, statistics, through_teacher, two_sided)
                temperature += tile.temperature
                sums.add(tile, columns)
            place = slice(own[0] - rows[0], own[1] - rows[0])
            sums.write([None if result is None else result[place] for result in results], scale)
    return Gradients(results[0], results[1], temperature.to(scale.dtype) * scale / tiles.temperature)
