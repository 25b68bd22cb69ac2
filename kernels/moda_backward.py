"""MoDA backward: one pass over dy and one pass over x, every sum over rows in two stages and a fixed order.

`dy_pass` reads dy once (twice for padded ranks above 32, where partial sums would cost more than the second reading)
and gives dhg = dy B, from it dh = dhg * G and the gate gradients, and dB = dy^T (h * G). `dx_pass` reads x once and
gives dA = dh^T dropout(x) while it adds mask / (1 - p) * (dh A) into dx, or writes it where the library's product with
W is added afterwards. Sizes as in `moda_forward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

from sda_fast.kernels.configs import LaunchConfig, cdiv, config_for, next_power_of_2, padded_rank, programs_wanted
from sda_fast.kernels.gating import gate_rows, gates_are_per_row, load_gated
from sda_fast.kernels.group import filled, layer_of_block, number_of, pointer_of
from sda_fast.kernels.launching import kernel, prepare
from sda_fast.kernels.moda_forward import (
    LARGEST_RANK_BLOCK,
    launch_expand_add,
    options,
    project_partials,
    row_stride,
    with_unit_columns,
)
from sda_fast.kernels.philox import dropout_scale, dropout_threshold, keep_tile

# Above these padded ranks a pass is two kernels.
LARGEST_FUSED_DY_RANK = 32
LARGEST_FUSED_DX_RANK = 64


@kernel
def dy_kernel(
    dy_ptr,
    dy_1_ptr,
    dy_2_ptr,
    h_ptr,
    lora_B_ptr,
    lora_B_1_ptr,
    lora_B_2_ptr,
    gates_ptr,
    gates_1_ptr,
    gates_2_ptr,
    modality_ids_ptr,
    dhg_ptr,
    dB_ptr,
    M,
    N,
    N_1,
    N_2,
    R,
    stride_dy_row,
    stride_dy_1_row,
    stride_dy_2_row,
    stride_h_row,
    stride_B_row,
    stride_gates_row,
    rows_per_sequence,
    rank_per_expert,
    scaling,
    blocks_per_chunk,
    LAYERS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    NEEDS_DHG: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dhg of every block of columns, and dB of every chunk of rows; layers' blocks and columns follow each other."""
    column_block = tl.program_id(0)
    chunk = tl.program_id(1)
    first_1 = tl.cdiv(N, BLOCK_N)
    first_2 = first_1 + tl.cdiv(N_1, BLOCK_N)
    layer = layer_of_block(column_block, first_1, first_2, LAYERS)
    dy_ptr = pointer_of(layer, dy_ptr, dy_1_ptr, dy_2_ptr, LAYERS)
    lora_B_ptr = pointer_of(layer, lora_B_ptr, lora_B_1_ptr, lora_B_2_ptr, LAYERS)
    gates_ptr = pointer_of(layer, gates_ptr, gates_1_ptr, gates_2_ptr, LAYERS)
    stride_dy_row = number_of(layer, stride_dy_row, stride_dy_1_row, stride_dy_2_row, LAYERS)
    columns_before = number_of(layer, 0, N, N + N_1, LAYERS)
    columns_of_all = N + N_1 + N_2
    N = number_of(layer, N, N_1, N_2, LAYERS)
    h_ptr += layer * R
    first_block_of_layer = number_of(layer, 0, first_1, first_2, LAYERS)
    columns = (column_block - first_block_of_layer) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    column_mask = columns < N
    rank_mask = ranks < R
    if NEEDS_DHG:
        lora_B = tl.load(
            lora_B_ptr + columns.to(tl.int64)[:, None] * stride_B_row + ranks[None, :],
            mask=column_mask[:, None] & rank_mask[None, :],
            other=0.0,
        ).to(dy_ptr.dtype.element_ty)
    accumulator = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    first_block = chunk * blocks_per_chunk
    for block in range(first_block, tl.minimum(first_block + blocks_per_chunk, tl.cdiv(M, BLOCK_M))):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        dy_ptrs = dy_ptr + rows.to(tl.int64)[:, None] * stride_dy_row + columns[None, :]
        dy = tl.load(dy_ptrs, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        if NEEDS_DHG:
            dhg = tl.dot(dy, lora_B, input_precision="tf32x3")
            dhg_ptrs = dhg_ptr + (column_block.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
            tl.store(dhg_ptrs, dhg, mask=row_mask[:, None] & rank_mask[None, :])
        if NEEDS_DB:
            gated = load_gated(
                h_ptr,
                gates_ptr,
                modality_ids_ptr,
                rows,
                row_mask,
                0,
                R,
                stride_h_row,
                stride_gates_row,
                rows_per_sequence,
                rank_per_expert,
                scaling,
                GATE_PER_ROW,
                BLOCK_R,
            )
            accumulator = tl.dot(tl.trans(dy), gated.to(dy.dtype), accumulator, input_precision="tf32x3")
    if NEEDS_DB:
        dB_rows = chunk.to(tl.int64) * columns_of_all + columns_before + columns
        dB_ptrs = dB_ptr + dB_rows[:, None] * R + ranks[None, :]
        tl.store(dB_ptrs, accumulator, mask=column_mask[:, None] & rank_mask[None, :])


@kernel
def gate_kernel(
    dhg_ptr,
    h_ptr,
    gates_ptr,
    gates_1_ptr,
    gates_2_ptr,
    modality_ids_ptr,
    dh_ptr,
    dgates_ptr,
    M,
    R,
    E,
    parts,
    parts_1,
    parts_2,
    stride_dhg_part,
    stride_h_row,
    stride_gates_row,
    stride_dh_row,
    rows_per_sequence,
    rank_per_expert,
    modalities,
    scaling,
    LAYERS: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    NEEDS_DH: tl.constexpr,
    NEEDS_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_RANK_PER_EXPERT: tl.constexpr,
):
    """Add up the parts of dhg, give dh = dhg * G and the gates' gradients: per row, or one partial sum per program.

    One program for each block of rows of each layer, whose parts follow each other.
    """
    layer = tl.program_id(1)
    gates_ptr = pointer_of(layer, gates_ptr, gates_1_ptr, gates_2_ptr, LAYERS)
    parts_before = number_of(layer, 0, parts, parts + parts_1, LAYERS)
    parts = number_of(layer, parts, parts_1, parts_2, LAYERS)
    dhg_ptr += parts_before.to(tl.int64) * stride_dhg_part if LAYERS > 1 else 0
    h_ptr += layer * R
    if NEEDS_DH:
        dh_ptr += layer * R
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_RANK_PER_EXPERT)
    row_mask = rows < M
    row_expert_mask = row_mask[:, None] & (experts < E)[None, :]
    mask = row_expert_mask[:, :, None] & (inner < rank_per_expert)[None, None, :]
    rows_wide = rows.to(tl.int64)[:, None, None]
    ranks = experts[None, :, None] * rank_per_expert + inner[None, None, :]
    dhg = tl.zeros((BLOCK_M, BLOCK_E, BLOCK_RANK_PER_EXPERT), dtype=tl.float32)
    dhg_ptrs = dhg_ptr + rows_wide * R + ranks
    for _ in range(parts):
        dhg += tl.load(dhg_ptrs, mask=mask, other=0.0)
        dhg_ptrs += stride_dhg_part
    which = gate_rows(modality_ids_ptr, rows, row_mask, rows_per_sequence, GATE_PER_ROW)
    if NEEDS_DH:
        gate_ptrs = gates_ptr + which[:, None] * stride_gates_row + experts[None, :]
        gates = tl.load(gate_ptrs, mask=row_expert_mask, other=0.0).to(tl.float32) * scaling
        tl.store(dh_ptr + rows_wide * stride_dh_row + ranks, dhg * gates[:, :, None], mask=mask)
    if NEEDS_GATES:
        h = tl.load(h_ptr + rows_wide * stride_h_row + ranks, mask=mask, other=0.0).to(tl.float32)
        dgates = tl.sum(dhg * h, axis=2) * scaling
        if GATE_PER_ROW:
            dgates_rows = layer.to(tl.int64) * M + rows
            tl.store(dgates_ptr + dgates_rows[:, None] * E + experts[None, :], dgates, mask=row_expert_mask)
        else:
            for modality in range(modalities):
                of_modality = tl.sum(tl.where((which == modality)[:, None], dgates, 0.0), axis=0)
                partial = (tl.program_id(0) * LAYERS + layer) * modalities + modality
                partial_ptrs = dgates_ptr + partial * E + experts
                tl.store(partial_ptrs, of_modality, mask=experts < E)


@kernel
def dx_kernel(
    x_ptr,
    dh_ptr,
    lora_A_ptr,
    dx_ptr,
    dA_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_x_row,
    stride_dh_row,
    stride_A_row,
    stride_dx_row,
    blocks_per_chunk,
    threshold,
    keep_scale,
    HAS_DROPOUT: tl.constexpr,
    NEEDS_DA: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_column = tl.program_id(0) * BLOCK_K
    chunk = tl.program_id(1)
    columns = first_column + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    column_mask = columns < K
    rank_mask = ranks < R
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    if NEEDS_DX:
        lora_A = tl.load(
            lora_A_ptr + ranks.to(tl.int64)[:, None] * stride_A_row + columns[None, :],
            mask=rank_mask[:, None] & column_mask[None, :],
            other=0.0,
        ).to(dx_ptr.dtype.element_ty)
    accumulator = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    first_block = chunk * blocks_per_chunk
    for block in range(first_block, tl.minimum(first_block + blocks_per_chunk, tl.cdiv(M, BLOCK_M))):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        rows_wide = rows.to(tl.int64)[:, None]
        mask = row_mask[:, None] & column_mask[None, :]
        dh_mask = row_mask[:, None] & rank_mask[None, :]
        dh = tl.load(dh_ptr + rows_wide * stride_dh_row + ranks[None, :], mask=dh_mask, other=0.0)
        if HAS_DROPOUT:
            keep = keep_tile(seed, rows, first_column, tl.cdiv(K, 8), threshold, BLOCK_M, BLOCK_K)
        if NEEDS_DA:
            x = tl.load(x_ptr + rows_wide * stride_x_row + columns[None, :], mask=mask, other=0.0)
            if HAS_DROPOUT:
                x = tl.where(keep, x, 0.0)
            accumulator = tl.dot(tl.trans(dh.to(x.dtype)), x, accumulator, input_precision="tf32x3")
        if NEEDS_DX:
            dx_ptrs = dx_ptr + rows_wide * stride_dx_row + columns[None, :]
            update = tl.dot(dh.to(lora_A.dtype), lora_A, input_precision="tf32x3")
            if HAS_DROPOUT:
                update = tl.where(keep, update * keep_scale, 0.0)
            if ADDS:
                update += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptrs, update.to(lora_A.dtype), mask=mask)
    if NEEDS_DA:
        if HAS_DROPOUT:
            accumulator *= keep_scale
        dA_ptrs = dA_ptr + (chunk.to(tl.int64) * R + ranks)[:, None] * K + columns[None, :]
        tl.store(dA_ptrs, accumulator, mask=rank_mask[:, None] & column_mask[None, :])


def chunks_of_rows(M: int, block_m: int, blocks_of_columns: int, device: torch.device) -> tuple[int, int]:
    """How many chunks the rows are cut into, and how many blocks of rows each chunk has."""
    blocks_of_rows = cdiv(M, block_m)
    wanted = max(1, cdiv(programs_wanted(device), blocks_of_columns))
    blocks_per_chunk = cdiv(blocks_of_rows, min(wanted, blocks_of_rows))
    return cdiv(blocks_of_rows, blocks_per_chunk), blocks_per_chunk


def dy_pass(
    dy: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    gates: torch.Tensor,
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    needs_dh: bool = True,
    needs_dB: bool = True,
    needs_gates: bool = True,
    dh_out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to h, B and the gates from one pass over dy.

    Args:
        dy: [M, N], float32, float16 or bfloat16; rows may be strided.
        h: [M, R] float32 as `project` gave it (not gated), unit column stride.
        lora_B, gates, modality_ids, scaling, rows_per_sequence: as in `expand_add`.
        needs_dh, needs_dB, needs_gates: what to compute.
        dh_out: [M, R] float32 to write dh into, unit column stride; allocated if absent.
    Returns:
        (dh [M, R], dB [N, R], dgates of the shape of gates), float32 each, None where not asked for.
    """
    needs = {"needs_dh": needs_dh, "needs_dB": needs_dB, "needs_gates": needs_gates}
    rest: dict[str, Any] = {"rows_per_sequence": rows_per_sequence, "dh_out": dh_out, "config": config, **needs}
    dh, dB, dgates = dy_pass_of_group([dy], h, [lora_B], [gates], modality_ids, scaling, **rest)
    return dh, dB[0], dgates[0]


def dy_pass_of_group(
    dys: Sequence[torch.Tensor],
    h: torch.Tensor,
    lora_B: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    modality_ids: torch.Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    needs_dh: bool = True,
    needs_dB: bool = True,
    needs_gates: bool = True,
    dh_out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]:
    """`dy_pass` for up to LAYERS_PER_LAUNCH layers that share x, in one launch of every kernel.

    Args:
        dys: one [M, N] per layer, N may differ.
        h, dh_out: [M, layers * R] float32, unit column stride, the layers' side by side.
        lora_B, gates: one per layer, of one R, number of lines and E, dtype, and strides; more than one layer only
            where `fuses_dy` says so of R.
    Returns:
        dh [M, layers * R], and the layers' dB and dgates; float32, None where not asked for.
    """
    layers, M, (_, R) = len(dys), dys[0].shape[0], lora_B[0].shape
    float32, device, widths = torch.float32, dys[0].device, [dy.shape[1] for dy in dys]
    dh = (torch.empty(M, layers * R, dtype=float32, device=device) if dh_out is None else dh_out) if needs_dh else None
    dB: Sequence[torch.Tensor | None] = [None] * layers
    if M == 0 or sum(widths) == 0:
        if dh is not None:
            dh.zero_()
        if needs_dB:
            dB = [torch.zeros(N, R, dtype=float32, device=device) for N in widths]
        zeros = [torch.zeros(one.shape, dtype=float32, device=device) if needs_gates else None for one in gates]
        return dh, dB, zeros

    dys = [with_unit_columns(dy) for dy in dys]
    config = config or config_for("dy_pass", dys[0].dtype, R)
    needs_dhg = needs_dh or needs_gates
    fused = needs_dhg and fuses_dy(R)
    blocks = [cdiv(N, config.block_n) for N in widths]
    chunks, blocks_per_chunk = chunks_of_rows(M, config.block_m, sum(blocks), device)
    dhg_parts = torch.empty(sum(blocks), M, R, dtype=float32, device=device) if fused else None
    dB_parts = torch.empty(chunks, sum(widths), R, dtype=float32, device=device) if needs_dB else None
    if fused or needs_dB:
        launch = prepare_dy(
            M,
            tuple(widths),
            R,
            (tuple([dy.stride(0) for dy in dys]), h.stride(0), lora_B[0].stride(0), gates[0].stride(0)),
            gates[0].shape[1],
            gates_are_per_row(gates[0], modality_ids),
            rows_per_sequence,
            scaling,
            fused,
            needs_dB,
            config,
            chunks,
            blocks_per_chunk,
        )
        launch(*filled(dys, None), h, *filled(lora_B, None), *filled(gates, None), modality_ids, dhg_parts, dB_parts)
    if needs_dhg and not fused:
        dhg = torch.empty(M, R, dtype=float32, device=device)
        project_config = config_for("project", dys[0].dtype, R)
        dhg_parts = project_partials(dys[0], lora_B[0].t(), out=dhg, split_k=None, config=project_config)
        dhg_parts = dhg[None] if dhg_parts is None else dhg_parts
        blocks = [dhg_parts.shape[0]]
    dgates: Sequence[torch.Tensor | None] = [None] * layers
    if dhg_parts is not None:
        rows = (modality_ids, scaling, rows_per_sequence)
        dgates = _apply_gates(dhg_parts, blocks, h, gates, *rows, dh, needs_gates)
    if dB_parts is not None:
        dB = dB_parts.sum(0).split(widths)
    return dh, dB, dgates


@functools.lru_cache(maxsize=1024)
def prepare_dy(
    M: int,
    widths: tuple[int, ...],
    R: int,
    strides: tuple[tuple[int, ...], int, int, int],
    experts: int,
    gate_per_row: bool,
    rows_per_sequence: int,
    scaling: float,
    needs_dhg: bool,
    needs_dB: bool,
    config: LaunchConfig,
    chunks: int,
    blocks_per_chunk: int,
) -> Callable[..., None]:
    """The launch of `dy_kernel`.

    Args:
        widths: columns of every dy.
        strides: from row to row of every dy, of h and of lora_B, from line to line of the gates.
    """
    of_dys, *others = strides
    numbers = (
        *(M, *filled(widths, 0), R, *filled(of_dys, 0), *others),
        *(rows_per_sequence, R // experts, scaling, blocks_per_chunk),
    )
    constants = {
        "LAYERS": len(widths),
        "GATE_PER_ROW": gate_per_row,
        "NEEDS_DHG": needs_dhg,
        "NEEDS_DB": needs_dB,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": padded_rank(R),
        **options(config),
    }
    return prepare(dy_kernel, (sum(cdiv(N, config.block_n) for N in widths), chunks), numbers, constants)


def fuses_dy(rank: int) -> bool:
    """Whether dy is read once for both of its products."""
    return padded_rank(rank) <= LARGEST_FUSED_DY_RANK


def _apply_gates(
    dhg_parts: torch.Tensor,
    parts: Sequence[int],
    h: torch.Tensor,
    gates: Sequence[torch.Tensor],
    modality_ids: torch.Tensor | None,
    scaling: float,
    rows_per_sequence: int,
    dh: torch.Tensor | None,
    needs_gates: bool,
) -> Sequence[torch.Tensor | None]:
    layers, (_, M, R) = len(gates), dhg_parts.shape
    modalities, E = gates[0].shape
    programs = cdiv(M, rows_of_gate_program(R, E))
    per_row = gates_are_per_row(gates[0], modality_ids)
    dgates = None
    if needs_gates:
        shape = (layers, M, E) if per_row else (programs, layers, modalities, E)
        dgates = torch.empty(shape, dtype=torch.float32, device=h.device)
    strides = h.stride(0), gates[0].stride(0), row_stride(dh)
    sizes = (M, R, E, modalities, tuple(parts))
    launch = prepare_gate(*sizes, strides, per_row, rows_per_sequence, scaling, dh is not None, needs_gates)
    launch(dhg_parts, h, *filled(gates, None), modality_ids, dh, dgates)
    if dgates is None:
        return [None] * layers
    return (dgates if per_row else dgates.sum(0)).unbind(0)


def rows_of_gate_program(R: int, E: int) -> int:
    """How many rows a program of `gate_kernel` works on."""
    return max(1, 1024 // (next_power_of_2(E) * next_power_of_2(R // E)))


@functools.lru_cache(maxsize=1024)
def prepare_gate(
    M: int,
    R: int,
    E: int,
    modalities: int,
    parts: tuple[int, ...],
    strides: tuple[int, int, int],
    gate_per_row: bool,
    rows_per_sequence: int,
    scaling: float,
    needs_dh: bool,
    needs_gates: bool,
) -> Callable[..., None]:
    """The launch of `gate_kernel`.

    Args:
        parts: of every layer's dhg.
        strides: from row to row of h, from line to line of the gates, from row to row of dh.
    """
    numbers = (
        *(M, R, E, *filled(parts, 0), M * R, *strides),
        *(rows_per_sequence, R // E, modalities, scaling),
    )
    constants = {
        "LAYERS": len(parts),
        "GATE_PER_ROW": gate_per_row,
        "NEEDS_DH": needs_dh,
        "NEEDS_GATES": needs_gates,
        "BLOCK_M": rows_of_gate_program(R, E),
        "BLOCK_E": next_power_of_2(E),
        "BLOCK_RANK_PER_EXPERT": next_power_of_2(R // E),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return prepare(gate_kernel, (cdiv(M, rows_of_gate_program(R, E)), len(parts)), numbers, constants)


def dx_pass(
    x: torch.Tensor | None,
    dh: torch.Tensor,
    lora_A: torch.Tensor,
    dx: torch.Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    needs_dA: bool = True,
    adds: bool = True,
    config: LaunchConfig | None = None,
) -> torch.Tensor | None:
    """dA = dh^T dropout(x), and dx += mask / (1 - p) * (dh A) in place, from one pass over x.

    Args:
        x: [M, K], float32, float16 or bfloat16, rows may be strided; None if needs_dA is False.
        dh: [M, R] float32, unit column stride; of all adapters that read x, side by side. R beyond 256 is worked off
            in slices of 256, with one rounding of dx each.
        lora_A: [R, K], stacked like dh, unit column stride.
        dx: [M, K], unit column stride, holding the frozen layer's part; None if it is not wanted.
        dropout_p, seed: those of `project`.
        needs_dA: whether dA is wanted.
        adds: False to overwrite dx instead, so that the frozen layer's part can be added afterwards.
    Returns:
        dA [R, K] float32, or None.
    """
    (M, R), K = dh.shape, lora_A.shape[1]
    dA = torch.zeros(R, K, dtype=torch.float32, device=dh.device) if needs_dA and (M == 0 or K == 0) else None
    if M == 0 or K == 0 or not (needs_dA or dx is not None):
        return dA
    if R > LARGEST_RANK_BLOCK:
        slices = [slice(start, start + LARGEST_RANK_BLOCK) for start in range(0, R, LARGEST_RANK_BLOCK)]
        rest: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "needs_dA": needs_dA, "config": config}
        parts = [dx_pass(x, dh[:, part], lora_A[part], dx, adds=adds or part.start > 0, **rest) for part in slices]
        return torch.cat([part for part in parts if part is not None]) if needs_dA else None

    if dx is not None and padded_rank(R) > LARGEST_FUSED_DX_RANK:
        expand_config = config_for("expand_add", dx.dtype, R)
        launch_expand_add(
            [dx], dh, [lora_A], [], None, 1.0, dropout_p=dropout_p, seed=seed, adds=adds, config=expand_config
        )
        dx = None
        if not needs_dA:
            return None
    activations = x if needs_dA else dx
    if activations is None:
        raise ValueError("x is None but dA is wanted")
    x = with_unit_columns(activations) if needs_dA else None
    config = config or config_for("dx_pass", activations.dtype, R)
    blocks_of_columns = cdiv(K, config.block_n)
    chunks, blocks_per_chunk = chunks_of_rows(M, config.block_m, blocks_of_columns, dh.device)
    dA_parts = torch.empty(chunks, R, K, dtype=torch.float32, device=dh.device) if needs_dA else None
    strides = row_stride(x), dh.stride(0), lora_A.stride(0), row_stride(dx)
    needs = needs_dA, dx is not None
    launch = prepare_dx(M, K, R, strides, dropout_p, *needs, adds, config, chunks, blocks_per_chunk)
    launch(x, dh, lora_A, dx, dA_parts, seed)
    return None if dA_parts is None else dA_parts.sum(0)


@functools.lru_cache(maxsize=1024)
def prepare_dx(
    M: int,
    K: int,
    R: int,
    strides: tuple[int, int, int, int],
    dropout_p: float,
    needs_dA: bool,
    needs_dx: bool,
    adds: bool,
    config: LaunchConfig,
    chunks: int,
    blocks_per_chunk: int,
) -> Callable[..., None]:
    """The launch of `dx_kernel`; strides from row to row of x, dh, lora_A and dx."""
    threshold = dropout_threshold(dropout_p)
    numbers = (M, K, R, *strides, blocks_per_chunk, threshold, dropout_scale(dropout_p))
    constants = {
        "HAS_DROPOUT": threshold > 0,
        "NEEDS_DA": needs_dA,
        "NEEDS_DX": needs_dx,
        "ADDS": adds,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_n,
        "BLOCK_R": padded_rank(R),
        **options(config),
    }
    return prepare(dx_kernel, (cdiv(K, config.block_n), chunks), numbers, constants)
