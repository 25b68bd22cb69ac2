"""CMSA on one tile of the B x B matrices in PyTorch: what `cmsa_blockwise` sums over tiles.

A tile has rows I and columns J. For items i in I, j in J it holds L = L_ij, M = L_ji and S = S_ij = S_ji, so that a
two-sided visit serves both (I, J) and (J, I): quantities per row come from the columns' side by reducing the other way.

Logits, scores and log-sum-exps are held in bits, multiplied by log2(e) inside the products: exp2 needs no further
multiplication and, in PyTorch on a CPU, costs a quarter of exp (a fortieth where results underflow).
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
    what the backend left out: 1/tau for L, tau/2 (and bits to nats) for S.
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

    BUFFERS = 7

    def __init__(self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int) -> None:
        self.x, self.y, self.form, self.block_size = x, y, form, block_size
        self.dtype = compute_dtype(x.dtype)
        self.temperature = float(temperature)
        self._logits_scale = 1 / (self.temperature * NATS_PER_BIT)
        self._teacher_scale = self.temperature / (2 * NATS_PER_BIT)
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
        return torch.addmm(out, left, right.T, beta=0, alpha=self._logits_scale, out=out)

    def _teacher(self, number: int, rows: Span, columns: Span) -> Tensor:
        out = self._buffer(number, rows, columns)
        for beta, side in enumerate((self.x, self.y)):
            left, right = self.operand(side, rows), self.operand(side, columns)
            torch.addmm(out, left, right.T, beta=beta, alpha=self._teacher_scale, out=out)
        return out

    def _softmax(self, number: int, scores: Tensor, logsumexp: Tensor, dim: int) -> Tensor:
        """exp2(scores - logsumexp) along `dim`; at most one, also where rounding of huge scores says otherwise."""
        out = self._buffers[number, : scores.numel()].view(scores.shape)
        torch.sub(scores, logsumexp.unsqueeze(dim), out=out)
        return out.clamp_(max=0).exp2_()

    def _logsumexp(self, scratch: int, scores: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """(log-sum-exp, exponentials, their sums) along `dim`."""
        largest = scores.amax(dim)
        exponentials = self._buffers[scratch, : scores.numel()].view(scores.shape)
        torch.sub(scores, largest.unsqueeze(dim), out=exponentials).exp2_()
        sums = exponentials.sum(dim)
        return largest + sums.log2(), exponentials, sums

    def statistics(self, rows: Span, columns: Span, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        """What one tile contributes to its rows' items and, if two-sided, to its columns' items.

        Returns:
            [4, rows] and [4, columns] or None: the log-sum-exp of L's row, of L's column and of S's row, and
            sum_j T_ij (same L_ij + other L_ji) with T normalised within the tile (hard targets: 2 L_ii).
        """
        L = self._logits(0, self.x, self.y, rows, columns)
        M = self._logits(1, self.y, self.x, rows, columns)
        sides = []
        for dim, (own, other) in ((1, (L, M)), (0, (M, L))):
            if dim == 0 and not two_sided:
                break
            row_lse, _, _ = self._logsumexp(3, own, dim)
            column_lse, _, _ = self._logsumexp(3, other, dim)
            sides.append([row_lse, column_lse])
        if not self.form.soft:
            for side, span in zip(sides, (rows, columns), strict=False):
                target_logits = torch.zeros_like(side[0])
                diagonal = _diagonal(L, rows, columns)
                if diagonal is not None:
                    start, stop = _overlap(rows, columns)
                    target_logits[start - span[0] : stop - span[0]] = 2 * diagonal
                side += [torch.zeros_like(side[0]), target_logits]
        else:
            S = self._teacher(2, rows, columns)
            for dim, side in zip((1, 0), sides, strict=False):
                teacher_lse, exponentials, sums = self._logsumexp(3, S, dim)
                own, other = (L, M) if dim == 1 else (M, L)
                weighted = self._buffer(4, rows, columns)
                torch.mul(exponentials, own, out=weighted)
                if self.form.row_normalized:
                    weighted.addcmul_(exponentials, other)
                side += [teacher_lse, self.form.same_weight * weighted.sum(dim) / sums]
        stacked = [torch.stack(side) for side in sides]
        return stacked[0], stacked[1] if two_sided else None

    def target_sums(
        self, rows: Span, columns: Span, teacher_lse: Tensor, column_lse: Tensor, two_sided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[2, rows] and [2, columns] or None: sum_j T_ji and sum_j T_ij c_j over the tile's other side."""
        S = self._teacher(2, rows, columns)
        row_part, column_part = slice(*rows), slice(*columns)
        T = self._softmax(3, S, teacher_lse[row_part], 1)
        T_transposed = self._softmax(4, S, teacher_lse[column_part], 0)
        for_rows = torch.stack([T_transposed.sum(1), T @ column_lse[column_part]])
        if not two_sided:
            return for_rows, None
        return for_rows, torch.stack([T.sum(0), T_transposed.T @ column_lse[row_part]])

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        """Gradient tiles from the statistics [5, B] of `cmsa_blockwise.Statistics`."""
        r, c, s, q, rho = statistics.unbind()
        row_part, column_part = slice(*rows), slice(*columns)
        same, other = self.form.same_weight, self.form.other_weight
        L = self._logits(0, self.x, self.y, rows, columns)
        M = self._logits(1, self.y, self.x, rows, columns)
        P = self._softmax(3, L, r[row_part], 1)
        P.addcmul_(self._softmax(5, L, c[column_part], 0), q[column_part].unsqueeze(0))
        N = self._softmax(4, M, r[column_part], 0)
        N.addcmul_(self._softmax(5, M, c[row_part], 1), q[row_part].unsqueeze(1))
        if self.form.soft:
            S = self._teacher(2, rows, columns)
            T = self._softmax(5, S, s[row_part], 1)
            T_transposed = self._softmax(6, S, s[column_part], 0)
            P.sub_(T, alpha=same).sub_(T_transposed, alpha=other)
            N.sub_(T_transposed, alpha=same).sub_(T, alpha=other)
        else:
            for tile in (P, N):
                diagonal = _diagonal(tile, rows, columns)
                if diagonal is not None:
                    diagonal.sub_(2)
        temperature = -torch.dot(P.view(-1), L.view(-1))
        if two_sided:
            temperature -= torch.dot(N.view(-1), M.view(-1))
        teacher = None
        if self.form.soft and through_teacher:
            if self.form.row_normalized:
                L.add_(M)
                torch.add(L, rho[column_part].unsqueeze(0), out=M)
                L.add_(rho[row_part].unsqueeze(1))
            else:
                L.mul_(same).sub_(c[column_part].unsqueeze(0)).add_(rho[row_part].unsqueeze(1))
                M.mul_(same).sub_(c[row_part].unsqueeze(1)).add_(rho[column_part].unsqueeze(0))
            teacher = L.mul_(T).addcmul_(M, T_transposed).neg_()
            temperature += torch.dot(teacher.view(-1), S.view(-1)) * (NATS_PER_BIT if two_sided else NATS_PER_BIT / 2)
        temperature *= NATS_PER_BIT
        return TileGradients(P, N, teacher, temperature, 1 / self.temperature, self.temperature / 2 * NATS_PER_BIT)
