"""CMSA on one tile of the B x B matrices in PyTorch: what `cmsa_blockwise` sums over tiles.

A tile has rows I and columns J. For items i in I, j in J it holds L = L_ij, M = L_ji and S = S_ij = S_ji, so that a
two-sided visit serves both (I, J) and (J, I): quantities per row come from the columns' side by reducing the other way.

Tiles of L and S hold the bare products x_i y_j and x_i x_j + y_i y_j: a difference of two of them is exact where it is
small, which it would not be had each been multiplied by a scale, and so rounded, before. Differences are then scaled to
bits: in PyTorch on a CPU exp2 costs a quarter of exp (a fortieth where results underflow). What is kept by item is
float64 and in bits: beside scores of 1e9 a float32 log-sum-exp could not tell one term from a thousand.

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


def split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 values as the sum of two of `dtype`, so that scores near a huge log-sum-exp lose nothing against it."""
    high = values.to(dtype)
    return high, (values - high).to(dtype)


class Scales(NamedTuple):
    """What turns products into bits: of x_i y_j for L, of x_i x_j + y_i y_j for S. Tensors if the temperature is."""

    logits: float | Tensor
    teacher: float | Tensor

    @classmethod
    def at(cls, temperature: float | Tensor) -> Scales:
        if isinstance(temperature, Tensor):
            temperature = temperature.double()
        return cls(1 / (temperature * NATS_PER_BIT), temperature / (2 * NATS_PER_BIT))


def split_statistics(statistics: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """[6, B] r, c, s, h, t, q in bits -> [11, B] in `dtype`: in units of the products as high and low part, and q."""
    parts = torch.empty(11, statistics.shape[1], dtype=dtype, device=statistics.device)
    in_products = statistics[:5] / scales.logits
    torch.div(statistics[2], scales.teacher, out=in_products[2])
    high, low = parts[:10].view(5, 2, -1).unbind(1)
    high.copy_(in_products)
    low.copy_(in_products.sub_(high))
    parts[10] = statistics[5]
    return parts


def block_size_within(workspace_bytes: int, items: int, dtype: torch.dtype, device_type: str) -> int:
    """The edge of tiles whose buffers take at most `workspace_bytes`; on a CPU no larger than its caches like."""
    edge = math.isqrt(workspace_bytes // (TorchTiles.BUFFERS * compute_dtype(dtype).itemsize))
    edge = max(1, edge // 64 * 64 or edge)
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


def merge_statistics(running: Tensor, part: Tensor, soft: bool) -> None:
    """Add `part` [4, n] to `running` [4, n] in place; see `TorchTiles.statistics` for the four rows."""
    if soft:
        teacher_lse = torch.logaddexp2(running[2], part[2])
        running[3] *= torch.exp2(running[2] - teacher_lse)
        running[3] += torch.exp2(part[2] - teacher_lse) * part[3]
        running[2] = teacher_lse
    else:
        running[3] += part[3]
    torch.logaddexp2(running[:2], part[:2], out=running[:2])


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
    """

    BUFFERS = 9

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, kept: Tensor | None = None
    ) -> None:
        self.x, self.y, self.form, self.block_size = x, y, form, block_size
        self.dtype = compute_dtype(x.dtype)
        self.temperature = float(temperature)
        self._logits_scale, self._teacher_scale = (float(scale) for scale in Scales.at(self.temperature))
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
            torch.mm(self.operand(self.x, rows), self.operand(self.y, columns).T, out=L)
            if not on_diagonal:
                torch.mm(self.operand(self.y, rows), self.operand(self.x, columns).T, out=M)
        return L, L.T if on_diagonal else M

    def _teacher(self, rows: Span, columns: Span, *, first_time: bool = False) -> Tensor:
        """S."""
        kept = self._kept_tile(rows, columns)
        S = self._buffer(2, rows, columns) if kept is None else kept[2]
        if kept is None or first_time:
            for beta, side in enumerate((self.x, self.y)):
                torch.addmm(S, self.operand(side, rows), self.operand(side, columns).T, beta=beta, out=S)
        return S

    def _powers_below(self, number: int, scores: Tensor, parts: Tensor, dim: int, scale: float) -> Tensor:
        """exp2(scale * (scores - (high + low))) along `dim`, parts [2, n] being high and low.

        At most one, also where rounding of huge scores says otherwise.
        """
        out = self._like(number, scores)
        torch.sub(scores, parts[0].unsqueeze(dim), out=out)
        torch.add((-scale * parts[1]).unsqueeze(dim), out, alpha=scale, out=out)
        return out.clamp_(max=0).exp2_()

    def _exponentials(self, number: int, scores: Tensor, dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(log-sum-exp in bits, exp2(scale * (scores - largest)), their sums) along `dim`."""
        largest = scores.amax(dim)
        out = self._like(number, scores)
        torch.sub(scores, largest.unsqueeze(dim), out=out).mul_(scale).exp2_()
        sums = out.sum(dim)
        return scale * largest.double() + sums.double().log2(), out, sums

    def add_statistics(self, running: Tensor, rows: Span, columns: Span, two_sided: bool) -> None:
        """Merge `statistics` into `running` [4, B] float64."""
        for_rows, for_columns = self.statistics(rows, columns, two_sided)
        merge_statistics(running[:, slice(*rows)], for_rows, self.form.soft)
        if for_columns is not None:
            merge_statistics(running[:, slice(*columns)], for_columns, self.form.soft)

    def statistics(self, rows: Span, columns: Span, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """What one tile contributes to its rows' items and, if two-sided, to its columns' items.

        Returns:
            [4, rows] and [4, columns] or None, float64: the log-sum-exp of L's row, of L's column and of S's row, and
            sum_j T_ij (same L_ij + other L_ji) with T normalised within the tile (hard targets: 2 L_ii).
        """
        L, M = self._logits(rows, columns, first_time=True)
        S = self._teacher(rows, columns, first_time=True) if self.form.soft else None
        for_rows = self._side_statistics(L, M, S, rows, columns, 1)
        return for_rows, self._side_statistics(M, L, S, rows, columns, 0) if two_sided else None

    def _side_statistics(
        self, own: Tensor, other: Tensor, S: Tensor | None, rows: Span, columns: Span, dim: int
    ) -> Tensor:
        own_lse, _, _ = self._exponentials(3, own, dim, self._logits_scale)
        if rows == columns:
            other_lse, _, _ = self._exponentials(3, own, 1 - dim, self._logits_scale)
        else:
            other_lse, _, _ = self._exponentials(3, other, dim, self._logits_scale)
        if S is None:
            target_logits = torch.zeros_like(own_lse)
            diagonal = _diagonal(own, rows, columns)
            if diagonal is not None:
                start, stop = _overlap(rows, columns)
                first = (rows if dim == 1 else columns)[0]
                target_logits[start - first : stop - first] = 2 * self._logits_scale * diagonal.double()
            return torch.stack([own_lse, other_lse, torch.zeros_like(own_lse), target_logits])
        teacher_lse, weights, sums = self._exponentials(3, S, dim, self._teacher_scale)
        logits = torch.add(own, other, out=self._like(4, own)) if self.form.row_normalized else own
        # the mean again relative to a first one: a teacher certain of one target gives exactly its logit
        products = self._like(5, logits)
        rough = torch.mul(logits, weights, out=products).sum(dim) / sums
        relative = torch.sub(logits, rough.unsqueeze(dim), out=products).mul_(weights).sum(dim) / sums
        mean = relative.double() + rough.double()
        return torch.stack([own_lse, other_lse, teacher_lse, self.form.same_weight * self._logits_scale * mean])

    def _targets(self, numbers: tuple[int, int], S: Tensor, s: Tensor, rows: Span, columns: Span) -> tuple[Tensor, ...]:
        """T_ij and T_ji on a tile, from s [2, B] as high and low part."""
        T = self._powers_below(numbers[0], S, s[:, slice(*rows)], 1, self._teacher_scale)
        if rows == columns:
            return T, T.T
        return T, self._powers_below(numbers[1], S, s[:, slice(*columns)], 0, self._teacher_scale)

    def add_target_sums(self, running: Tensor, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> None:
        """Add `target_sums` to `running` [3, B] float64."""
        for_rows, for_columns = self.target_sums(rows, columns, vectors, two_sided)
        running[:, slice(*rows)].add_(for_rows)
        if for_columns is not None:
            running[:, slice(*columns)].add_(for_columns)

    def target_sums(self, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """Sums over the tile's other side.

        Args:
            vectors: [4, B]: s in units of the products and c less a constant in bits, each as high and low part.

        Returns:
            [3, rows] and [3, columns] or None, float64: sum_j T_ji, sum_j T_ij, sum_j T_ij c_j.
        """
        c_high, c_low = vectors[2:]
        T, T_transposed = self._targets((3, 4), self._teacher(rows, columns), vectors[:2], rows, columns)

        def sums(targets: Tensor, transposed: Tensor, other: slice) -> Tensor:
            by_other = torch.stack([torch.ones_like(c_high[other]), c_high[other], c_low[other]], dim=1)
            total, high, low = (targets @ by_other).double().unbind(1)
            return torch.stack([transposed.sum(1).double(), total, high + low])

        for_rows = sums(T, T_transposed, slice(*columns))
        return for_rows, sums(T_transposed.T, T.T, slice(*rows)) if two_sided else None

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        """Gradient tiles from the statistics [11, B] of `split_statistics`."""
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
