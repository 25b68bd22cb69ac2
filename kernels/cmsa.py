"""Launchers of the CMSA and InfoNCE kernels: a block of rows against a block of columns.

Every reduction is in two stages: a program leaves its part, the caller adds. Sizes: B items, D dimensions; a launch
covers `rows` x `columns`, two spans of items. What is computed is said in `cmsa_device`.

`Products`, where given, need not be computed. `target_sums` reads the teacher's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sda_fast.kernels.cmsa_device import gradients_kernel, statistics_kernel, target_sums_kernel
from sda_fast.kernels.configs import cdiv

Span = tuple[int, int]


class Products(NamedTuple):
    """Products of a block, [rows, columns] float32 each; None for what is not there.

    Attributes:
        logits: x_i y_j, columns adjacent.
        transposed: y_i x_j, any strides; with `halves` the products of the scaled x - y.
        teacher: x_i x_j + y_i y_j, at the same distance of rows as `logits`; with `halves` those of the scaled x + y.
        halves: [B, 3] from `cmsa_halves.described`.
    """

    logits: torch.Tensor | None
    transposed: torch.Tensor | None
    teacher: torch.Tensor | None
    halves: torch.Tensor | None = None

    def strides(self) -> tuple[int, int, int]:
        rows = next(one for one in (self.logits, self.teacher) if one is not None).stride(0)
        return (rows, 1, 1) if self.transposed is None else (rows, self.transposed.stride(0), self.transposed.stride(1))


NO_PRODUCTS = Products(None, None, None)


@dataclass(frozen=True)
class TileConfig:
    """Rows, columns and dimensions of a program's tile, its warps and the depth of its software pipeline."""

    block_rows: int
    block_columns: int
    block_d: int
    num_warps: int
    num_stages: int


# (kernel, bytes per element): chosen by registers and shared memory of compiled code, not by timing
CONFIGS: dict[tuple[str, int], TileConfig] = {
    ("statistics", 2): TileConfig(64, 64, 32, 8, 3),
    ("statistics", 4): TileConfig(64, 32, 16, 8, 3),
    ("target_sums", 2): TileConfig(128, 64, 64, 8, 3),
    ("target_sums", 4): TileConfig(64, 64, 16, 8, 3),
    ("gradients", 2): TileConfig(64, 32, 64, 4, 3),
    ("gradients", 4): TileConfig(64, 32, 16, 8, 3),
}
# with the products given there are no dimensions to go through; at least 16 warps fit a multiprocessor's registers
CONFIGS_WITH_PRODUCTS: dict[str, TileConfig] = {
    "statistics": TileConfig(32, 128, 1, 8, 1),
    "target_sums": TileConfig(32, 128, 1, 8, 1),
    "gradients": TileConfig(16, 128, 1, 8, 1),
}


def _grid(config: TileConfig, rows: Span, columns: Span) -> tuple[int, int]:
    return cdiv(rows[1] - rows[0], config.block_rows), cdiv(columns[1] - columns[0], config.block_columns)


def _chosen(name: str, x: torch.Tensor, products: Products | None) -> TileConfig:
    return CONFIGS[name, x.element_size()] if products is None else CONFIGS_WITH_PRODUCTS[name]


def _launch(
    kernel, config: TileConfig, rows: Span, columns: Span, x, y, products, pointers, options, *, items: bool = False
):
    counts = (len(x),) if items else ()
    if products is None:
        given, vectors, sizes, strides = NO_PRODUCTS, (x, y), (x.shape[1], *x.stride(), *y.stride()), (1,) * 3
    else:
        given, vectors, sizes, strides = products, (None, None), (1,) * 5, products.strides()
    kernel[_grid(config, rows, columns)](
        *vectors,
        *given,
        *pointers,
        *counts,
        rows[0],
        rows[1] - rows[0],
        columns[0],
        columns[1] - columns[0],
        *sizes,
        *strides,
        **options,
        PRODUCTS_GIVEN=products is not None,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def statistics(
    x: torch.Tensor,
    y: torch.Tensor,
    temperature: torch.Tensor,
    rows: Span,
    columns: Span,
    *,
    soft: bool,
    row_normalized: bool,
    two_sided: bool,
    products: Products | None = None,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """First-sweep parts of a block.

    Args:
        x, y: [B, D], float32, float16 or bfloat16, any strides.
        temperature: one float32 on the same device.
        rows, columns: the spans of items.
        soft, row_normalized, two_sided: which loss, and whether the columns' items are served too.

    Returns:
        [column blocks, 8, rows] and, if two-sided, [row blocks, 8, columns], float32: the largest product and the sum
        of exponentials relative to it for L's row, L's column and S's row; the mean under the teacher of the products
        x_i y_j (row-normalised: plus x_j y_i) less a reference, and the reference. Hard targets: the product x_i y_i,
        of one part, and nothing.
    """
    config = config or _chosen("statistics", x, products)
    row_blocks, column_blocks = _grid(config, rows, columns)
    for_rows = x.new_empty(column_blocks, 8, rows[1] - rows[0], dtype=torch.float32)
    for_columns = x.new_empty(row_blocks, 8, columns[1] - columns[0], dtype=torch.float32) if two_sided else None
    options = {"SOFT": soft, "ROW_NORMALIZED": row_normalized, "TWO_SIDED": two_sided}
    pointers = (temperature, for_rows, for_columns)
    _launch(statistics_kernel, config, rows, columns, x, y, products, pointers, options)
    return for_rows, for_columns


def target_sums(
    x: torch.Tensor,
    y: torch.Tensor,
    temperature: torch.Tensor,
    vectors: torch.Tensor,
    rows: Span,
    columns: Span,
    *,
    two_sided: bool,
    products: Products | None = None,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Second-sweep parts of a block.

    Args:
        vectors: [4, B] contiguous float32: c and s in units of the products, each as high and low part.

    Returns:
        [column blocks, 4, rows] and, if two-sided, [row blocks, 4, columns], float32: sum_j T_ji, sum_j T_ij, the high
        part of a c_j as reference, and sum_j T_ij (c_j less the reference).
    """
    config = config or _chosen("target_sums", x, products)
    row_blocks, column_blocks = _grid(config, rows, columns)
    for_rows = x.new_empty(column_blocks, 4, rows[1] - rows[0], dtype=torch.float32)
    for_columns = x.new_empty(row_blocks, 4, columns[1] - columns[0], dtype=torch.float32) if two_sided else None
    pointers, options = (temperature, vectors, for_rows, for_columns), {"TWO_SIDED": two_sided}
    _launch(target_sums_kernel, config, rows, columns, x, y, products, pointers, options, items=True)
    return for_rows, for_columns


def gradients(
    x: torch.Tensor,
    y: torch.Tensor,
    temperature: torch.Tensor,
    statistics: torch.Tensor,
    rows: Span,
    columns: Span,
    tiles: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    *,
    soft: bool,
    row_normalized: bool,
    two_sided: bool,
    teacher_added: bool = False,
    products: Products | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Write dL_ij / tau, dL_ji / tau and tau/2 (dS_ij + dS_ji), the latter two unless None, in units of 1/(2B).

    With `teacher_added` the third is also added to the first two.

    Args:
        statistics: [11, B] contiguous float32, in units of the products r, c, s, h, t, as high and low part each; q.
        tiles: three contiguous [rows, columns] buffers.

    Returns:
        Parts of tau times the temperature's gradient, float32, one per program.
    """
    config = config or _chosen("gradients", x, products)
    row_blocks, column_blocks = _grid(config, rows, columns)
    parts = x.new_empty(row_blocks * column_blocks, dtype=torch.float32)
    options = {
        "SOFT": soft,
        "ROW_NORMALIZED": row_normalized,
        "THROUGH_TEACHER": tiles[2] is not None,
        "TEACHER_ADDED": teacher_added and tiles[2] is not None,
        "TWO_SIDED": two_sided,
    }
    pointers = (temperature, statistics, *tiles, parts)
    _launch(gradients_kernel, config, rows, columns, x, y, products, pointers, options, items=True)
    return parts
