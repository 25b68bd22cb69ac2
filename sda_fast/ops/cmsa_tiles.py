"""CMSA on one tile of the B x B matrices in PyTorch: what `cmsa_blockwise` sums over tiles.

A tile has rows I and columns J. For items i in I, j in J it holds L = L_ij, M = L_ji and S = S_ij = S_ji, so that a
two-sided visit serves both (I, J) and (J, I): quantities per row come from the columns' side by reducing the other way.

Tiles of L and S hold the bare products x_i y_j and x_i x_j + y_i y_j: a difference of two of them is exact where it is
small, which it would not be had each been multiplied by a scale, and so rounded, before. Differences are then scaled to
bits: in PyTorch on a CPU exp2 costs a quarter of exp (a fortieth where results underflow). What is kept by item are
products too, float32 ones in two parts. A log-sum-exp is formed as the largest product, as a tile has it, and what the
others add: a target that is certain has a probability of exactly one, however large the scores are.

A visit of items against themselves has M = L^T, and the transpose of T for the targets of the other order. Products
that fit the workspace are kept for the later sweeps, up to the whole of a small batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sda_fast.ops.cmsa_sums import PlainRowSums, WholeSums

Span = tuple[int, int]
NATS_PER_BIT = math.log(2)
CPU_BLOCK_SIZE = 256
LEAST_BLOCK_SIZE = 32
LARGE_BATCH = 2048


class Form(NamedTuple):
    """Which loss: soft targets (CMSA) or hard (InfoNCE), and how the transposed targets are normalised.

    dL_ij = [exp(L_ij - r_i) + q_j exp(L_ij - c_j) - same T_ij - other T_ji] / (2B), with (same, other) = (2, 0) as
    published and (1, 1), q = 1 when the transposed targets are row-normalised.
    """

    soft: bool
    row_normalized: bool

    @property
    def needs_target_sums(self) -> bool:
        return self.soft and not self.row_normalized

    @property
    def same_weight(self) -> float:
        return 1.0 if self.row_normalized else 2.0

    @property
    def other_weight(self) -> float:
        return 1.0 if self.row_normalized else 0.0


class TileGradients(NamedTuple):
    """Gradients in units of 1/(2B), and what to multiply them by on the way into the embeddings.

    `logits` is dL_ij, `transposed_logits` dL_ji, `teacher` dS_ij + dS_ji or None; all [rows, columns]. The factors hold
    what the backend left out of 1/tau for L and tau/2 for S.
    `temperature` is sum(dS S) - sum(dL L) over what this visit stands for (half of it for a one-sided visit of S, whose
    other half comes with the transposed tile).
    With `teacher_added` the logits' tiles hold their sums with the teacher's, so that with A = `teacher`
    dX += A (X - Y) + (dL + A) Y and dY += (dL^T + A) X - A (X - Y) take three products in place of four.
    """

    logits: Tensor
    transposed_logits: Tensor
    teacher: Tensor | None
    temperature: Tensor
    logits_factor: float
    teacher_factor: float
    teacher_added: bool = False

    def transposed(self) -> TileGradients:
        """The tile of the columns' items against the rows'."""
        return self._replace(
            logits=self.transposed_logits.T,
            transposed_logits=self.logits.T,
            teacher=None if self.teacher is None else self.teacher.T,
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic and of the loss: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scales(NamedTuple):
    """What turns products into bits: of x_i y_j for L, of x_i x_j + y_i y_j for S. Tensors if the temperature is."""

    logits: float | Tensor
    teacher: float | Tensor

    @classmethod
    def at(cls, temperature: float | Tensor) -> Scales:
        if isinstance(temperature, Tensor):
            temperature = temperature.double()
        return cls(1 / (temperature * NATS_PER_BIT), temperature / (2 * NATS_PER_BIT))


def block_size_within(workspace_bytes: int, items: int, dtype: torch.dtype, device_type: str) -> int:
    """The edge of tiles whose buffers take at most `workspace_bytes`; on a CPU no larger than its caches like.

    At least `LEAST_BLOCK_SIZE`: what a visit costs beside its products would take seconds with a few hundred items.
    """
    edge = math.isqrt(workspace_bytes // (TorchTiles.BUFFERS * compute_dtype(dtype).itemsize))
    edge = max(LEAST_BLOCK_SIZE, edge // 64 * 64 or edge)
    if device_type == "cpu":
        edge = min(edge, CPU_BLOCK_SIZE if items <= LARGE_BATCH else 2 * CPU_BLOCK_SIZE)
    return edge


def kept_shape(workspace_bytes: int, items: int, dtype: torch.dtype, block_size: int, soft: bool) -> tuple[int, int]:
    """How many tiles' products fit into the workspace beside the buffers, and the size of each."""
    edge, blocks = min(block_size, items), (items + block_size - 1) // block_size
    size = (3 if soft else 2) * edge**2
    spare = workspace_bytes // compute_dtype(dtype).itemsize - TorchTiles.BUFFERS * edge**2
    return max(0, min(blocks * (blocks + 1) // 2, spare // size)), size


def kept_tile(kept: Tensor, rows: Span, columns: Span, items: int, block_size: int, matrices: int) -> Tensor | None:
    """Of `kept` [tiles, elements], where a symmetric sweep's tile has its place: [matrices, rows, columns]."""
    row_block, column_block = rows[0] // block_size, columns[0] // block_size
    if row_block > column_block:
        return None
    blocks = -(-items // block_size)
    number = row_block * blocks - row_block * (row_block - 1) // 2 + column_block - row_block
    if number >= len(kept):
        return None
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    return kept[number, : matrices * height * width].view(matrices, height, width)


def merge_statistics(running: Tensor, part: Tensor, scales: Tensor) -> None:
    """Add `part` [7, n] to `running` [7, n] in place; see `TorchTiles.statistics` for the rows.

    Args:
        scales: [3, 1] or, with hard targets, [2, 1]: what turns the products of each pair of rows into bits.
    """
    pairs = 2 * len(scales)
    largest, sums = running[:pairs].view(-1, 2, running.shape[1]).unbind(1)
    part_largest, part_sums = part[:pairs].view(-1, 2, part.shape[1]).unbind(1)
    overall = torch.maximum(largest, part_largest)
    kept, added = (torch.exp2((one - overall) * scales) for one in (largest, part_largest))
    sums.mul_(kept).addcmul_(part_sums, added)
    largest.copy_(overall)
    if len(scales) == 3:
        running[6].mul_(kept[2]).addcmul_(part[6], added[2])
    else:
        running[6] += part[6]


def _overlap(rows: Span, columns: Span) -> Span:
    return max(rows[0], columns[0]), min(rows[1], columns[1])


def _diagonal(tile: Tensor, rows: Span, columns: Span) -> Tensor | None:
    """The entries of items against themselves in a tile, as a view, if it has any."""
    start, stop = _overlap(rows, columns)
    if start >= stop:
        return None
    return tile[start - rows[0] : stop - rows[0], start - columns[0] : stop - columns[0]].diagonal()


class TorchTiles:
    """Tiles of one batch in PyTorch on any device; buffers are allocated once and reused by every visit.

    Args:
        x, y: [B, D] image and text vectors; float16 and bfloat16 are widened to float32 tile by tile.
        temperature: scalar tensor.
        form: which loss.
        block_size: the largest number of rows and of columns of a visit.
        kept: [tiles, elements] as `kept_shape` says, for the products of the first tiles of a symmetric sweep.
            `statistics` fills it, everything else reads it; None keeps nothing.

    Attributes:
        starts: where the ranges of items begin that no block of columns may cross: with several processes, theirs.
    """

    BUFFERS = 9
    starts: tuple[int, ...] = (0,)

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, kept: Tensor | None = None
    ) -> None:
        self.x, self.y, self.form, self.block_size = x, y, form, block_size
        self.dtype = compute_dtype(x.dtype)
        self.temperature = float(temperature)
        self._logits_scale, self._teacher_scale = (float(scale) for scale in Scales.at(self.temperature))
        scales = [self._logits_scale, self._logits_scale, *[self._teacher_scale] * form.soft]
        self._scales = torch.tensor(scales, dtype=torch.float64, device=x.device).unsqueeze(1)
        edge = min(block_size, len(x))
        self._buffers = torch.empty(self.BUFFERS, edge * edge, dtype=self.dtype, device=x.device)
        self._kept = kept

    def columns_per_visit(self) -> int:
        return self.block_size

    @property
    def completes_rows(self) -> bool:
        """Whether backward is cheapest as strips of rows against all items."""
        return False

    def rows_per_gradient(self) -> int:
        return self.block_size

    def operand(self, embeddings: Tensor, span: Span) -> Tensor:
        """The vectors of the items in `span`, in the dtype of the gradient tiles."""
        return embeddings[span[0] : span[1]].to(self.dtype)

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None:
        """total += factor * tile @ embeddings."""
        total.addmm_(tile, embeddings, alpha=factor)

    def sums(self, needs_x: bool, needs_y: bool) -> WholeSums:
        """Sums of the vectors' gradients for a symmetric sweep."""
        return WholeSums(self, self.dtype, (needs_x, needs_y))

    def row_sums(self, items: int, needs_x: bool, needs_y: bool) -> PlainRowSums:
        """Sums of the gradients of a range of items."""
        return PlainRowSums(self, items, self.dtype, (needs_x, needs_y))

    def _buffer(self, number: int, rows: Span, columns: Span) -> Tensor:
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        return self._buffers[number, : height * width].view(height, width)

    def _like(self, number: int, tile: Tensor) -> Tensor:
        return self._buffers[number, : tile.numel()].view(tile.shape)

    def _kept_tile(self, rows: Span, columns: Span) -> Tensor | None:
        """[2 or 3, rows, columns] for L, M and S of a tile that is kept."""
        if self._kept is None:
            return None
        return kept_tile(self._kept, rows, columns, len(self.x), self.block_size, 3 if self.form.soft else 2)

    def _logits(self, rows: Span, columns: Span, *, first_time: bool = False) -> tuple[Tensor, Tensor]:
        """L and M."""
        kept = self._kept_tile(rows, columns)
        L, M = (self._buffer(i, rows, columns) for i in range(2)) if kept is None else kept[:2]
        on_diagonal = rows == columns
        if kept is None or first_time:
            self._write_products(L, ((self.x, self.y),), rows, columns)
            if not on_diagonal:
                self._write_products(M, ((self.y, self.x),), rows, columns)
        return L, L.T if on_diagonal else M

    def _teacher(self, rows: Span, columns: Span, *, first_time: bool = False) -> Tensor:
        """S."""
        kept = self._kept_tile(rows, columns)
        S = self._buffer(2, rows, columns) if kept is None else kept[2]
        if kept is None or first_time:
            self._write_products(S, ((self.x, self.x), (self.y, self.y)), rows, columns)
        return S

    def _write_products(self, out: Tensor, sides: tuple[tuple[Tensor, Tensor], ...], rows: Span, columns: Span) -> None:
        """out = the sum over `sides` of left[rows] @ right[columns]^T.

        Of columns before the rows those of the other order, transposed: a product depends in its last place on where it
        is in a tile, and a statistic of huge scores fits only the product that it is from.
        """
        if columns[0] < rows[0]:
            transposed = self._buffer(8, columns, rows)
            self._write_products(transposed, tuple((right, left) for left, right in sides), columns, rows)
            out.copy_(transposed.T)
            return
        for beta, (left, right) in enumerate(sides):
            torch.addmm(out, self.operand(left, rows), self.operand(right, columns).T, beta=beta, out=out)

    def _powers_below(self, number: int, scores: Tensor, parts: Tensor, dim: int, scale: float) -> Tensor:
        """exp2(scale * (scores - (high + low))) along `dim`, parts [2, n] being high and low.

        At most one, also where rounding of huge scores says otherwise.
        """
        out = self._like(number, scores)
        torch.sub(scores, parts[0].unsqueeze(dim), out=out)
        torch.add((-scale * parts[1]).unsqueeze(dim), out, alpha=scale, out=out)
        return out.clamp_(max=0).exp2_()

    def _exponentials(self, number: int, scores: Tensor, dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(largest score, exp2(scale * (scores - largest)), their sums) along `dim`."""
        largest = scores.amax(dim)
        out = self._like(number, scores)
        torch.sub(scores, largest.unsqueeze(dim), out=out).mul_(scale).exp2_()
        return largest, out, out.sum(dim)

    def add_statistics(self, running: Tensor, rows: Span, columns: Span, two_sided: bool) -> None:
        """Merge `statistics` into `running` [7, B] float64."""
        for_rows, for_columns = self.statistics(rows, columns, two_sided)
        merge_statistics(running[:, slice(*rows)], for_rows, self._scales)
        if for_columns is not None:
            merge_statistics(running[:, slice(*columns)], for_columns, self._scales)

    def statistics(self, rows: Span, columns: Span, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """What one tile contributes to its rows' items and, if two-sided, to its columns' items.

        Returns:
            [7, rows] and [7, columns] or None, float64: the largest product and the sum of exponentials relative to
            it, for L's row, L's column and S's row; and the sum over j of S's exponentials times the product x_i y_j
            (row-normalised: plus x_j y_i). Hard targets: zeros for S's row, and x_i y_i.
        """
        L, M = self._logits(rows, columns, first_time=True)
        S = self._teacher(rows, columns, first_time=True) if self.form.soft else None
        for_rows = self._side_statistics(L, M, S, rows, columns, 1)
        return for_rows, self._side_statistics(M, L, S, rows, columns, 0) if two_sided else None

    def _side_statistics(
        self, own: Tensor, other: Tensor, S: Tensor | None, rows: Span, columns: Span, dim: int
    ) -> Tensor:
        own_largest, _, own_sums = self._exponentials(3, own, dim, self._logits_scale)
        across, along = (own, 1 - dim) if rows == columns else (other, dim)
        other_largest, _, other_sums = self._exponentials(3, across, along, self._logits_scale)
        out = torch.zeros(7, len(own_sums), dtype=torch.float64, device=own.device)
        for line, values in enumerate((own_largest, own_sums, other_largest, other_sums)):
            out[line] = values
        if S is None:
            diagonal = _diagonal(own, rows, columns)
            if diagonal is not None:
                start, stop = _overlap(rows, columns)
                first = (rows if dim == 1 else columns)[0]
                out[6, start - first : stop - first] = diagonal
            return out
        out[4], weights, sums = self._exponentials(3, S, dim, self._teacher_scale)
        out[5] = sums
        logits = torch.add(own, other, out=self._like(4, own)) if self.form.row_normalized else own
        # the mean again relative to a first one: a teacher certain of one target gives exactly its logit
        products = self._like(5, logits)
        rough = torch.mul(logits, weights, out=products).sum(dim) / sums
        relative = torch.sub(logits, rough.unsqueeze(dim), out=products).mul_(weights).sum(dim) / sums
        torch.mul(relative.double() + rough.double(), sums, out=out[6])
        return out

    def _targets(self, numbers: tuple[int, int], S: Tensor, s: Tensor, rows: Span, columns: Span) -> tuple[Tensor, ...]:
        """T_ij and T_ji on a tile, from s [2, B] as high and low part."""
        T = self._powers_below(numbers[0], S, s[:, slice(*rows)], 1, self._teacher_scale)
        if rows == columns:
            return T, T.T
        return T, self._powers_below(numbers[1], S, s[:, slice(*columns)], 0, self._teacher_scale)

    def add_target_sums(self, running: Tensor, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> None:
        """Add `target_sums` to `running` [4, B] float64."""
        for_rows, for_columns = self.target_sums(rows, columns, vectors, two_sided)
        running[:, slice(*rows)].add_(for_rows)
        if for_columns is not None:
            running[:, slice(*columns)].add_(for_columns)

    def target_sums(self, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """Sums over the tile's other side.

        Args:
            vectors: [4, B]: c and s in units of the products, each as high and low part.

        Returns:
            [4, rows] and [4, columns] or None, float64: sum_j T_ji, sum_j T_ij, and sum_j T_ij c_j of the high and of
            the low part.
        """
        T, T_transposed = self._targets((3, 4), self._teacher(rows, columns), vectors[2:], rows, columns)

        def sums(targets: Tensor, transposed: Tensor, other: Span, dim: int) -> Tensor:
            c = vectors[:2, slice(*other)].double()
            by_other = torch.cat([torch.ones_like(c[:1]), c])
            targets = self._in_float64(6, targets)
            given = by_other @ (targets.T if dim == 1 else targets)
            return torch.cat([transposed.sum(dim).double().unsqueeze(0), given])

        for_rows = sums(T, T_transposed, columns, 1)
        return for_rows, sums(T_transposed, T, rows, 0) if two_sided else None

    def _in_float64(self, number: int, tile: Tensor) -> Tensor:
        """The tile in float64, in the place of buffers `number`, an even one, and `number` + 1."""
        if tile.dtype == torch.float64:
            return tile
        room = self._buffers[number : number + 2].view(-1).view(torch.float64)
        return room[: tile.numel()].view(tile.shape).copy_(tile)

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        """Gradient tiles from the statistics [11, B] of `cmsa_blockwise.item_statistics`."""
        r, c, s, h, t = (statistics[i : i + 2] for i in range(0, 10, 2))
        L, M = self._logits(rows, columns)
        on_diagonal = rows == columns
        P = self._softmaxes((3, 5), L, r, c, statistics[10], rows, columns, 1)
        N = P.T if on_diagonal else self._softmaxes((4, 5), M, r, c, statistics[10], columns, rows, 0)
        sides = (P,) if on_diagonal else (P, N)
        if self.form.soft:
            S = self._teacher(rows, columns)
            T, T_transposed = self._targets((5, 6), S, s, rows, columns)
            for tile, targets, transposed in zip(sides, (T, T_transposed), (T_transposed, T), strict=False):
                tile.sub_(targets, alpha=self.form.same_weight)
                if self.form.other_weight:
                    tile.sub_(transposed, alpha=self.form.other_weight)
        else:
            for tile in sides:
                diagonal = _diagonal(tile, rows, columns)
                if diagonal is not None:
                    diagonal.sub_(2)
        temperature = self._sum_of_products(7, P, L)
        if two_sided:
            temperature += self._sum_of_products(7, N, M)
        temperature *= -1 / self.temperature
        teacher = None
        if self.form.soft and through_teacher:
            teacher = self._teacher_gradient(L, M, T, T_transposed, c, h, t, rows, columns)
            temperature -= self._sum_of_products(5, teacher, S) * (1.0 if two_sided else 0.5)
        return TileGradients(P, N, teacher, temperature, 1 / self.temperature, -1.0)

    def _softmaxes(
        self, numbers: tuple[int, int], L: Tensor, r: Tensor, c: Tensor, q: Tensor, own: Span, across: Span, dim: int
    ) -> Tensor:
        """exp(L_ij - r_i) + q_j exp(L_ij - c_j), where sums over j run along `dim`."""
        out = self._powers_below(numbers[0], L, r[:, slice(*own)], dim, self._logits_scale)
        by_column = self._powers_below(numbers[1], L, c[:, slice(*across)], 1 - dim, self._logits_scale)
        return out.addcmul_(by_column, q[slice(*across)].unsqueeze(1 - dim))

    def _sum_of_products(self, number: int, left: Tensor, right: Tensor) -> Tensor:
        """sum(left * right), rows added up in float64: their sums cancel, which one long float32 sum would show."""
        return torch.mul(left, right, out=self._like(number, left)).sum(1).double().sum()

    def _teacher_gradient(
        self,
        L: Tensor,
        M: Tensor,
        T: Tensor,
        T_transposed: Tensor,
        c: Tensor,
        h: Tensor,
        t: Tensor,
        rows: Span,
        columns: Span,
    ) -> Tensor:
        """-tau/2 (dS_ij + dS_ji), overwriting T and its transpose. An item certain of its target gets exactly 0."""
        own, across = slice(*rows), slice(*columns)
        out = self._below_mean(7, L, M, c[:, across], h[:, own], t[:, own], 1).mul_(T)
        if rows == columns:
            return torch.add(out, out.T, out=self._like(8, out))
        # T has served: its place takes the other order's
        return out.addcmul_(self._below_mean(5, M, L, c[:, own], h[:, across], t[:, across], 0), T_transposed)

    def _below_mean(self, number: int, own: Tensor, other: Tensor, c: Tensor, h: Tensor, t: Tensor, dim: int) -> Tensor:
        """L_ij - h_i - (c_j - t_i) / 2, or with row-normalised targets (L_ij + L_ji) / 2 - h_i; parts are [2, n]."""
        out = self._like(number, own)
        h_high, h_low = h.unsqueeze(dim + 1)
        if self.form.row_normalized:
            torch.add(own, other, out=out)
            return out.mul_(0.5).sub_(h_high).sub_(h_low)
        t_high, t_low = t.unsqueeze(dim + 1)
        c_high, c_low = c.unsqueeze(2 - dim)
        differences = torch.sub(c_high, t_high, out=self._like(8, own)).add_(c_low)
        return torch.sub(own, h_high, out=out).sub_(differences, alpha=0.5).sub_(h_low - t_low / 2)
