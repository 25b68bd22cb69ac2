"""CMSA on one tile of the B x B matrices in PyTorch: what `cmsa_blockwise` sums over tiles.

A tile has rows I and columns J. For items i in I, j in J it holds L = L_ij, M = L_ji and S = S_ij = S_ji, so that a
two-sided visit serves both (I, J) and (J, I): quantities per row come from the columns' side by reducing the other way.

Tiles of L and S hold the bare products x_i y_j and x_i x_j + y_i y_j: a difference of two of them is exact where it is
small, which it would not be had each been multiplied by a scale, and so rounded, before. Differences are then scaled to
bits: in PyTorch on a CPU exp2 costs a quarter of exp (a fortieth where results underflow). What is kept by item is
float64 and in bits: beside scores of 1e9 a float32 log-sum-exp could not tell one term from a thousand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]
NATS_PER_BIT = math.log(2)


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
    """

    logits: Tensor
    transposed_logits: Tensor
    teacher: Tensor | None
    temperature: Tensor
    logits_factor: float
    teacher_factor: float


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
    r, c, s, h, t, q = statistics.unbind()
    by_item = [*(values / scales.logits for values in (r, c)), s / scales.teacher]
    by_item += [values / scales.logits for values in (h, t)]
    return torch.stack([part for values in by_item for part in split(values, dtype)] + [q.to(dtype)])


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
    """

    BUFFERS = 8

    def __init__(self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int) -> None:
        self.x, self.y, self.form, self.block_size = x, y, form, block_size
        self.dtype = compute_dtype(x.dtype)
        self.temperature = float(temperature)
        self._logits_scale, self._teacher_scale = (float(scale) for scale in Scales.at(self.temperature))
        edge = min(block_size, len(x))
        self._buffers = torch.empty(self.BUFFERS, edge * edge, dtype=self.dtype, device=x.device)

    def columns_per_visit(self) -> int:
        return self.block_size

    def operand(self, embeddings: Tensor, span: Span) -> Tensor:
        """The vectors of the items in `span`, in the dtype of the gradient tiles."""
        return embeddings[span[0] : span[1]].to(self.dtype)

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None:
        """total += factor * tile @ embeddings."""
        total.addmm_(tile, embeddings, alpha=factor)

    def _buffer(self, number: int, rows: Span, columns: Span) -> Tensor:
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        return self._buffers[number, : height * width].view(height, width)

    def _logits(self, number: int, left: Tensor, right: Tensor, rows: Span, columns: Span) -> Tensor:
        out = self._buffer(number, rows, columns)
        left, right = self.operand(left, rows), self.operand(right, columns)
        return torch.mm(left, right.T, out=out)

    def _teacher(self, number: int, rows: Span, columns: Span) -> Tensor:
        out = self._buffer(number, rows, columns)
        for beta, side in enumerate((self.x, self.y)):
            left, right = self.operand(side, rows), self.operand(side, columns)
            torch.addmm(out, left, right.T, beta=beta, out=out)
        return out

    def _below(self, number: int, scores: Tensor, parts: Tensor, dim: int, scale: float) -> Tensor:
        """scale * (scores - (high + low)) along `dim`, parts [2, n] being high and low.

        At most zero, also where rounding of huge scores says otherwise.
        """
        out = self._buffers[number, : scores.numel()].view(scores.shape)
        torch.sub(scores, parts[0].unsqueeze(dim), out=out)
        return torch.add((-scale * parts[1]).unsqueeze(dim), out, alpha=scale, out=out).clamp_(max=0)

    def _exponentials(self, number: int, scores: Tensor, dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(log-sum-exp in bits, exp2(scale * (scores - largest)), their sums) along `dim`."""
        largest = scores.amax(dim)
        out = self._buffers[number, : scores.numel()].view(scores.shape)
        torch.sub(scores, largest.unsqueeze(dim), out=out).mul_(scale).exp2_()
        sums = out.sum(dim)
        return scale * largest.double() + sums.double().log2(), out, sums

    def statistics(self, rows: Span, columns: Span, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """What one tile contributes to its rows' items and, if two-sided, to its columns' items.

        Returns:
            [4, rows] and [4, columns] or None, float64: the log-sum-exp of L's row, of L's column and of S's row, and
            sum_j T_ij (same L_ij + other L_ji) with T normalised within the tile (hard targets: 2 L_ii).
        """
        L = self._logits(0, self.x, self.y, rows, columns)
        M = self._logits(1, self.y, self.x, rows, columns)
        S = self._teacher(2, rows, columns) if self.form.soft else None
        for_rows = self._side_statistics(L, M, S, rows, columns, 1)
        return for_rows, self._side_statistics(M, L, S, rows, columns, 0) if two_sided else None

    def _side_statistics(
        self, own: Tensor, other: Tensor, S: Tensor | None, rows: Span, columns: Span, dim: int
    ) -> Tensor:
        own_lse, _, _ = self._exponentials(3, own, dim, self._logits_scale)
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
        logits = own
        if self.form.row_normalized:
            logits = torch.add(own, other, out=self._buffer(4, rows, columns))
        # relative to the likeliest target's, so that a teacher certain of one target gives exactly its logit
        reference = logits.gather(dim, S.argmax(dim, keepdim=True))
        relative = torch.sub(logits, reference, out=self._buffer(4, rows, columns))
        mean = (relative.mul_(weights).sum(dim) / sums).double() + reference.squeeze(dim).double()
        return torch.stack([own_lse, other_lse, teacher_lse, self.form.same_weight * self._logits_scale * mean])

    def target_sums(self, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """Sums over the tile's other side.

        Args:
            vectors: [4, B]: s in units of the products and c less a constant in bits, each as high and low part.

        Returns:
            [3, rows] and [3, columns] or None, float64: sum_j T_ji, sum_j T_ij, sum_j T_ij c_j.
        """
        c_high, c_low = vectors[2:]
        row_part, column_part = slice(*rows), slice(*columns)
        S = self._teacher(2, rows, columns)
        T = self._below(3, S, vectors[:2, row_part], 1, self._teacher_scale).exp2_()
        T_transposed = self._below(4, S, vectors[:2, column_part], 0, self._teacher_scale).exp2_()

        def sums(targets: Tensor, transposed: Tensor, other: slice) -> Tensor:
            by_other = torch.stack([torch.ones_like(c_high[other]), c_high[other], c_low[other]], dim=1)
            total, high, low = (targets @ by_other).double().unbind(1)
            return torch.stack([transposed.sum(1).double(), total, high + low])

        for_rows = sums(T, T_transposed, column_part)
        return for_rows, sums(T_transposed.T, T.T, row_part) if two_sided else None

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        """Gradient tiles from the statistics [11, B] of `split_statistics`."""
        r, c, s, h, t = (statistics[i : i + 2] for i in range(0, 10, 2))
        q = statistics[10]
        row_part, column_part = slice(*rows), slice(*columns)
        same, other = self.form.same_weight, self.form.other_weight
        for_logits, for_teacher = self._logits_scale, self._teacher_scale
        L = self._logits(0, self.x, self.y, rows, columns)
        M = self._logits(1, self.y, self.x, rows, columns)
        P = self._below(3, L, r[:, row_part], 1, for_logits).exp2_()
        P.addcmul_(self._below(5, L, c[:, column_part], 0, for_logits).exp2_(), q[column_part].unsqueeze(0))
        N = self._below(4, M, r[:, column_part], 0, for_logits).exp2_()
        N.addcmul_(self._below(5, M, c[:, row_part], 1, for_logits).exp2_(), q[row_part].unsqueeze(1))
        if self.form.soft:
            S = self._teacher(2, rows, columns)
            T = self._below(5, S, s[:, row_part], 1, for_teacher).exp2_()
            T_transposed = self._below(6, S, s[:, column_part], 0, for_teacher).exp2_()
            P.sub_(T, alpha=same).sub_(T_transposed, alpha=other)
            N.sub_(T_transposed, alpha=same).sub_(T, alpha=other)
        else:
            for tile in (P, N):
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
            temperature += self._sum_of_products(7, teacher, S) * (0.5 if two_sided else 0.25)
        return TileGradients(P, N, teacher, temperature, 1 / self.temperature, 0.5)

    def _sum_of_products(self, number: int, left: Tensor, right: Tensor) -> Tensor:
        """sum(left * right), rows added up in float64: their sums cancel, which one long float32 sum would show."""
        products = torch.mul(left, right, out=self._buffers[number, : left.numel()].view(left.shape))
        return products.sum(1).double().sum()

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
        """tau (dS_ij + dS_ji), overwriting L and M. An item certain of its target gets exactly 0."""
        scratch = self._buffer(7, rows, columns)
        sides = ((L, slice(*rows), slice(*columns), 1, 0), (M, slice(*columns), slice(*rows), 0, 1))
        if self.form.row_normalized:
            torch.add(L, M, out=scratch)
            for tile, (_, own, _, dim, _) in zip((L, M), sides, strict=True):
                torch.sub(scratch, 2 * h[0, own].unsqueeze(dim), out=tile)
                tile.sub_(2 * h[1, own].unsqueeze(dim))
        else:
            for tile, own, across, dim, across_dim in sides:
                torch.sub(c[0, across].unsqueeze(across_dim), t[0, own].unsqueeze(dim), out=scratch)
                scratch.add_(c[1, across].unsqueeze(across_dim)).sub_(t[1, own].unsqueeze(dim))
                tile.sub_(h[0, own].unsqueeze(dim)).sub_(h[1, own].unsqueeze(dim)).mul_(2).sub_(scratch)
        return L.mul_(T).addcmul_(M, T_transposed).neg_()
