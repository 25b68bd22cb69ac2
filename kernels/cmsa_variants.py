"""The variants of the CMSA kernels that the gate compiles, with their bytes and operations by formula (see `gate`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sda_fast.kernels import cmsa, cmsa_device, cmsa_halves, cmsa_merge, split_sums
from sda_fast.kernels.gate import KernelVariant

B, D = 65536, 3584
ROWS = 1280
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
PROBLEM = f"B={B} D={D} rows={ROWS}"
BLOCK = 4608
PROBLEM_WITH_PRODUCTS = f"block={BLOCK}"
INTEGERS = ("first_row", "rows_count", "first_column", "columns_count", "D", "stride_x_item", "stride_y_item")
ALIGNED = ("rows_count", "columns_count", "D", "stride_x_item", "stride_y_item", "items_count")
PRODUCTS = ("logits_ptr", "transposed_ptr", "teacher_ptr", "halves_ptr")
STRIDES = ("stride_product", "stride_transposed_row", "stride_transposed_column")


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
            **dict.fromkeys(PRODUCTS),
            **dict.fromkeys(("stride_x_dimension", "stride_y_dimension", *STRIDES), 1),
            **constexprs,
            "PRODUCTS_GIVEN": False,
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
            "TEACHER_ADDED": False,
            "TWO_SIDED": two_sided,
            **({} if through_teacher else {"teacher_gradient_ptr": None}),
        },
        products=4 if soft else 2,
        written=tiles * SIZES[tile_type] * ROWS * B,
        items=True,
    )


def with_products(
    variant: KernelVariant,
    config: cmsa.TileConfig,
    way: str,
    written: int,
    *,
    logits: bool = True,
    soft: bool = True,
    **constexprs: Any,
) -> KernelVariant:
    """The variant of the same kernel that reads a block's products, and writes `written` bytes.

    Args:
        way: a "pair" of blocks, a "pair by halves", or items against themselves ("own": L in M's place too).
        logits, soft: which products it reads.
    """
    own, halves = way.startswith("own"), way.endswith("by halves")
    pointers = dict.fromkeys(
        ["logits_ptr"] * logits
        + ["transposed_ptr"] * (logits or halves)
        + ["teacher_ptr"] * soft
        + ["halves_ptr"] * halves,
        "*fp32",
    )
    strides = {"stride_product": "i32"}
    if "transposed_ptr" in pointers:
        strides["stride_transposed_column" if own else "stride_transposed_row"] = "i32"
    kept = {
        name: kind for name, kind in variant.signature.items() if name in (*INTEGERS[:4], "items_count") or "*" in kind
    }
    signature = {name: kind for name, kind in kept.items() if name not in ("x_ptr", "y_ptr")} | pointers | strides
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    read = logits + ((logits and not own) or halves) + soft
    moved = 4 * read * BLOCK**2 + written
    constants = {
        **variant.constexprs,
        **dict.fromkeys(("x_ptr", "y_ptr", *PRODUCTS)),
        **dict.fromkeys((*INTEGERS[4:], "stride_x_dimension", "stride_y_dimension", *STRIDES), 1),
        "PRODUCTS_GIVEN": True,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_D": 1,
        **constexprs,
    }
    words = [name for name, value in constexprs.items() if value]
    return replace(
        variant,
        name=" ".join((variant.name, *words, "given", way)).lower().replace("_", " "),
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name not in signature},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in (*ALIGNED, *STRIDES) if name in signature),
        problem=PROBLEM_WITH_PRODUCTS,
        bytes_moved=moved,
        bytes_floor=moved,
        flops=0,
        tensor_cores=False,
    )


def parts_bytes(config: cmsa.TileConfig, lines: int) -> int:
    """Of the parts that both sides of a block get, of `lines` numbers an item."""
    return 4 * lines * BLOCK * (BLOCK // config.block_rows + BLOCK // config.block_columns)


def reading_variants() -> tuple[KernelVariant, ...]:
    """The kernels where the matrix library forms the products; these do not depend on the vectors' dtype."""
    configs = cmsa.CONFIGS_WITH_PRODUCTS
    first, second, last = (configs[name] for name in ("statistics", "target_sums", "gradients"))
    tile = SIZES["bf16"] * BLOCK**2
    both = {"row_normalized": False, "two_sided": True}
    one = {"row_normalized": False, "two_sided": False}
    of_rows = {"row_normalized": True, "two_sided": False}
    hard = {"soft": False, "through_teacher": False}
    added = {"TEACHER_ADDED": True}
    own_tiles: dict[str, Any] = {"transposed_gradient_ptr": None}
    return (
        with_products(statistics("bf16", soft=True, **both), first, "pair by halves", parts_bytes(first, 8)),
        with_products(statistics("bf16", soft=True, **both), first, "pair", parts_bytes(first, 8)),
        with_products(statistics("bf16", soft=True, **one), first, "own", parts_bytes(first, 8)),
        with_products(statistics("bf16", soft=True, **of_rows), first, "pair", parts_bytes(first, 8)),
        with_products(statistics("bf16", soft=False, **both), first, "pair", parts_bytes(first, 6), soft=False),
        with_products(target_sums("bf16"), second, "pair by halves", parts_bytes(second, 4), logits=False),
        with_products(target_sums("bf16"), second, "pair", parts_bytes(second, 4), logits=False),
        with_products(gradients("bf16", two_sided=True), last, "pair by halves", 3 * tile, **added),
        with_products(gradients("bf16", two_sided=True), last, "pair", 3 * tile, **added),
        with_products(gradients("fp32", two_sided=True), last, "pair", 6 * tile),
        with_products(gradients("bf16", two_sided=False), last, "own", 2 * tile, **added, **own_tiles),
        # a strip of rows of one block
        with_products(gradients("bf16", two_sided=False), last, "own strip", 3 * tile, **added),
        with_products(gradients("bf16", **of_rows), last, "pair", 3 * tile, **added),
        with_products(gradients("bf16", **hard, two_sided=True), last, "pair", 2 * tile, soft=False),
    )


def merging(*, soft: bool) -> KernelVariant:
    parts = BLOCK // cmsa.CONFIGS_WITH_PRODUCTS["statistics"].block_rows
    moved = (32 if soft else 20) * parts * BLOCK
    return KernelVariant(
        name="cmsa merge statistics " + ("soft" if soft else "hard"),
        kernel=cmsa_merge.merge_statistics_kernel,
        signature={
            "parts_ptr": "*fp32",
            "temperature_ptr": "*fp32",
            "running_ptr": "*fp64",
            **dict.fromkeys(("parts_count", "length", "stride_running"), "i32"),
        },
        constexprs={
            "SOFT": soft,
            "BLOCK_PARTS": cmsa_merge.BLOCK_PARTS,
            "BLOCK_ITEMS": cmsa_merge.BLOCK_ITEMS,
        },
        num_warps=cmsa_merge.NUM_WARPS,
        num_stages=1,
        aligned=("length", "stride_running"),
        problem=PROBLEM_WITH_PRODUCTS,
        bytes_moved=moved,
        bytes_floor=moved,
        flops=0,
        tensor_cores=False,
    )


def adding_target_sums() -> KernelVariant:
    moved = 16 * BLOCK // cmsa.CONFIGS_WITH_PRODUCTS["target_sums"].block_rows * BLOCK
    return KernelVariant(
        name="cmsa add target sums",
        kernel=cmsa_merge.add_target_sums_kernel,
        signature={
            "parts_ptr": "*fp32",
            "running_ptr": "*fp64",
            **dict.fromkeys(("parts_count", "length", "stride_running"), "i32"),
        },
        constexprs={"BLOCK_PARTS": cmsa_merge.BLOCK_PARTS, "BLOCK_ITEMS": cmsa_merge.BLOCK_ITEMS},
        num_warps=cmsa_merge.NUM_WARPS,
        num_stages=1,
        aligned=("length", "stride_running"),
        problem=PROBLEM_WITH_PRODUCTS,
        bytes_moved=moved,
        bytes_floor=moved,
        flops=0,
        tensor_cores=False,
    )


def split_sum(kernel, name: str, pointers: dict[str, str], constexprs: dict[str, object], moved: int) -> KernelVariant:
    """A kernel over the gradients [BLOCK, D]; `moved` bytes an element."""
    factors = {} if kernel is split_sums.finish_kernel else dict.fromkeys(("first_factor", "second_factor"), "fp32")
    sums = {} if kernel is split_sums.write_kernel else {"high_ptr": "*i16", "low_ptr": "*u8"}
    return KernelVariant(
        name=f"split sums {name}",
        kernel=kernel,
        signature={**sums, **pointers, "count": "i32", **factors},
        constexprs={**constexprs, "BLOCK": split_sums.BLOCK},
        num_warps=split_sums.NUM_WARPS,
        num_stages=3,
        aligned=("count",),
        problem=PROBLEM_WITH_PRODUCTS,
        bytes_moved=moved * BLOCK * D,
        bytes_floor=moved * BLOCK * D,
        flops=0,
        tensor_cores=False,
    )


def halves(kernel, name: str, pointers: dict[str, str], integers: tuple[str, ...], moved: int) -> KernelVariant:
    """A kernel over bfloat16 vectors [BLOCK, D]; `moved` bytes an element."""
    return KernelVariant(
        name=f"cmsa {name} of halves bf16",
        kernel=kernel,
        signature={
            **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
            **pointers,
            **dict.fromkeys((*integers, "D", "stride_x_item", "stride_y_item"), "i32"),
        },
        constexprs={"stride_x_dimension": 1, "stride_y_dimension": 1, "BLOCK_D": cmsa_halves.BLOCK_D},
        num_warps=cmsa_halves.NUM_WARPS,
        num_stages=3,
        aligned=(*integers, "D", "stride_x_item", "stride_y_item"),
        problem=PROBLEM_WITH_PRODUCTS,
        bytes_moved=moved * BLOCK * D,
        bytes_floor=moved * BLOCK * D,
        flops=0,
        tensor_cores=False,
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
    *reading_variants(),
    merging(soft=True),
    merging(soft=False),
    adding_target_sums(),
    split_sum(
        split_sums.add_kernel,
        "add two",
        {"first_ptr": "*fp32", "second_ptr": "*fp32"},
        {"FROM_ZERO": False},
        14,
    ),
    split_sum(
        split_sums.add_kernel, "begin with one", {"first_ptr": "*fp32"}, {"second_ptr": None, "FROM_ZERO": True}, 7
    ),
    split_sum(
        split_sums.write_kernel,
        "write two",
        {"first_ptr": "*fp32", "second_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*bf16"},
        {},
        10,
    ),
    halves(cmsa_halves.described_kernel, "description", {"out_ptr": "*fp32"}, (), 4),
    halves(
        cmsa_halves.halves_kernel,
        "values",
        {"described_ptr": "*fp32", "sums_ptr": "*fp16", "differences_ptr": "*fp16"},
        ("first_item",),
        8,
    ),
    split_sum(split_sums.finish_kernel, "finish bf16", {"scale_ptr": "*fp32", "out_ptr": "*bf16"}, {}, 5),
    split_sum(split_sums.finish_kernel, "finish fp16", {"scale_ptr": "*fp32", "out_ptr": "*fp16"}, {}, 5),
)
