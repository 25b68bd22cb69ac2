"""The variants of the MoDA kernels that the gate compiles, with their bytes by formula (see `gate`).

For every configuration of `configs`, that is every kernel, size of the activations' elements and padded rank, they are
the product of what changes the code: gating, dropout, which gradients are needed, whether y or dx is read or written.
What hardly does (float16 for bfloat16, bfloat16 adapters, a rank that is no multiple of 16) is there once a
configuration or less.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch

from sda_fast.kernels import moda_backward, moda_forward, moda_gemm, moda_gemm_tma
from sda_fast.kernels.configs import config_for, next_power_of_2, padded_rank, rank_block
from sda_fast.kernels.gate import KernelVariant
from sda_fast.kernels.group import LAYERS_PER_LAUNCH

M, K, N = 8192, 3584, 3584
MODALITIES, EXPERTS = 2, 8
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROGRAMS_WANTED = 264

GATE_SIGNATURE = {
    "h_ptr": "*fp32",
    "gates_ptr": "*fp32",
    "R": "i32",
    "stride_h_row": "i32",
    "stride_gates_row": "i32",
    "rows_per_sequence": "i32",
    "scaling": "fp32",
}
PLACES = ("", *(f"_{place}" for place in range(1, LAYERS_PER_LAUNCH)))
WIDTHS = tuple(f"N{which}" for which in PLACES)
OF_LAYERS = tuple(f"stride_{name}{which}_row" for name in ("y", "dy") for which in PLACES)
OF_RANK = ("R", "stride_h_row", "stride_dh_row", "stride_B_row", "stride_weight_column", "stride_lora_column")
OF_SIZES = (
    *("M", *WIDTHS, "K", "stride_x_row", *OF_LAYERS, "stride_dx_row", "stride_A_row"),
    *("stride_weight_rank", "stride_weight_row", "stride_weight_inner", "stride_lora_rank"),
    *("stride_dhg_part", "stride_h_split"),
)

# Whose gates a row has: those of its own id, its own line of gates, or the one line that there is.
Gating = Literal["by id", "row gates", "one gate"]
GATINGS: tuple[Gating, ...] = ("by id", "row gates", "one gate")
# What a backward pass gives: of dy dhg and dB, of x dx and dA.
Needs = Literal["", "dhg only", "dB only", "dx only", "dA only"]
# Whose copy engine fetches a GEMM's tiles; "" for none.
CopyEngine = Literal["", "Hopper", "Blackwell"]
ENGINES: tuple[CopyEngine, ...] = ("Hopper", "Blackwell")


def _aligned(rank: int) -> tuple[str, ...]:
    return OF_SIZES if rank % 16 else (*OF_RANK, *OF_SIZES)


def _ids(gating: Gating) -> tuple[dict[str, str], dict[str, object]]:
    per_row: dict[str, object] = {"GATE_PER_ROW": gating == "row gates"}
    if gating == "by id":
        return {"modality_ids_ptr": "*i64"}, per_row
    return {}, {"modality_ids_ptr": None, **per_row}


def _per_expert(rank: int) -> tuple[dict[str, str], dict[str, object]]:
    """One rank per expert is a constant for the compiler."""
    return ({}, {"rank_per_expert": 1}) if rank <= EXPERTS else ({"rank_per_expert": "i32"}, {})


def _present(name: str, kind: str, is_present: bool) -> tuple[dict[str, str], dict[str, object]]:
    """A pointer as a launcher passes it: None where there is nothing."""
    return ({name: kind}, {}) if is_present else ({}, {name: None})


def _layers(names: tuple[str, ...], signature: dict[str, str], layers: int) -> tuple[dict[str, str], dict[str, object]]:
    """Arguments of the layers after the first: signature of those that are there, constants for the others."""
    present: dict[str, str] = {}
    absent: dict[str, object] = {"LAYERS": layers}
    for place in range(1, LAYERS_PER_LAUNCH):
        for name in names:
            is_there = place < layers and name in signature
            if is_there:
                present[f"{name.removesuffix('_ptr')}_{place}_ptr"] = signature[name]
            else:
                absent[f"{name.removesuffix('_ptr')}_{place}_ptr"] = None
    return present, absent


def _together(*arguments: tuple[dict[str, str], dict[str, object]]) -> tuple[dict[str, str], dict[str, object]]:
    signature: dict[str, str] = {}
    constexprs: dict[str, object] = {}
    for run_time, constant in arguments:
        signature |= run_time
        constexprs |= constant
    return signature, constexprs


def _named(*parts: str, gating: Gating = "by id", adapter: str = "fp32", layers: int = 1) -> str:
    of_adapter = "" if adapter == "fp32" else f"{adapter} adapter"
    of_group = "" if layers == 1 else f"layers={layers}"
    return " ".join(part for part in (*parts, of_group, "" if gating == "by id" else gating, of_adapter) if part)


def _chunks(block_m: int, blocks_of_columns: int) -> int:
    wanted = -(-PROGRAMS_WANTED // blocks_of_columns)
    return min(wanted, M // block_m)


def project(type_name: str, rank: int, dropout: bool, adapter: str = "fp32") -> KernelVariant:
    return _project("project", type_name, rank, dropout, adapter, unit="column")


def project_dy(type_name: str, rank: int, adapter: str = "fp32") -> KernelVariant:
    return _project("dhg", type_name, rank, False, adapter, unit="rank")


def _project(name: str, type_name: str, rank: int, dropout: bool, adapter: str, unit: str) -> KernelVariant:
    config = config_for("project", TYPES[type_name], rank)
    size = TYPES[type_name].itemsize
    strided = "rank" if unit == "column" else "column"
    integers = ["M", "K", "R", "stride_x_row", f"stride_weight_{strided}", "stride_h_split", "stride_h_row"]
    integers += ["blocks_per_split", "threshold"]
    floor = M * K * size + rank * K * TYPES[adapter].itemsize + M * rank * 4
    splits = max(1, PROGRAMS_WANTED // (M // config.block_m))
    seed_signature, seed_constexprs = _present("seed_ptr", "*i64", dropout)
    return KernelVariant(
        name=_named(name, type_name, f"R={rank}", "dropout" * dropout, adapter=adapter),
        kernel=moda_forward.project_kernel,
        signature={
            **seed_signature,
            "x_ptr": f"*{type_name}",
            "weight_ptr": f"*{adapter}",
            "h_ptr": "*fp32",
            "keep_scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            **seed_constexprs,
            f"stride_weight_{unit}": 1,
            "HAS_DROPOUT": dropout,
            "BLOCK_M": config.block_m,
            "BLOCK_R": padded_rank(rank),
            "BLOCK_K": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} K={K} R={rank}",
        bytes_moved=floor + (2 * splits * M * rank * 4 if splits > 1 else 0),
        bytes_floor=floor,
        flops=2 * M * K * rank,
        aligned=_aligned(rank),
    )


def expand_add(type_name: str, rank: int, gating: Gating = "by id", adapter: str = "fp32") -> KernelVariant:
    return _expand(("expand_add", type_name, f"R={rank}"), type_name, rank, gating, adapter)


def expand(
    type_name: str,
    rank: int,
    gating: Gating = "by id",
    adapter: str = "fp32",
    has_bias: bool = True,
    layers: int = 1,
) -> KernelVariant:
    parts = ("expand", type_name, f"R={rank}", "bias" * has_bias)
    return _expand(parts, type_name, rank, gating, adapter, adds=False, has_bias=has_bias, layers=layers)


def expand_dx(type_name: str, rank: int, dropout: bool, adds: bool, adapter: str = "fp32") -> KernelVariant:
    parts = ("dx only", type_name, f"R={rank}", "dropout" * dropout, "written" * (not adds))
    return _expand(parts, type_name, rank, None, adapter, adds=adds, dropout=dropout)


def _expand(
    parts: tuple[str, ...],
    type_name: str,
    rank: int,
    gating: Gating | None,
    adapter: str,
    *,
    adds: bool = True,
    has_bias: bool = False,
    dropout: bool = False,
    layers: int = 1,
) -> KernelVariant:
    is_gated = gating is not None
    config = config_for("expand_add", TYPES[type_name], rank)
    size = TYPES[type_name].itemsize
    moved = layers * ((1 + adds) * M * N * size + M * rank * 4 + N * rank * TYPES[adapter].itemsize)
    unit, strided = ("rank", "column") if is_gated else ("column", "rank")
    integers = ("M", *WIDTHS, *(f"stride_y{which}_row" for which in PLACES), f"stride_weight_{strided}", "threshold")
    signature, constexprs = _together(
        (GATE_SIGNATURE, {}),
        _per_expert(rank if is_gated else 1),
        _present("bias_ptr", f"*{type_name}", has_bias),
        _present("seed_ptr", "*i64", dropout),
        _ids(gating or "one gate"),
    )
    if not is_gated:
        del signature["gates_ptr"]
        constexprs["gates_ptr"] = None
    signature |= {"y_ptr": f"*{type_name}", "weight_ptr": f"*{adapter}", "keep_scale": "fp32"}
    signature |= dict.fromkeys(integers, "i32")
    of_layers, absent = _layers(("y_ptr", "bias_ptr", "weight_ptr", "gates_ptr"), signature, layers)
    return KernelVariant(
        name=_named(*parts, gating=gating or "by id", adapter=adapter, layers=layers),
        kernel=moda_forward.expand_add_kernel,
        signature={**signature, **of_layers},
        constexprs={
            **constexprs,
            **absent,
            f"stride_weight_{unit}": 1,
            "ADDS": adds,
            "HAS_BIAS": has_bias,
            "HAS_DROPOUT": dropout,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": rank_block(TYPES[type_name], rank),
            "PADDED_R": padded_rank(rank),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} N={N} R={rank}",
        bytes_moved=moved,
        bytes_floor=moved,
        flops=2 * layers * M * N * rank,
        aligned=_aligned(rank),
    )


def gated_linear(
    type_name: str,
    rank: int,
    gating: Gating = "by id",
    adapter: str = "fp32",
    has_bias: bool = True,
    chip: CopyEngine = "",
) -> KernelVariant:
    signature, constexprs = _together((GATE_SIGNATURE, {}), _per_expert(rank), _ids(gating))
    parts = ("gated_linear", chip, type_name, f"R={rank}", "no bias" * (not has_bias))
    return _updated_product(
        _named(*parts, gating=gating, adapter=adapter),
        type_name,
        rank,
        {**signature, "lora_ptr": f"*{adapter}", "stride_lora_column": "i32"},
        {**constexprs, "stride_lora_rank": 1},
        has_bias=has_bias,
        chip=chip,
    )


def input_gradient(
    type_name: str, rank: int, dropout: bool, adapter: str = "fp32", chip: CopyEngine = ""
) -> KernelVariant:
    signature = {name: GATE_SIGNATURE[name] for name in ("h_ptr", "R", "stride_h_row", "rows_per_sequence", "scaling")}
    ungated = {"gates_ptr": None, "modality_ids_ptr": None, "stride_gates_row": 0, "rank_per_expert": 1}
    return _updated_product(
        _named("input_gradient", chip, type_name, f"R={rank}", "dropout" * dropout, adapter=adapter),
        type_name,
        rank,
        {**signature, "lora_ptr": f"*{adapter}", "stride_lora_rank": "i32"},
        {**ungated, "GATE_PER_ROW": False, "stride_lora_column": 1},
        transposed=True,
        dropout=dropout,
        chip=chip,
    )


def _updated_product(
    name: str,
    type_name: str,
    rank: int,
    signature: dict[str, str],
    constexprs: dict[str, object],
    *,
    has_bias: bool = False,
    transposed: bool = False,
    dropout: bool = False,
    chip: CopyEngine = "",
) -> KernelVariant:
    """Either GEMM with the update in it; `transposed` as the weight is for dx."""
    size = TYPES[type_name].itemsize
    config = moda_gemm_tma.CONFIG if chip else moda_gemm.CONFIGS[size]
    floor = (M * K + N * K + M * N) * size + M * rank * 4
    integers = ["M", "N", "K", "stride_x_row", "stride_y_row", "threshold"]
    if chip:
        generation = moda_gemm_tma.HOPPER if chip == "Hopper" else moda_gemm_tma.BLACKWELL
        of_config = moda_gemm_tma.constants_of(rank, dropout, transposed, generation)
        strided = "row"
    else:
        strided, unit = ("inner", "column") if transposed else ("column", "inner")
        of_config = {
            f"stride_weight_{unit}": 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": moda_gemm.BLOCK_K if size == 2 else moda_gemm.BLOCK_K // 2,
            "BLOCK_R": moda_gemm.ranks_at_once(TYPES[type_name], rank),
            "PADDED_R": padded_rank(rank),
            "GROUP_M": moda_gemm_tma.GROUP_M,
        }
    integers.append(f"stride_weight_{strided}")
    present, absent = _together(_present("bias_ptr", f"*{type_name}", has_bias), _present("seed_ptr", "*i64", dropout))
    activations = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), f"*{type_name}")
    return KernelVariant(
        name=name,
        kernel=moda_gemm_tma.updated_product_tma_kernel if chip else moda_gemm.updated_product_kernel,
        signature={**signature, **present, **activations, "keep_scale": "fp32", **dict.fromkeys(integers, "i32")},
        constexprs={**constexprs, **absent, "HAS_BIAS": has_bias, "HAS_DROPOUT": dropout, **of_config},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} N={N} K={K} R={rank}",
        bytes_moved=floor,
        bytes_floor=floor,
        flops=2 * M * N * (K + rank),
        aligned=(*_aligned(rank), f"stride_weight_{strided}"),
        targets={"": (), "Hopper": ("sm_90",), "Blackwell": ("sm_100",)}[chip],
    )


def dy_pass(
    type_name: str, rank: int, gating: Gating = "by id", needs: Needs = "", adapter: str = "fp32", layers: int = 1
) -> KernelVariant:
    """Above LARGEST_FUSED_DY_RANK only with needs "dB only": `project_dy` gives dhg there."""
    config = config_for("dy_pass", TYPES[type_name], rank)
    needs_dhg, needs_dB = needs != "dB only", needs != "dhg only"
    size = TYPES[type_name].itemsize
    blocks_of_columns = -(-N // config.block_n)
    chunks = _chunks(config.block_m, blocks_of_columns)
    floor = M * N * size + (1 + needs_dhg) * M * rank * 4 + N * rank * (4 * needs_dB + TYPES[adapter].itemsize)
    parts = 2 * chunks * N * rank * 4 * needs_dB + 2 * blocks_of_columns * M * rank * 4 * needs_dhg
    integers = ("M", *WIDTHS, *(f"stride_dy{which}_row" for which in PLACES), "stride_B_row", "blocks_per_chunk")
    signature, constexprs = _together(
        (GATE_SIGNATURE, {}),
        _per_expert(rank),
        _ids(gating),
        _present("dhg_ptr", "*fp32", needs_dhg),
        _present("dB_ptr", "*fp32", needs_dB),
    )
    signature |= {"dy_ptr": f"*{type_name}", "lora_B_ptr": f"*{adapter}", **dict.fromkeys(integers, "i32")}
    of_layers, absent = _layers(("dy_ptr", "lora_B_ptr", "gates_ptr"), signature, layers)
    return KernelVariant(
        name=_named("dy_pass", type_name, f"R={rank}", needs, gating=gating, adapter=adapter, layers=layers),
        kernel=moda_backward.dy_kernel,
        signature={**signature, **of_layers},
        constexprs={
            **constexprs,
            **absent,
            "NEEDS_DHG": needs_dhg,
            "NEEDS_DB": needs_dB,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": padded_rank(rank),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} N={N} R={rank}",
        bytes_moved=layers * (floor + parts),
        bytes_floor=layers * floor,
        flops=2 * layers * (needs_dhg + needs_dB) * M * N * rank,
        aligned=_aligned(rank),
    )


def gate_gradient(
    rank: int,
    experts: int = EXPERTS,
    gating: Gating = "by id",
    needs_dh: bool = True,
    needs_gates: bool = True,
    layers: int = 1,
) -> KernelVariant:
    block_e, block_inner = next_power_of_2(experts), next_power_of_2(rank // experts)
    parts = N // 256
    floor = (1 + needs_gates + needs_dh) * M * rank * 4
    integers = ("M", "E", "parts", "parts_1", "parts_2", "stride_dhg_part", "stride_dh_row", "modalities")
    signature, constexprs = _together(
        (GATE_SIGNATURE, {}),
        ({}, {"rank_per_expert": 1}) if rank == experts else ({"rank_per_expert": "i32"}, {}),
        _ids(gating),
        _present("dh_ptr", "*fp32", needs_dh),
        _present("dgates_ptr", "*fp32", needs_gates),
    )
    only = "" if needs_dh and needs_gates else "dh only" if needs_dh else "gates only"
    of_layers, absent = _layers(("gates_ptr",), signature, layers)
    return KernelVariant(
        name=_named("gate gradient", f"R={rank}", f"E={experts}", only, gating=gating, layers=layers),
        kernel=moda_backward.gate_kernel,
        signature={**signature, **of_layers, "dhg_ptr": "*fp32", **dict.fromkeys(integers, "i32")},
        constexprs={
            **constexprs,
            **absent,
            "NEEDS_DH": needs_dh,
            "NEEDS_GATES": needs_gates,
            "BLOCK_M": max(1, 1024 // (block_e * block_inner)),
            "BLOCK_E": block_e,
            "BLOCK_RANK_PER_EXPERT": block_inner,
        },
        num_warps=4,
        num_stages=1,
        problem=f"M={M} R={rank} E={experts}",
        bytes_moved=layers * (floor + (parts - 1) * M * rank * 4),
        bytes_floor=layers * floor,
        flops=layers * (parts + 3) * M * rank,
        aligned=_aligned(rank),
        tensor_cores=False,
    )


def dx_pass(
    type_name: str, rank: int, dropout: bool, adds: bool = True, needs: Needs = "", adapter: str = "fp32"
) -> KernelVariant:
    """Above LARGEST_FUSED_DX_RANK only with needs "dA only": `expand_dx` gives dx there."""
    config = config_for("dx_pass", TYPES[type_name], rank)
    needs_dA, needs_dx = needs != "dx only", needs != "dA only"
    size = TYPES[type_name].itemsize
    chunks = _chunks(config.block_m, -(-K // config.block_n)) if needs_dA else 1
    floor = (needs_dA + (1 + adds) * needs_dx) * M * K * size + M * rank * 4
    floor += rank * K * (4 * needs_dA + TYPES[adapter].itemsize * needs_dx)
    integers = ["M", "K", "R", "stride_x_row", "stride_dh_row", "stride_A_row", "stride_dx_row"]
    integers += ["blocks_per_chunk", "threshold"]
    signature, constexprs = _together(
        _present("x_ptr", f"*{type_name}", needs_dA),
        _present("dx_ptr", f"*{type_name}", needs_dx),
        _present("dA_ptr", "*fp32", needs_dA),
        _present("seed_ptr", "*i64", dropout),
    )
    return KernelVariant(
        name=_named(
            *("dx_pass", type_name, f"R={rank}", needs, "dropout" * dropout, "written" * (not adds)), adapter=adapter
        ),
        kernel=moda_backward.dx_kernel,
        signature={
            **signature,
            "dh_ptr": "*fp32",
            "lora_A_ptr": f"*{adapter}",
            "keep_scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            **constexprs,
            "HAS_DROPOUT": dropout,
            "NEEDS_DA": needs_dA,
            "NEEDS_DX": needs_dx,
            "ADDS": adds,
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_n,
            "BLOCK_R": padded_rank(rank),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} K={K} R={rank}",
        bytes_moved=floor + 2 * (chunks - 1) * rank * K * 4 * needs_dA,
        bytes_floor=floor,
        flops=2 * (needs_dA + needs_dx) * M * K * rank,
        aligned=_aligned(rank),
    )


SIZES = ("bf16", "fp32")
RANKS = (16, 32, 64, 128, 256)
FUSED_DY = tuple(rank for rank in RANKS if rank <= moda_backward.LARGEST_FUSED_DY_RANK)
FUSED_DX = tuple(rank for rank in RANKS if rank <= moda_backward.LARGEST_FUSED_DX_RANK)
BY_ENGINE = tuple(rank for rank in RANKS if rank <= moda_gemm_tma.LARGEST_RANK)
LARGE_DY, LARGE_DX = RANKS[len(FUSED_DY) :], RANKS[len(FUSED_DX) :]
BOTH = (True, False)

FORWARD = (
    *(project(*case) for case in product(SIZES, RANKS, BOTH)),
    *(expand_add(*case) for case in product(SIZES, RANKS, GATINGS)),
    *(expand(*case) for case in product(SIZES, RANKS)),
    *(expand(*case, layers=3) for case in product(SIZES, RANKS, GATINGS)),
    *(expand("bf16", rank, layers=2) for rank in RANKS),
    *(gated_linear(*case) for case in product(SIZES, RANKS, GATINGS)),
    *(gated_linear("bf16", rank, gating, chip=chip) for rank, gating, chip in product(BY_ENGINE, GATINGS, ENGINES)),
)
OF_DY = (
    *(dy_pass(*case, layers=layers) for layers in (1, 3) for case in product(SIZES, FUSED_DY, GATINGS)),
    *(dy_pass("bf16", rank, layers=2) for rank in FUSED_DY),
    *(dy_pass(*case, needs="dB only") for case in product(SIZES, RANKS, GATINGS)),
    *(dy_pass(*case, needs="dB only", layers=3) for case in product(SIZES, FUSED_DY)),
    *(dy_pass(*case, needs="dhg only", layers=layers) for layers in (1, 3) for case in product(SIZES, FUSED_DY)),
    *(project_dy(*case) for case in product(SIZES, LARGE_DY)),
    *(gate_gradient(rank, EXPERTS, gating) for rank in (16, 256) for gating in GATINGS),
    *(gate_gradient(16, EXPERTS, gating, *needs) for gating in GATINGS for needs in ((True, False), (False, True))),
    *(gate_gradient(16, EXPERTS, gating, layers=3) for gating in GATINGS),
    *(gate_gradient(*case) for case in ((1, 1), (8, 8), (16, 1), (96, 3), (64, 64), (256, 1), (256, 2), (256, 64))),
)
OF_X = (
    *(dx_pass(*case) for case in product(SIZES, FUSED_DX, BOTH, BOTH)),
    *(dx_pass(*case, needs="dx only") for case in product(SIZES, FUSED_DX, BOTH, BOTH)),
    *(dx_pass(*case, needs="dA only") for case in product(SIZES, RANKS, BOTH)),
    *(expand_dx(*case) for case in product(SIZES, LARGE_DX, BOTH, BOTH)),
    *(input_gradient(*case) for case in product(SIZES, RANKS, BOTH)),
    *(input_gradient("bf16", rank, dropout, chip=chip) for rank, dropout, chip in product(BY_ENGINE, BOTH, ENGINES)),
)
# One of every configuration, or less.
BFLOAT16_ADAPTERS = (
    *(project("bf16", rank, True, "bf16") for rank in RANKS),
    *(make("bf16", rank, adapter="bf16") for make in (expand_add, gated_linear) for rank in RANKS),
    *(dy_pass("bf16", rank, adapter="bf16") for rank in FUSED_DY),
    *(project_dy("bf16", rank, "bf16") for rank in LARGE_DY),
    *(dx_pass("bf16", rank, True, False, adapter="bf16") for rank in FUSED_DX),
    *(expand_dx("bf16", rank, True, False, "bf16") for rank in LARGE_DX),
    *(gated_linear("bf16", rank, adapter="bf16", chip=chip) for rank, chip in product(BY_ENGINE, ENGINES)),
    *(input_gradient("bf16", rank, True, "bf16", chip) for rank, chip in product(BY_ENGINE, ("", *ENGINES))),
    project("fp32", 16, True, "bf16"),
    *(make("fp32", 16, adapter="bf16") for make in (expand_add, gated_linear, dy_pass)),
    dx_pass("fp32", 16, True, False, adapter="bf16"),
)
FLOAT16 = (
    *(project("fp16", rank, True) for rank in (16, 256)),
    *(make("fp16", rank) for make in (expand_add, expand, gated_linear) for rank in (16, 256)),
    dy_pass("fp16", 16),
    dy_pass("fp16", 256, needs="dB only"),
    *(dx_pass("fp16", rank, True) for rank in (16, 64)),
    input_gradient("fp16", 16, True),
    *(gated_linear("fp16", 16, chip=chip) for chip in ENGINES),
    *(input_gradient("fp16", 16, True, chip=chip) for chip in ENGINES),
)
ONE_RANK_PER_EXPERT = (
    project("bf16", 8, True),
    *(make("bf16", 8) for make in (expand_add, gated_linear)),
    *(make("bf16", 8, gating, layers=layers) for make in (expand, dy_pass) for gating in GATINGS for layers in (1, 3)),
    gate_gradient(8, 8, "one gate", layers=3),
    dx_pass("bf16", 8, True, False),
    *(gated_linear("bf16", 8, gating, has_bias=False, chip=chip) for gating in GATINGS for chip in ENGINES),
    *(input_gradient("bf16", 8, True, chip=chip) for chip in ENGINES),
)
VARIANTS = (*FORWARD, *OF_DY, *OF_X, *BFLOAT16_ADAPTERS, *FLOAT16, *ONE_RANK_PER_EXPERT)
