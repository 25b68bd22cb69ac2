"""The variants of the CMSA kernels that the gate compiles, with their bytes and operations by formula (see `gate`)."""

from __future__ import annotations

from sda_fast.kernels import cmsa, cmsa_device
from sda_fast.kernels.gate import KernelVariant

B, D = 65536, 3584
ROWS = 1280
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
PROBLEM = f"B={B} D={D} rows={ROWS}"
INTEGERS = ("first_row", "rows_count", "first_column", "columns_count", "D", "stride_x_item", "stride_y_item")
ALIGNED = ("rows_count", "columns_count", "D", "stride_x_item", "stride_y_item", "items_count")


def _variant(
    name: str,
    kernel,
    config: cmsa.TileConfig,
    type_name: str,
    pointers: dict[str, str],
    constexprs: dict[str, object],
    *,
    products: int,
    written: int,
    items: bool,
) -> KernelVariant:
    # a strip of rows against all columns: the rows' vectors are read once per block of columns and the other way round
    blocks = (ROWS // config.block_rows) * (B // config.block_columns)
    tile_bytes = 2 * (config.block_rows + config.block_columns) * D * SIZES[type_name]
    integers = (*INTEGERS, "items_count") if items else INTEGERS
    return KernelVariant(
        name=f"cmsa {name} {type_name}",
        kernel=kernel,
        signature={
            "x_ptr": f"*{type_name}",
            "y_ptr": f"*{type_name}",
            "temperature_ptr": "*fp32",
            **pointers,
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "stride_x_dimension": 1,
            "stride_y_dimension": 1,
            **constexprs,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
            "BLOCK_D": config.block_d,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(a for a in ALIGNED if a in integers),
        problem=PROBLEM,
        bytes_moved=blocks * tile_bytes + written,
        bytes_floor=2 * (ROWS + B) * D * SIZES[type_name] + written,
        flops=2 * products * ROWS * B * D,
    )


def statistics(type_name: str, *, soft: bool, row_normalized: bool, two_sided: bool) -> KernelVariant:
    config = cmsa.CONFIGS["statistics", SIZES[type_name]]
    row_blocks, column_blocks = ROWS // config.block_rows, B // config.block_columns
    words = ["soft" if soft else "hard", *["row-normalised"] * row_normalized, *["two-sided"] * two_sided]
    return _variant(
        "statistics " + " ".join(words),
        cmsa_device.statistics_kernel,
        config,
        type_name,
        {"for_rows_ptr": "*fp32", **({"for_columns_ptr": "*fp32"} if two_sided else {})},
        {
            "SOFT": soft,
            "ROW_NORMALIZED": row_normalized,
            "TWO_SIDED": two_sided,
            **({} if two_sided else {"for_columns_ptr": None}),
        },
        products=4 if soft else 2,
        written=28 * (column_blocks * ROWS + row_blocks * B * two_sided),
        items=False,
    )


def target_sums(type_name: str) -> KernelVariant:
    config = cmsa.CONFIGS["target_sums", SIZES[type_name]]
    return _variant(
        "target sums two-sided",
        cmsa_device.target_sums_kernel,
        config,
        type_name,
        {"vectors_ptr": "*fp32", "for_rows_ptr": "*fp32", "for_columns_ptr": "*fp32"},
        {"TWO_SIDED": True},
        products=2,
        written=16 * (B // config.block_columns * ROWS + ROWS // config.block_rows * B),
        items=True,
    )


def gradients(
    type_name: str, *, soft: bool = True, row_normalized: bool = False, through_teacher: bool = True, two_sided: bool
) -> KernelVariant:
    config = cmsa.CONFIGS["gradients", SIZES[type_name]]
    tile_type = "bf16" if type_name == "bf16" else "fp32"
    tiles = 3 if through_teacher else 2
    words = ["soft" if soft else "hard", *["row-normalised"] * row_normalized]
    words += [*["detached"] * (soft and not through_teacher), *["two-sided"] * two_sided]
    return _variant(
        "gradients " + " ".join(words),
        cmsa_device.gradients_kernel,
        config,
        type_name,
        {
            "statistics_ptr": "*fp32",
            "logits_gradient_ptr": f"*{tile_type}",
            "transposed_gradient_ptr": f"*{tile_type}",
            "temperature_parts_ptr": "*fp32",
            **({"teacher_gradient_ptr": f"*{tile_type}"} if through_teacher else {}),
        },
        {
            "SOFT": soft,
            "ROW_NORMALIZED": row_normalized,
            "THROUGH_TEACHER": through_teacher,
            "TWO_SIDED": two_sided,
            **({} if through_teacher else {"teacher_gradient_ptr": None}),
        },
        products=4 if soft else 2,
        written=tiles * SIZES[tile_type] * ROWS * B,
        items=True,
    )


VARIANTS = (
    *(statistics(t, soft=True, row_normalized=False, two_sided=True) for t in SIZES),
    *(target_sums(t) for t in SIZES),
    *(gradients(t, two_sided=t == "fp32") for t in SIZES),
    statistics("bf16", soft=True, row_normalized=True, two_sided=True),
    statistics("bf16", soft=True, row_normalized=False, two_sided=False),
    statistics("bf16", soft=False, row_normalized=False, two_sided=True),
    gradients("bf16", two_sided=True),
    gradients("bf16", row_normalized=True, two_sided=False),
    gradients("bf16", through_teacher=False, two_sided=False),
    gradients("bf16", soft=False, through_teacher=False, two_sided=False),
)
