"""CMSA's tiles through the Triton kernels: one launch per visit, gradient products by the matrix library."""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.kernels import cmsa as kernels
from sda_fast.kernels import cmsa_merge
from sda_fast.ops.cmsa_blocks import gradient_dtype
from sda_fast.ops.cmsa_products import add_product
from sda_fast.ops.cmsa_sums import GradientSums, PlainRowSums, RowSums, WholeSums
from sda_fast.ops.cmsa_tiles import Form, Span, TileGradients


class TritonTiles:
    """The tiles of `cmsa_tiles.TorchTiles` on a GPU, products formed in the kernels; a visit spans all columns.

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
    teacher_added = False
    starts: tuple[int, ...] = (0,)

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, form: Form, block_size: int, workspace_bytes: int
    ) -> None:
        self.x, self.y, self.form = x, y, form
        self.temperature = temperature.float().contiguous()
        self.tile_dtype = gradient_dtype(x.dtype)
        self.block_size = block_size or self._rows_within(workspace_bytes)
        self._buffers: Tensor | None = None

    def _rows_within(self, workspace_bytes: int) -> int:
        items = len(self.x)
        rows = min(
            workspace_bytes // (3 * self.tile_dtype.itemsize * items),
            max(self.MIN_ROWS_OF_BLOCKS, items // self.BLOCKS),
        )
        return max(self.MIN_ROWS, rows // self.MIN_ROWS * self.MIN_ROWS)

    def columns_per_visit(self) -> int:
        return len(self.x)

    @property
    def completes_rows(self) -> bool:
        """Whether backward is cheapest as strips of rows against all items."""
        return False

    def rows_per_gradient(self) -> int:
        return self.block_size

    def operand(self, embeddings: Tensor, span: Span) -> Tensor:
        """The vectors of the items in `span`, in the dtype of the gradient tiles."""
        return embeddings[span[0] : span[1]].to(self.tile_dtype)

    def accumulate(self, total: Tensor, tile: Tensor, embeddings: Tensor, factor: float) -> None:
        """total += factor * tile @ embeddings, summed in float32."""
        add_product(total, tile, embeddings, alpha=factor)

    def sums(self, needs_x: bool, needs_y: bool) -> GradientSums:
        """Sums of the vectors' gradients for a symmetric sweep."""
        return WholeSums(self, torch.float32, (needs_x, needs_y))

    def row_sums(self, items: int, needs_x: bool, needs_y: bool) -> RowSums:
        """Sums of the gradients of a range of items."""
        return PlainRowSums(self, items, torch.float32, (needs_x, needs_y))

    def products(
        self, rows: Span, columns: Span, *, logits: bool = True, first_time: bool = False
    ) -> kernels.Products | None:
        """The products of a visit, where the kernels do not form them: see `kernels.cmsa`."""
        return None

    def add_statistics(self, running: Tensor, rows: Span, columns: Span, two_sided: bool) -> None:
        """Merge what a visit contributes to its rows' and columns' items into `running` [7, B] float64."""
        parts = kernels.statistics(
            self.x,
            self.y,
            self.temperature,
            rows,
            columns,
            soft=self.form.soft,
            row_normalized=self.form.row_normalized,
            two_sided=two_sided,
            products=self.products(rows, columns, first_time=True),
        )
        for span, of_span in zip((rows, columns), parts, strict=True):
            if of_span is not None:
                cmsa_merge.merge_statistics(
                    running[:, slice(*span)],
                    of_span,
                    self.temperature,
                    soft=self.form.soft,
                )

    def add_target_sums(self, running: Tensor, rows: Span, columns: Span, vectors: Tensor, two_sided: bool) -> None:
        """As `TorchTiles.add_target_sums`."""
        parts = kernels.target_sums(
            self.x,
            self.y,
            self.temperature,
            vectors,
            rows,
            columns,
            two_sided=two_sided,
            products=self.products(rows, columns, logits=False),
        )
        for span, of_span in zip((rows, columns), parts, strict=True):
            if of_span is not None:
                cmsa_merge.add_target_sums(running[:, slice(*span)], of_span)

    def tile_buffers(self, rows: Span, columns: Span) -> tuple[Tensor, Tensor | None, Tensor]:
        """[rows, columns] for dL, its other order and the teacher's, the same memory at every visit."""
        if self._buffers is None:
            size = min(self.block_size, len(self.x)) * min(self.columns_per_visit(), len(self.x))
            self._buffers = torch.empty(3, size, dtype=self.tile_dtype, device=self.x.device)
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        first, second, third = (buffer[: height * width].view(height, width) for buffer in self._buffers)
        return first, second, third

    def gradients(
        self, rows: Span, columns: Span, statistics: Tensor, through_teacher: bool, two_sided: bool
    ) -> TileGradients:
        """As `TorchTiles.gradients`; the tiles hold their factors."""
        products = self.products(rows, columns)
        logits, transposed_logits, teacher = self.tile_buffers(rows, columns)
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
            teacher_added=self.teacher_added,
            products=products,
        )
        return TileGradients(
            logits,
            logits.T if transposed_logits is None else transposed_logits,
            teacher if with_teacher else None,
            parts.sum(dtype=torch.float64),
            1.0,
            1.0,
            self.teacher_added and with_teacher,
        )
