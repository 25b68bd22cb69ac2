"""Device code of CMSA and InfoNCE: statistics, target sums and gradient tiles of rows against columns.

For items i among the rows and j among the columns a program forms L_ij = x_i y_j / tau, L_ji and the teacher
S_ij = tau/2 (x_i x_j + y_i y_j) from one pass over the dimensions: four loads feed four products. They stay bare
products until two of them have been subtracted, which is exact where the difference is small; differences are scaled to
bits (times log2 e). Every reduction is in two stages: a program leaves its part, the caller adds.
With PRODUCTS_GIVEN the products come from memory, [rows, columns] float32 each, and there are no vectors.
Sizes: B items, D dimensions; a launch covers `rows` x `columns`, two spans of items.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sda_fast.kernels.launching import kernel

BITS_PER_NAT = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(ptr, items, item_mask, dimensions, D, stride_item, stride_dimension):
    """[items, dimensions] of the embeddings, zero outside."""
    ptrs = ptr + items.to(tl.int64)[:, None] * stride_item + dimensions.to(tl.int64)[None, :] * stride_dimension
    return tl.load(ptrs, mask=item_mask[:, None] & (dimensions < D)[None, :], other=0.0)


@triton.jit
def items_of_tile(AXIS: tl.constexpr, first, count, BLOCK: tl.constexpr):
    """Along an axis of the grid: this program's block, its items from the span's first on, the same in the batch, and
    which of them are in the span."""
    block = tl.program_id(AXIS)
    local = block * BLOCK + tl.arange(0, BLOCK)
    return block, local, first + local, local < count


@triton.jit
def load_pair(ptrs, line, length, mask, AXIS: tl.constexpr):
    """Lines `line` and `line` + 1 of an array of lines of `length`, the high and the low part, with a new axis."""
    high = tl.load(ptrs + line * length, mask=mask, other=0.0)
    low = tl.load(ptrs + (line + 1) * length, mask=mask, other=0.0)
    return tl.expand_dims(high, AXIS), tl.expand_dims(low, AXIS)


@triton.jit
def given_tiles(
    logits_ptr,
    transposed_ptr,
    teacher_ptr,
    halves_ptr,
    stride_product,
    stride_transposed_row,
    stride_transposed_column,
    local_rows,
    rows,
    row_mask,
    local_columns,
    columns,
    column_mask,
    WITH_LOGITS: tl.constexpr,
    WITH_TEACHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """What `product_tiles` gives, from memory.

    With `halves_ptr` they come from products of scaled sums and differences, see `cmsa_halves`: teacher_ptr has those
    of x + y and transposed_ptr those of x - y.
    """
    logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    transposed_logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    teacher = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    lines = local_rows.to(tl.int64)[:, None]
    offsets = lines * stride_product + local_columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if WITH_LOGITS:
        logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    if WITH_LOGITS or halves_ptr is not None:
        places = lines * stride_transposed_row + local_columns.to(tl.int64)[None, :] * stride_transposed_column
        transposed_logits = tl.load(transposed_ptr + places, mask=mask, other=0.0)
    if WITH_TEACHER:
        teacher = tl.load(teacher_ptr + offsets, mask=mask, other=0.0)
        if halves_ptr is not None:
            row_ptrs = halves_ptr + 3 * rows
            column_ptrs = halves_ptr + 3 * columns
            row_scales = 0.5 * tl.load(row_ptrs, mask=row_mask, other=0.0)[:, None]
            column_scales = tl.load(column_ptrs, mask=column_mask, other=0.0)[None, :]
            of_sums = teacher * row_scales * column_scales
            of_differences = transposed_logits * row_scales * column_scales
            row_excess = tl.load(row_ptrs + 1, mask=row_mask, other=0.0)[:, None]
            column_excess = tl.load(column_ptrs + 1, mask=column_mask, other=0.0)[None, :]
            teacher = (of_sums + of_differences) - (row_excess + column_excess)
            if WITH_LOGITS:
                row_excess = tl.load(row_ptrs + 2, mask=row_mask, other=0.0)[:, None]
                column_excess = tl.load(column_ptrs + 2, mask=column_mask, other=0.0)[None, :]
                transposed_logits = ((of_sums - of_differences) - (row_excess + column_excess)) - logits
    return logits, transposed_logits, teacher


@triton.jit
def product_tiles(
    x_ptr,
    y_ptr,
    rows,
    row_mask,
    columns,
    column_mask,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    WITH_LOGITS: tl.constexpr,
    WITH_TEACHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x_i y_j, y_i x_j and x_i x_j + y_i y_j in float32; those not asked for stay zero."""
    logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    transposed_logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    teacher = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        dimensions = first + tl.arange(0, BLOCK_D)
        x_rows = load_tile(x_ptr, rows, row_mask, dimensions, D, stride_x_item, stride_x_dimension)
        y_rows = load_tile(y_ptr, rows, row_mask, dimensions, D, stride_y_item, stride_y_dimension)
        x_columns = load_tile(x_ptr, columns, column_mask, dimensions, D, stride_x_item, stride_x_dimension)
        y_columns = load_tile(y_ptr, columns, column_mask, dimensions, D, stride_y_item, stride_y_dimension)
        if WITH_LOGITS:
            logits = tl.dot(x_rows, tl.trans(y_columns), logits, input_precision="tf32x3")
            transposed_logits = tl.dot(y_rows, tl.trans(x_columns), transposed_logits, input_precision="tf32x3")
        if WITH_TEACHER:
            teacher = tl.dot(x_rows, tl.trans(x_columns), teacher, input_precision="tf32x3")
            teacher = tl.dot(y_rows, tl.trans(y_columns), teacher, input_precision="tf32x3")
    return logits, transposed_logits, teacher


@triton.jit
def softmax_parts(scores, scale, AXIS: tl.constexpr):
    """(largest, exp2(scale (scores - largest)), their sums) along an axis; -inf marks what does not count."""
    largest = tl.max(scores, AXIS)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    exponentials = tl.exp2((scores - tl.expand_dims(shift, AXIS)) * scale)
    sums = tl.sum(exponentials, AXIS)
    return shift, exponentials, sums


@triton.jit
def store_statistics(
    out_ptr,
    part,
    local,
    local_mask,
    length,
    own_logits,
    other_logits,
    teacher,
    mask,
    on_diagonal,
    logits_scale,
    teacher_scale,
    AXIS: tl.constexpr,
    SOFT: tl.constexpr,
    ROW_NORMALIZED: tl.constexpr,
):
    """Reduce one tile along an axis and leave part `part` of [parts, 8, length]; see `statistics`."""
    out_ptrs = out_ptr + part.to(tl.int64) * 8 * length + local
    own_largest, _, own_sums = softmax_parts(tl.where(mask, own_logits, float("-inf")), logits_scale, AXIS)
    other_largest, _, other_sums = softmax_parts(tl.where(mask, other_logits, float("-inf")), logits_scale, AXIS)
    tl.store(out_ptrs, own_largest, mask=local_mask)
    tl.store(out_ptrs + length, own_sums, mask=local_mask)
    tl.store(out_ptrs + 2 * length, other_largest, mask=local_mask)
    tl.store(out_ptrs + 3 * length, other_sums, mask=local_mask)
    if SOFT:
        scores = tl.where(mask, teacher, float("-inf"))
        largest, exponentials, sums = softmax_parts(scores, teacher_scale, AXIS)
        tl.store(out_ptrs + 4 * length, largest, mask=local_mask)
        tl.store(out_ptrs + 5 * length, sums, mask=local_mask)
        target_logits = own_logits
        if ROW_NORMALIZED:
            target_logits += other_logits
        # relative to a likeliest target's, so that a teacher certain of one target gives exactly its logit
        likeliest = scores == tl.expand_dims(largest, AXIS)
        reference = tl.max(tl.where(likeliest, target_logits, float("-inf")), AXIS)
        reference = tl.where(reference == float("-inf"), 0.0, reference)
        relative = tl.where(mask, target_logits - tl.expand_dims(reference, AXIS), 0.0)
        tl.store(out_ptrs + 7 * length, reference, mask=local_mask)
        target_logits = tl.sum(exponentials * relative, AXIS) / sums
    else:
        target_logits = tl.sum(tl.where(on_diagonal, own_logits, 0.0), AXIS)
    tl.store(out_ptrs + 6 * length, target_logits, mask=local_mask)


@kernel
def statistics_kernel(
    x_ptr,
    y_ptr,
    logits_ptr,
    transposed_ptr,
    teacher_ptr,
    halves_ptr,
    temperature_ptr,
    for_rows_ptr,
    for_columns_ptr,
    first_row,
    rows_count,
    first_column,
    columns_count,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    stride_product,
    stride_transposed_row,
    stride_transposed_column,
    SOFT: tl.constexpr,
    ROW_NORMALIZED: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    PRODUCTS_GIVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_block, local_rows, rows, row_mask = items_of_tile(0, first_row, rows_count, BLOCK_ROWS)
    column_block, local_columns, columns, column_mask = items_of_tile(1, first_column, columns_count, BLOCK_COLUMNS)
    if PRODUCTS_GIVEN:
        logits, transposed_logits, teacher = given_tiles(
            logits_ptr,
            transposed_ptr,
            teacher_ptr,
            halves_ptr,
            stride_product,
            stride_transposed_row,
            stride_transposed_column,
            local_rows,
            rows,
            row_mask,
            local_columns,
            columns,
            column_mask,
            True,
            SOFT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    else:
        logits, transposed_logits, teacher = product_tiles(
            x_ptr,
            y_ptr,
            rows,
            row_mask,
            columns,
            column_mask,
            D,
            stride_x_item,
            stride_x_dimension,
            stride_y_item,
            stride_y_dimension,
            True,
            SOFT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_D,
        )
    temperature = tl.load(temperature_ptr)
    logits_scale = BITS_PER_NAT / temperature
    teacher_scale = temperature * (0.5 * BITS_PER_NAT)
    mask = row_mask[:, None] & column_mask[None, :]
    on_diagonal = mask & (rows[:, None] == columns[None, :])
    store_statistics(
        for_rows_ptr,
        column_block,
        local_rows,
        row_mask,
        rows_count,
        logits,
        transposed_logits,
        teacher,
        mask,
        on_diagonal,
        logits_scale,
        teacher_scale,
        1,
        SOFT,
        ROW_NORMALIZED,
    )
    if TWO_SIDED:
        store_statistics(
            for_columns_ptr,
            row_block,
            local_columns,
            column_mask,
            columns_count,
            transposed_logits,
            logits,
            teacher,
            mask,
            on_diagonal,
            logits_scale,
            teacher_scale,
            0,
            SOFT,
            ROW_NORMALIZED,
        )


@triton.jit
def below(scores, high, low, scale):
    """scale (scores - (high + low)), at most zero where rounding of huge scores says otherwise; NaN is kept."""
    difference = ((scores - high) - low) * scale
    return tl.where(difference > 0, 0.0, difference)


@triton.jit
def store_target_sums(
    out_ptr, part, local, local_mask, length, teacher, targets, transposed_targets, c, c_low, mask, AXIS: tl.constexpr
):
    """Reduce one tile along an axis and leave part `part` of [parts, 4, length]; see `target_sums`."""
    out_ptrs = out_ptr + part.to(tl.int64) * 4 * length + local
    tl.store(out_ptrs, tl.sum(transposed_targets, AXIS), mask=local_mask)
    tl.store(out_ptrs + length, tl.sum(targets, AXIS), mask=local_mask)
    # relative to a likeliest target's, so that a teacher certain of one target gives exactly its c
    scores = tl.where(mask, teacher, float("-inf"))
    likeliest = scores == tl.expand_dims(tl.max(scores, AXIS), AXIS)
    reference = tl.max(tl.where(likeliest, c, float("-inf")), AXIS)
    reference = tl.where(reference == float("-inf"), 0.0, reference)
    tl.store(out_ptrs + 2 * length, reference, mask=local_mask)
    relative = (c - tl.expand_dims(reference, AXIS)) + c_low
    tl.store(out_ptrs + 3 * length, tl.sum(targets * relative, AXIS), mask=local_mask)


@kernel
def target_sums_kernel(
    x_ptr,
    y_ptr,
    logits_ptr,
    transposed_ptr,
    teacher_ptr,
    halves_ptr,
    temperature_ptr,
    vectors_ptr,
    for_rows_ptr,
    for_columns_ptr,
    items_count,
    first_row,
    rows_count,
    first_column,
    columns_count,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    stride_product,
    stride_transposed_row,
    stride_transposed_column,
    TWO_SIDED: tl.constexpr,
    PRODUCTS_GIVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_block, local_rows, rows, row_mask = items_of_tile(0, first_row, rows_count, BLOCK_ROWS)
    column_block, local_columns, columns, column_mask = items_of_tile(1, first_column, columns_count, BLOCK_COLUMNS)
    if PRODUCTS_GIVEN:
        _, _, teacher = given_tiles(
            logits_ptr,
            transposed_ptr,
            teacher_ptr,
            halves_ptr,
            stride_product,
            stride_transposed_row,
            stride_transposed_column,
            local_rows,
            rows,
            row_mask,
            local_columns,
            columns,
            column_mask,
            False,
            True,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    else:
        _, _, teacher = product_tiles(
            x_ptr,
            y_ptr,
            rows,
            row_mask,
            columns,
            column_mask,
            D,
            stride_x_item,
            stride_x_dimension,
            stride_y_item,
            stride_y_dimension,
            False,
            True,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_D,
        )
    teacher_scale = tl.load(temperature_ptr) * (0.5 * BITS_PER_NAT)
    mask = row_mask[:, None] & column_mask[None, :]
    row_vectors = vectors_ptr + rows
    column_vectors = vectors_ptr + columns
    s_rows, s_rows_low = load_pair(row_vectors, 2, items_count, row_mask, 1)
    s_columns, s_columns_low = load_pair(column_vectors, 2, items_count, column_mask, 0)
    c_columns, c_columns_low = load_pair(column_vectors, 0, items_count, column_mask, 0)
    targets = tl.where(mask, tl.exp2(below(teacher, s_rows, s_rows_low, teacher_scale)), 0.0)
    transposed_targets = tl.where(mask, tl.exp2(below(teacher, s_columns, s_columns_low, teacher_scale)), 0.0)
    store_target_sums(
        for_rows_ptr,
        column_block,
        local_rows,
        row_mask,
        rows_count,
        teacher,
        targets,
        transposed_targets,
        c_columns,
        c_columns_low,
        mask,
        1,
    )
    if TWO_SIDED:
        c_rows, c_rows_low = load_pair(row_vectors, 0, items_count, row_mask, 1)
        store_target_sums(
            for_columns_ptr,
            row_block,
            local_columns,
            column_mask,
            columns_count,
            teacher,
            transposed_targets,
            targets,
            c_rows,
            c_rows_low,
            mask,
            0,
        )


@kernel
def gradients_kernel(
    x_ptr,
    y_ptr,
    logits_ptr,
    transposed_ptr,
    teacher_ptr,
    halves_ptr,
    temperature_ptr,
    statistics_ptr,
    logits_gradient_ptr,
    transposed_gradient_ptr,
    teacher_gradient_ptr,
    temperature_parts_ptr,
    items_count,
    first_row,
    rows_count,
    first_column,
    columns_count,
    D,
    stride_x_item,
    stride_x_dimension,
    stride_y_item,
    stride_y_dimension,
    stride_product,
    stride_transposed_row,
    stride_transposed_column,
    SOFT: tl.constexpr,
    ROW_NORMALIZED: tl.constexpr,
    THROUGH_TEACHER: tl.constexpr,
    TEACHER_ADDED: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    PRODUCTS_GIVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_block, local_rows, rows, row_mask = items_of_tile(0, first_row, rows_count, BLOCK_ROWS)
    column_block, local_columns, columns, column_mask = items_of_tile(1, first_column, columns_count, BLOCK_COLUMNS)
    if PRODUCTS_GIVEN:
        logits, transposed_logits, teacher = given_tiles(
            logits_ptr,
            transposed_ptr,
            teacher_ptr,
            halves_ptr,
            stride_product,
            stride_transposed_row,
            stride_transposed_column,
            local_rows,
            rows,
            row_mask,
            local_columns,
            columns,
            column_mask,
            True,
            SOFT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    else:
        logits, transposed_logits, teacher = product_tiles(
            x_ptr,
            y_ptr,
            rows,
            row_mask,
            columns,
            column_mask,
            D,
            stride_x_item,
            stride_x_dimension,
            stride_y_item,
            stride_y_dimension,
            True,
            SOFT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_D,
        )
    temperature = tl.load(temperature_ptr)
    logits_scale = BITS_PER_NAT / temperature
    teacher_scale = temperature * (0.5 * BITS_PER_NAT)
    mask = row_mask[:, None] & column_mask[None, :]

    row_stats = statistics_ptr + rows
    column_stats = statistics_ptr + columns
    r_rows, r_rows_low = load_pair(row_stats, 0, items_count, row_mask, 1)
    r_columns, r_columns_low = load_pair(column_stats, 0, items_count, column_mask, 0)
    c_rows, c_rows_low = load_pair(row_stats, 2, items_count, row_mask, 1)
    c_columns, c_columns_low = load_pair(column_stats, 2, items_count, column_mask, 0)
    q_rows = tl.load(row_stats + 10 * items_count, mask=row_mask, other=0.0)[:, None]
    q_columns = tl.load(column_stats + 10 * items_count, mask=column_mask, other=0.0)[None, :]
    d_logits = tl.exp2(below(logits, r_rows, r_rows_low, logits_scale))
    d_logits += q_columns * tl.exp2(below(logits, c_columns, c_columns_low, logits_scale))
    d_transposed = tl.exp2(below(transposed_logits, r_columns, r_columns_low, logits_scale))
    d_transposed += q_rows * tl.exp2(below(transposed_logits, c_rows, c_rows_low, logits_scale))
    if SOFT:
        s_rows, s_rows_low = load_pair(row_stats, 4, items_count, row_mask, 1)
        s_columns, s_columns_low = load_pair(column_stats, 4, items_count, column_mask, 0)
        targets = tl.where(mask, tl.exp2(below(teacher, s_rows, s_rows_low, teacher_scale)), 0.0)
        transposed_targets = tl.where(mask, tl.exp2(below(teacher, s_columns, s_columns_low, teacher_scale)), 0.0)
        if ROW_NORMALIZED:
            d_logits -= targets + transposed_targets
            d_transposed -= targets + transposed_targets
        else:
            d_logits -= 2.0 * targets
            d_transposed -= 2.0 * transposed_targets
    else:
        on_diagonal = rows[:, None] == columns[None, :]
        d_logits -= tl.where(on_diagonal, 2.0, 0.0)
        d_transposed -= tl.where(on_diagonal, 2.0, 0.0)
    d_logits = tl.where(mask, d_logits, 0.0)
    d_transposed = tl.where(mask, d_transposed, 0.0)

    tile_offsets = local_rows.to(tl.int64)[:, None] * columns_count + local_columns[None, :]
    d_temperature = -tl.sum(d_logits * logits) / temperature
    if TWO_SIDED:
        d_temperature -= tl.sum(d_transposed * transposed_logits) / temperature
    d_logits /= temperature
    d_transposed /= temperature
    logits_gradient_ptrs = logits_gradient_ptr + tile_offsets
    if not TEACHER_ADDED:
        tl.store(logits_gradient_ptrs, d_logits.to(logits_gradient_ptr.dtype.element_ty), mask=mask)
        if transposed_gradient_ptr is not None:
            transposed_gradient_ptrs = transposed_gradient_ptr + tile_offsets
            tl.store(transposed_gradient_ptrs, d_transposed.to(logits_gradient_ptr.dtype.element_ty), mask=mask)
    if THROUGH_TEACHER:
        h_rows, h_rows_low = load_pair(row_stats, 6, items_count, row_mask, 1)
        h_columns, h_columns_low = load_pair(column_stats, 6, items_count, column_mask, 0)
        # differences come first: an item certain of its target gets exactly zero
        if ROW_NORMALIZED:
            both = logits + transposed_logits
            d_targets = (2.0 * h_rows - both) + 2.0 * h_rows_low
            d_transposed_targets = (2.0 * h_columns - both) + 2.0 * h_columns_low
        else:
            t_rows, t_rows_low = load_pair(row_stats, 8, items_count, row_mask, 1)
            t_columns, t_columns_low = load_pair(column_stats, 8, items_count, column_mask, 0)
            d_targets = (c_columns - t_rows) + (c_columns_low - t_rows_low)
            d_targets -= 2.0 * ((logits - h_rows) - h_rows_low)
            d_transposed_targets = (c_rows - t_columns) + (c_rows_low - t_columns_low)
            d_transposed_targets -= 2.0 * ((transposed_logits - h_columns) - h_columns_low)
        d_teacher = targets * d_targets + transposed_targets * d_transposed_targets
        d_temperature += tl.sum(d_teacher * teacher) * (0.5 if TWO_SIDED else 0.25)
        d_teacher *= 0.5
        tl.store(teacher_gradient_ptr + tile_offsets, d_teacher.to(teacher_gradient_ptr.dtype.element_ty), mask=mask)
        if TEACHER_ADDED:
            d_logits += d_teacher
            tl.store(logits_gradient_ptrs, d_logits.to(logits_gradient_ptr.dtype.element_ty), mask=mask)
            if transposed_gradient_ptr is not None:
                d_transposed += d_teacher
                transposed_gradient_ptrs = transposed_gradient_ptr + tile_offsets
                tl.store(transposed_gradient_ptrs, d_transposed.to(logits_gradient_ptr.dtype.element_ty), mask=mask)
    part = row_block * tl.num_programs(1) + column_block
    tl.store(temperature_parts_ptr + part, d_temperature)
