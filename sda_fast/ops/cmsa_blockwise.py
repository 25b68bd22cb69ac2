"""CMSA and InfoNCE without any B x B array: sweeps over tiles, the same for every backend.

With Z = [X, Y], S = tau/2 Z Z^T is symmetric, so a sweep over the whole batch visits each pair of blocks once and
serves both orders. A range of rows (one rank's share) is swept against all columns instead. Forward: one sweep for
the log-sum-exps of L's rows, L's columns and S's rows and for sum_j T_ij L_ij; for the published form a second one for
q_j = sum_i T_ij and sum_j T_ij c_j. Backward: one sweep that forms tiles of dL and dS and multiplies them by the
vectors. All statistics are in bits (see `cmsa_tiles`).

    loss  = 1/(2B) sum_i (r_i + t_i - 2 h_i)         h_i = sum_j T_ij L_ij, t_i = sum_j T_ij c_j
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
    NATS_PER_BIT,
    Form,
    Scales,
    Span,
    TileGradients,
    compute_dtype,
    split,
    split_statistics,
)


class Tiles(Protocol):
    """A backend: what it computes on the tile (rows, columns) is documented at `cmsa_tiles.TorchTiles`."""

    x: Tensor
    y: Tensor
    form: Form
    block_size: int

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
    for columns in row_blocks((own[1] if symmetric else 0, len(tiles.x)), tiles.columns_per_visit()):
        yield columns, symmetric


def row_statistics(tiles: Tiles, rows: Span, symmetric: bool) -> Tensor:
    """First sweep: [4, B] float64 log-sum-exps r, c, s and target logits, complete for the items in `rows`."""
    running = torch.full((4, len(tiles.x)), -torch.inf, dtype=torch.float64, device=tiles.x.device)
    running[3] = 0
    for own in row_blocks(rows, tiles.block_size):
        for columns, two_sided in visits(tiles, own, symmetric):
            tiles.add_statistics(running, own, columns, two_sided)
    return running


def row_target_sums(tiles: Tiles, rows: Span, teacher_lse: Tensor, column_lse: Tensor, symmetric: bool) -> Tensor:
    """Second sweep: [2, B] float64 q_i = sum_j T_ji and sum_j T_ij c_j, complete for the items in `rows`."""
    dtype = compute_dtype(tiles.x.dtype)
    reference = column_lse.max()
    vectors = torch.stack(
        [*split(teacher_lse / Scales.at(tiles.temperature).teacher, dtype), *split(column_lse - reference, dtype)]
    )
    running = torch.zeros(3, len(tiles.x), dtype=torch.float64, device=teacher_lse.device)
    for own in row_blocks(rows, tiles.block_size):
        for columns, two_sided in visits(tiles, own, symmetric):
            tiles.add_target_sums(running, own, columns, vectors, two_sided)
    q, total, weighted = running.unbind()
    # the targets' rows sum to one only to rounding, which a large c would show
    return torch.stack([q, reference + weighted / total])


def complete_statistics(form: Form, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss by item [B] in bits (half its mean is the loss), and the statistics [6, B] that backward needs."""
    r, c, s, target_logits = first.unbind()
    q, target_columns = (torch.ones_like(r), c) if second is None else second.unbind()
    per_item = r + (target_columns - target_logits)
    return per_item, torch.stack([r, c, s, target_logits / 2, target_columns, q])


def blockwise_forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and the statistics [6, B] that backward needs: r, c, s, h, t, q."""
    rows = (0, len(tiles.x))
    first = row_statistics(tiles, rows, symmetric=True)
    second = row_target_sums(tiles, rows, first[2], first[1], symmetric=True) if tiles.form.needs_target_sums else None
    per_item, statistics = complete_statistics(tiles.form, first, second)
    return total_loss(per_item).to(compute_dtype(tiles.x.dtype)), statistics


def total_loss(per_item: Tensor) -> Tensor:
    """The loss in nats from the losses by item in bits."""
    return per_item.sum() * (NATS_PER_BIT / (2 * len(per_item)))


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
        statistics: [6, B] float64 from `complete_statistics`.
        rows: the items whose vectors' gradients are wanted; all of them if symmetric.
        scale: the incoming gradient over 2B, a scalar of the compute dtype.
        symmetric, through_teacher, needs_x, needs_y: what to compute.

    Returns:
        Gradients [rows, D] in the vectors' dtype, rounded once, and the rows' share of the temperature's gradient.
    """
    x = tiles.x
    count = rows[1] - rows[0]

    statistics = split_statistics(statistics, Scales.at(tiles.temperature), scale.dtype)
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
