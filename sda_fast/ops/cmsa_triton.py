"""CMSA's tiles through the Triton kernels: one launch per block of rows, products by the matrix library."""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.kernels import cmsa as kernels
from sda_fast.ops.cmsa_tiles import Form, Scales, Span, TileGradients


class TritonTiles:
    """The tiles of `cmsa_tiles.TorchTiles` on a GPU; a visit spans all columns.

    Gradient tiles are bfloat16 for bfloat16 vectors, whose exponents hold any gradient, and float32 otherwise (float16
    vectors are then widened for the products).

    Args:
        x, y: [B, D] image and text vectors, float32, float16 or bfloat16, any strides.
        temperature: scalar tensor; never looked at by the host.
        form: which loss.
        block_size: rows of a visit, or 0 to choose them: as many as `workspace_bytes` allows, yet so few that a large
            batch is cut into `BLOCKS`, since a block against itself cannot be visited for both orders at once.
        workspace_bytes: bound of the three gradient tiles' memory; at least `MIN_ROWS` rows are taken.
    """

    MIN_ROWS, MIN_ROWS_OF_BLOCKS, BLOCKS = 128, 512, 8

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, workspace_bytes: int
    ) -> None:
        self.x, self.y, self.form = x, y, form
        self.temperature = temperature.float().contiguous()
        self._tile_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        rows = min(
            workspace_bytes // (3 * self._tile_dtype.itemsize * len(x)),
            max(self.MIN_ROWS_OF_BLOCKS, len(x) // self.BLOCKS),
        )
        self.block_size = block_size or max(self.MIN_ROWS, rows // self.MIN_ROWS * self.MIN_ROWS)
        self._buffers: Tensor | None = None

    def columns_per_visit(self) -> int:
        return len(self.x)

    def operand(self, embeddings: Tensor, span: Span) -> Tensor:
        """The vectors of the items in `span`, in the dtype of the gradient tiles."""
        return embeddings[span[0] : span[1]].to(self._tile_dtype)

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None:
        """total += factor * tile @ embeddings, summed in float32."""
        if tile.dtype == torch.float32:
            total.addmm_(tile, embeddings, alpha=factor)
        else:
            total.add_(torch.mm(tile, embeddings, out_dtype=torch.float32), alpha=factor)

    def statistics(self, rows: Span, columns: Span, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        for_rows, for_columns = kernels.statistics(
            self.x,
            self.y,
            self.temperature,
            rows,
            columns,
            soft=self.form.soft,
            row_normalized=self.form.row_normalized,
            two_sided=two_sided,
        )
        return self._merged(for_rows), None if for_columns is None else self._merged(for_columns)

    def _merged(self, parts: Tensor) -> Tensor:
        """Parts [parts, 8, n] -> [4, n] float64 as `TorchTiles.statistics` gives it, in a fixed order."""
        own_largest, own_sums, other_largest, other_sums, largest, sums, relative, reference = parts.double().unbind(1)
        for_logits, for_teacher = Scales.at(self.temperature)
        row_lse, _ = _merged_log_sum_exp(for_logits * own_largest, own_sums)
        column_lse, _ = _merged_log_sum_exp(for_logits * other_largest, other_sums)
        if not self.form.soft:
            return torch.stack([row_lse, column_lse, torch.zeros_like(row_lse), for_logits * relative.sum(0)])
        teacher_lse, weights = _merged_log_sum_exp(for_teacher * largest, sums)
        mean = self.form.same_weight * for_logits * (weights * (relative + reference)).sum(0)
        return torch.stack([row_lse, column_lse, teacher_lse, mean])

    def target_sums(self, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> tuple[Tensor, Tensor | None]:
        parts = kernels.target_sums(self.x, self.y, self.temperature, vectors, rows, columns, two_sided=two_sided)
        q, total, high, low = parts[0].sum(0, dtype=torch.float64).unbind()
        for_rows = torch.stack([q, total, high + low])
        if parts[1] is None:
            return for_rows, None
        q, total, high, low = parts[1].sum(0, dtype=torch.float64).unbind()
        return for_rows, torch.stack([q, total, high + low])

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        if self._buffers is None:
            size = min(self.block_size, len(self.x)) * len(self.x)
            self._buffers = torch.empty(3, size, dtype=self._tile_dtype, device=self.x.device)
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        logits, transposed_logits, teacher = (buffer[: height * width].view(height, width) for buffer in self._buffers)
        with_teacher = through_teacher and self.form.soft
        parts = kernels.gradients(
            self.x,
            self.y,
            self.temperature,
            statistics,
            rows,
            columns,
            (logits, transposed_logits, teacher if with_teacher else None),
            soft=self.form.soft,
            row_normalized=self.form.row_normalized,
            two_sided=two_sided,
        )
        temperature = parts.double().sum()
        return TileGradients(logits, transposed_logits, teacher if with_teacher else None, temperature, 1.0, 1.0)


def _merged_log_sum_exp(largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [n] in bits of parts [parts, n], and each part's share of it."""
    overall = largest.amax(0)
    scaled = sums * torch.exp2(largest - overall)
    total = scaled.sum(0)
    return overall + total.log2(), scaled / total
