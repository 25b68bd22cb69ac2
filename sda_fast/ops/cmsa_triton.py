"""CMSA's tiles through the Triton kernels: one launch per block of rows, products by the matrix library."""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.kernels import cmsa as kernels
from sda_fast.ops.cmsa_tiles import Form, Span, TileGradients


class TritonTiles:
    """The tiles of `cmsa_tiles.TorchTiles` on a GPU; a visit spans all columns.

    Gradient tiles are bfloat16 for bfloat16 vectors, whose exponents hold any gradient, and float32 otherwise (float16
    vectors are then widened for the products).

    Args:
        x, y: [B, D] image and text vectors, float32, float16 or bfloat16, any strides.
        temperature: scalar tensor; never looked at by the host.
        form: which loss.
        block_size: rows of a visit, or 0 to choose them from `workspace_bytes`.
        workspace_bytes: bound of the three gradient tiles' memory; at least `MIN_ROWS` rows are taken.
    """

    MIN_ROWS = 128

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, workspace_bytes: int
    ) -> None:
        self.x, self.y, self.form = x, y, form
        self.temperature = temperature.float().contiguous()
        self._tile_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        rows_in_workspace = workspace_bytes // (3 * self._tile_dtype.itemsize * len(x))
        self.block_size = block_size or max(self.MIN_ROWS, rows_in_workspace // self.MIN_ROWS * self.MIN_ROWS)
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
        """[parts, 4, n] -> [4, n], in a fixed order."""
        log_sum_exps = parts[:, :3]
        largest = log_sum_exps.amax(0)
        exponentials = torch.exp2(log_sum_exps - largest)
        sums = exponentials.sum(0)
        weights = exponentials[:, 2] / sums[2] if self.form.soft else 1.0
        target_logits = (weights * parts[:, 3]).sum(0)
        return torch.cat([largest + sums.log2(), target_logits.unsqueeze(0)])

    def target_sums(
        self, rows: Span, columns: Span, teacher_lse: Tensor, column_lse: Tensor, two_sided: bool
    ) -> tuple[Tensor, Tensor | None]:
        for_rows, for_columns = kernels.target_sums(
            self.x, self.y, self.temperature, teacher_lse, column_lse, rows, columns, two_sided=two_sided
        )
        return for_rows.sum(0), None if for_columns is None else for_columns.sum(0)

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
