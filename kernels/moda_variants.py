"""The variants of the MoDA kernels that the gate compiles, with their bytes by formula (see `gate`)."""

from __future__ import annotations

from typing import Literal

import torch

from sda_fast.kernels import moda_backward, moda_forward, moda_gemm
from sda_fast.kernels.configs import config_for, padded_rank, rank_block
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
    "rank_per_expert": "i32",
    "scaling": "fp32",
}
PLACES = ("", *(f"_{place}" for place in range(1, LAYERS_PER_LAUNCH)))
WIDTHS = tuple(f"N{which}" for which in PLACES)
OF_LAYERS = tuple(f"stride_{name}{which}_row" for name in ("y", "dy") for which in PLACES)
SIZES = ("M", *WIDTHS, "K", "R", "stride_h_row", "stride_x_row", *OF_LAYERS, "stride_dx_row")
STRIDES = (
    "stride_weight_rank",
    "stride_weight_row",
    "stride_A_row",
    "stride_B_row",
    "stride_dh_row",
    "stride_dhg_part",
)
ALIGNED = (*SIZES, *STRIDES)


# Whose gates a row has: those of its own id, its own line of gates, or the one line that there is.
Gating = Literal["by id", "row gates", "one gate"]


def _ids(gating: Gating) -> tuple[dict[str, str], dict[str, object]]:
    per_row: dict[str, object] = {"GATE_PER_ROW": gating == "row gates"}
    if gating == "by id":
        return {"modality_ids_ptr": "*i32"}, per_row
    return {}, {"modality_ids_ptr": None, **per_row}


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


def _named(name: str, gating: Gating) -> str:
    return name if gating == "by id" else f"{name} {gating}"


def _chunks(block_m: int, blocks_of_columns: int) -> int:
    wanted = -(-PROGRAMS_WANTED // blocks_of_columns)
    return min(wanted, M // block_m)


def project(type_name: str, rank: int, dropout: bool) -> KernelVariant:
    config = config_for("project", TYPES[type_name], rank)
    size = TYPES[type_name].itemsize
    integers = ["M", "K", "R", "stride_x_row", "stride_weight_rank", "stride_h_split", "stride_h_row"]
    integers += ["blocks_per_split", "threshold"]
    floor = M * K * size + rank * K * 4 + M * rank * 4
    splits = max(1, PROGRAMS_WANTED // (M // config.block_m))
    return KernelVariant(
        name=f"project {type_name} R={rank}" + " dropout" * dropout,
        kernel=moda_forward.project_kernel,
        signature={
            "x_ptr": f"*{type_name}",
            "weight_ptr": "*fp32",
            "h_ptr": "*fp32",
            "seed_ptr": "*i64",
            "keep_scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "stride_weight_column": 1,
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
        aligned=ALIGNED,
    )


def project_dy(type_name: str, rank: int) -> KernelVariant:
    forward = project(type_name, rank, dropout=False)
    signature = {**forward.signature, "stride_weight_column": "i32"}
    constexprs = {**forward.constexprs, "stride_weight_rank": 1}
    del signature["stride_weight_rank"], constexprs["stride_weight_column"]
    return KernelVariant(
        **{
            **vars(forward),
            "name": f"dhg {type_name} R={rank}",
            "signature": signature,
            "constexprs": constexprs,
        }
    )


def expand_add(type_name: str, rank: int, gating: Gating = "by id") -> KernelVariant:
    return _expand(f"expand_add {type_name} R={rank}", type_name, rank, gating)


def expand(type_name: str, rank: int, gating: Gating = "by id") -> KernelVariant:
    return _expand(f"expand {type_name} R={rank} bias", type_name, rank, gating, adds=False)


def expand_group(type_name: str, rank: int, gating: Gating = "one gate", layers: int = 3) -> KernelVariant:
    return _expand(f"expand {type_name} R={rank} layers={layers}", type_name, rank, gating, adds=False, layers=layers)


def expand_dx(type_name: str, rank: int, adds: bool) -> KernelVariant:
    name = f"dx only {type_name} R={rank} dropout" + " written" * (not adds)
    return _expand(name, type_name, rank, is_gated=False, adds=adds)


def _expand(
    name: str,
    type_name: str,
    rank: int,
    gating: Gating = "one gate",
    *,
    is_gated: bool = True,
    adds: bool = True,
    layers: int = 1,
) -> KernelVariant:
    has_bias = is_gated and not adds
    config = config_for("expand_add", TYPES[type_name], rank)
    ids_signature, ids_constexprs = _ids(gating)
    size = TYPES[type_name].itemsize
    moved = (1 + adds) * M * N * size + M * rank * 4 + N * rank * 4
    unit, strided = ("rank", "column") if is_gated else ("column", "rank")
    integers = ("M", *WIDTHS, *(f"stride_y{which}_row" for which in PLACES), f"stride_weight_{strided}", "threshold")
    signature = {
        **GATE_SIGNATURE,
        **ids_signature,
        **({"bias_ptr": f"*{type_name}"} if has_bias else {}),
        "y_ptr": f"*{type_name}",
        "weight_ptr": "*fp32",
        "seed_ptr": "*i64",
        "keep_scale": "fp32",
        **dict.fromkeys(integers, "i32"),
    }
    of_layers, absent = _layers(("y_ptr", "bias_ptr", "weight_ptr", "gates_ptr"), signature, layers)
    return KernelVariant(
        name=_named(name, gating) if is_gated else name,
        kernel=moda_forward.expand_add_kernel,
        signature={**signature, **of_layers},
        constexprs={
            **ids_constexprs,
            **absent,
            **({} if has_bias else {"bias_ptr": None}),
            f"stride_weight_{unit}": 1,
            "ADDS": adds,
            "HAS_BIAS": has_bias,
            "IS_GATED": is_gated,
            "HAS_DROPOUT": not is_gated,
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
        flops=2 * M * N * rank,
        aligned=ALIGNED,
    )


def gated_linear(type_name: str, rank: int) -> KernelVariant:
    size = TYPES[type_name].itemsize
    config = moda_gemm.CONFIGS[size]
    block_k = moda_gemm.BLOCK_K if size == 2 else moda_gemm.BLOCK_K // 2
    floor = (M * K + N * K + M * N) * size + M * rank * 4
    integers = ("M", "N", "K", "stride_x_row", "stride_weight_row", "stride_B_row", "stride_y_row")
    return KernelVariant(
        name=f"gated_linear {type_name} R={rank}",
        kernel=moda_gemm.gated_linear_kernel,
        signature={
            **GATE_SIGNATURE,
            "modality_ids_ptr": "*i32",
            "x_ptr": f"*{type_name}",
            "weight_ptr": f"*{type_name}",
            "bias_ptr": f"*{type_name}",
            "y_ptr": f"*{type_name}",
            "lora_B_ptr": "*fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "HAS_BIAS": True,
            "GATE_PER_ROW": False,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": block_k,
            "BLOCK_R": rank_block(TYPES[type_name], rank),
            "PADDED_R": padded_rank(rank),
            "GROUP_M": 8,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} N={N} K={K} R={rank}",
        bytes_moved=floor,
        bytes_floor=floor,
        flops=2 * M * N * (K + rank),
        aligned=ALIGNED,
    )


def dy_pass(type_name: str, rank: int, gating: Gating = "by id", layers: int = 1) -> KernelVariant:
    config = config_for("dy_pass", TYPES[type_name], rank)
    fused = padded_rank(rank) <= moda_backward.LARGEST_FUSED_DY_RANK
    ids_signature, ids_constexprs = _ids(gating)
    size = TYPES[type_name].itemsize
    blocks_of_columns = -(-N // config.block_n)
    chunks = _chunks(config.block_m, blocks_of_columns)
    floor = M * N * size + 2 * M * rank * 4 + 2 * N * rank * 4
    parts = 2 * chunks * N * rank * 4 + (2 * blocks_of_columns * M * rank * 4 if fused else 0)
    integers = ("M", *WIDTHS, *(f"stride_dy{which}_row" for which in PLACES), "stride_B_row", "blocks_per_chunk")
    signature = {
        **GATE_SIGNATURE,
        **ids_signature,
        "dy_ptr": f"*{type_name}",
        "lora_B_ptr": "*fp32",
        "dB_ptr": "*fp32",
        "dhg_ptr": "*fp32",
        **dict.fromkeys(integers, "i32"),
    }
    of_layers, absent = _layers(("dy_ptr", "lora_B_ptr", "gates_ptr"), signature, layers)
    name = f"dy_pass {type_name} R={rank}" + ("" if fused else " dB only") + f" layers={layers}" * (layers > 1)
    return KernelVariant(
        name=_named(name, gating),
        kernel=moda_backward.dy_kernel,
        signature={**signature, **of_layers},
        constexprs={
            **ids_constexprs,
            **absent,
            "NEEDS_DHG": fused,
            "NEEDS_DB": True,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": padded_rank(rank),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} N={N} R={rank}",
        bytes_moved=floor + parts,
        bytes_floor=floor,
        flops=(4 if fused else 2) * M * N * rank,
        aligned=ALIGNED,
    )


def gate_gradient(rank: int, gating: Gating, layers: int = 1) -> KernelVariant:
    ids_signature, ids_constexprs = _ids(gating)
    block_inner = padded_inner = max(1, rank // EXPERTS)
    parts = N // 256
    floor = 3 * M * rank * 4
    integers = ("M", "E", "parts", "parts_1", "parts_2", "stride_dhg_part", "stride_dh_row", "modalities")
    signature = {
        **GATE_SIGNATURE,
        **ids_signature,
        "dhg_ptr": "*fp32",
        "dh_ptr": "*fp32",
        "dgates_ptr": "*fp32",
        **dict.fromkeys(integers, "i32"),
    }
    of_layers, absent = _layers(("gates_ptr",), signature, layers)
    return KernelVariant(
        name=_named(f"gate gradient R={rank}" + f" layers={layers}" * (layers > 1), gating),
        kernel=moda_backward.gate_kernel,
        signature={**signature, **of_layers},
        constexprs={
            **ids_constexprs,
            **absent,
            "NEEDS_DH": True,
            "NEEDS_GATES": True,
            "BLOCK_M": max(1, 1024 // (EXPERTS * block_inner)),
            "BLOCK_E": EXPERTS,
            "BLOCK_RANK_PER_EXPERT": padded_inner,
        },
        num_warps=4,
        num_stages=1,
        problem=f"M={M} R={rank} E={EXPERTS}",
        bytes_moved=floor + (parts - 1) * M * rank * 4,
        bytes_floor=floor,
        flops=(parts + 3) * M * rank,
        aligned=ALIGNED,
        tensor_cores=False,
    )


def dx_pass(type_name: str, rank: int, dropout: bool, adds: bool = True) -> KernelVariant:
    config = config_for("dx_pass", TYPES[type_name], rank)
    size = TYPES[type_name].itemsize
    chunks = _chunks(config.block_m, -(-K // config.block_n))
    fused = padded_rank(rank) <= moda_backward.LARGEST_FUSED_DX_RANK
    floor = (2 + adds if fused else 1) * M * K * size + M * rank * 4 + 2 * rank * K * 4
    integers = ["M", "K", "R", "stride_x_row", "stride_dh_row", "stride_A_row", "stride_dx_row"]
    integers += ["blocks_per_chunk", "threshold"]
    return KernelVariant(
        name=f"dx_pass {type_name} R={rank}"
        + ("" if fused else " dA only")
        + " dropout" * dropout
        + " written" * (not adds),
        kernel=moda_backward.dx_kernel,
        signature={
            "x_ptr": f"*{type_name}",
            "dx_ptr": f"*{type_name}",
            "dh_ptr": "*fp32",
            "lora_A_ptr": "*fp32",
            "dA_ptr": "*fp32",
            "seed_ptr": "*i64",
            "keep_scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "HAS_DROPOUT": dropout,
            "NEEDS_DA": True,
            "NEEDS_DX": fused,
            "ADDS": adds,
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_n,
            "BLOCK_R": padded_rank(rank),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        problem=f"M={M} K={K} R={rank}",
        bytes_moved=floor + 2 * (chunks - 1) * rank * K * 4,
        bytes_floor=floor,
        flops=(4 if fused else 2) * M * K * rank,
        aligned=ALIGNED,
    )


VARIANTS = (
    *(project("bf16", rank, dropout) for rank in (16, 64, 256) for dropout in (False, True)),
    *(project("bf16", rank, True) for rank in (32, 128)),
    *(project_dy("bf16", rank) for rank in (64, 256)),
    *(expand_add("bf16", rank) for rank in (16, 32, 64, 128, 256)),
    *(expand_add("bf16", 16, gating) for gating in ("row gates", "one gate")),
    *(expand("bf16", rank) for rank in (16, 32, 64, 128, 256)),
    *(expand("bf16", rank, "one gate") for rank in (16, 64)),
    *(gated_linear("bf16", rank) for rank in (16, 256)),
    *(dy_pass("bf16", rank) for rank in (16, 32, 64, 128, 256)),
    *(dy_pass("bf16", rank, "one gate") for rank in (16, 64)),
    *(expand_group("bf16", rank, layers=layers) for rank in (16, 64) for layers in (2, 3)),
    *(dy_pass("bf16", rank, "one gate", layers) for rank in (16, 32) for layers in (2, 3)),
    expand_group("bf16", 16, "by id"),
    dy_pass("bf16", 16, "by id", 3),
    gate_gradient(16, "one gate", 3),
    dy_pass("bf16", 16, "row gates"),
    *(gate_gradient(rank, gating) for rank in (16, 256) for gating in ("by id", "row gates", "one gate")),
    *(dx_pass("bf16", rank, True) for rank in (16, 32, 64, 128, 256)),
    *(dx_pass("bf16", rank, True, adds=False) for rank in (16, 32, 64)),
    *(dx_pass("bf16", 16, False, adds) for adds in (True, False)),
    *(expand_dx("bf16", rank, adds) for rank in (128, 256) for adds in (True, False)),
    *(make("fp32", rank, True) for make in (project, dx_pass) for rank in (16, 32, 64, 128, 256)),
    *(make("fp32", rank, "row gates") for make in (expand_add, dy_pass) for rank in (16, 32, 64, 128, 256)),
    expand("fp32", 16),
    expand_dx("fp32", 256, adds=True),
    gated_linear("fp32", 16),
    *(make("fp16", 16, True) for make in (project, dx_pass)),
    *(make("fp16", 16, "row gates") for make in (expand_add, dy_pass)),
)
