"""The variants of the 4-bit kernels that the gate compiles, with their bytes by formula (see `gate`)."""

from __future__ import annotations

import torch

from sda_fast.kernels import nf4, nf4_linear
from sda_fast.kernels.configs import padded_rank, rank_block
from sda_fast.kernels.gate import KernelVariant

N, K, BLOCKSIZE, NESTED_BLOCKSIZE = 3584, 3584, 64, 256
PLACEMENTS = {nf4.ALIGNED.value: "", nf4.EVEN.value: " even", nf4.ODD.value: " odd"}
STATISTICS = {"data_ptr": "*u8", "code_ptr": "*fp32"}


def _statistics(nested: bool) -> tuple[dict[str, str], dict[str, object]]:
    if not nested:
        absent = dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr"))
        return {**STATISTICS, "absmax_ptr": "*fp32"}, {**absent, "NESTED_BLOCKSIZE": 0}
    present = dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr"), "*fp32")
    return {**STATISTICS, **present, "absmax_ptr": "*u8"}, {"NESTED_BLOCKSIZE": NESTED_BLOCKSIZE}


def _weight_bytes(nested: bool) -> int:
    blocks = N * K // BLOCKSIZE
    return N * K // 2 + blocks * (1 if nested else 4)


def decode(nested: bool, rank: int = 0, placement: int = nf4.ALIGNED.value) -> KernelVariant:
    signature, constexprs = _statistics(nested)
    block_n, block_k, num_warps = nf4.decode_blocks(rank, placement)
    lora = {"lora_A_ptr": "*fp32", "lora_B_ptr": "*fp32", "gates_ptr": "*fp32"}
    floor = _weight_bytes(nested) + 2 * N * K + 4 * rank * (N + K)
    return KernelVariant(
        name="decode" + " nested" * nested + f" fold R={rank}" * bool(rank) + PLACEMENTS[placement],
        kernel=nf4.decode_kernel,
        signature={
            **signature,
            **(lora if rank else {}),
            "weight_ptr": "*bf16",
            "scaling": "fp32",
            "elements": "i32",
            **dict.fromkeys(("N", "K", "R", "stride_A_row", "stride_B_row", "rank_per_expert"), "i32"),
        },
        constexprs={
            **constexprs,
            **({} if rank else dict.fromkeys(lora)),
            "HAS_FOLD": bool(rank),
            "BLOCKSIZE": BLOCKSIZE,
            "PLACEMENT": placement,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_R": rank_block(torch.float32, rank),
            "PADDED_R": padded_rank(rank),
        },
        num_warps=num_warps,
        num_stages=1,
        problem=f"N={N} K={K} R={rank}",
        bytes_moved=floor,
        bytes_floor=floor,
        flops=N * K * (1 + 2 * rank),
        aligned=("N", "K", "R", "elements", "stride_A_row", "stride_B_row") if placement != nf4.ODD.value else (),
        tensor_cores=bool(rank),
        fp_fusion=False,
    )


def small_product(type_name: str, M: int, nested: bool) -> KernelVariant:
    signature, constexprs = _statistics(nested)
    block_m, block_n, block_k = nf4_linear.small_product_blocks(M, 4 if type_name == "fp32" else 2)
    splits = min(264 // (N // block_n), K // block_k // 2)
    floor = _weight_bytes(nested) + 2 * M * (N + K)
    return KernelVariant(
        name=f"small product {type_name} M={M}" + " nested" * nested,
        kernel=nf4_linear.small_product_kernel,
        signature={
            **signature,
            "x_ptr": f"*{type_name}",
            "parts_ptr": "*fp32",
            **dict.fromkeys(("M", "N", "K", "elements", "stride_x_row", "blocks_per_split"), "i32"),
        },
        constexprs={
            **constexprs,
            "BLOCKSIZE": BLOCKSIZE,
            "PLACEMENT": nf4.ALIGNED.value,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=4,
        num_stages=3,
        problem=f"M={M} N={N} K={K}",
        bytes_moved=floor + splits * M * N * 4,
        bytes_floor=floor,
        flops=2 * M * N * K,
        aligned=("N", "K", "elements", "stride_x_row"),
    )


def finish_product(M: int, rank: int) -> KernelVariant:
    block_m, _, _ = nf4_linear.small_product_blocks(M, 2)
    integers = ("M", "N", "R", "splits", "stride_part", "stride_h_row", "stride_B_row", "stride_gates_row")
    floor = 4 * 4 * M * N + 2 * M * N + 4 * rank * (N + M)
    return KernelVariant(
        name=f"finish small product bf16 M={M} R={rank}",
        kernel=nf4_linear.finish_product_kernel,
        signature={
            "parts_ptr": "*fp32",
            "bias_ptr": "*bf16",
            "h_ptr": "*fp32",
            "lora_B_ptr": "*fp32",
            "gates_ptr": "*fp32",
            "y_ptr": "*bf16",
            "scaling": "fp32",
            **dict.fromkeys((*integers, "stride_y_row", "rows_per_sequence", "rank_per_expert"), "i32"),
        },
        constexprs={
            "HAS_BIAS": True,
            "HAS_LORA": True,
            "modality_ids_ptr": None,
            "GATE_PER_ROW": False,
            "BLOCK_M": block_m,
            "BLOCK_N": nf4_linear.FINISH_COLUMNS,
            "BLOCK_R": rank_block(torch.float32, rank),
            "PADDED_R": padded_rank(rank),
        },
        num_warps=4,
        num_stages=1,
        problem=f"M={M} N={N} R={rank}, 4 parts",
        bytes_moved=floor,
        bytes_floor=floor,
        flops=2 * M * N * rank,
        aligned=("N", "stride_part", "stride_h_row", "stride_B_row", "stride_y_row"),
    )


VARIANTS = (
    decode(nested=False),
    decode(nested=True),
    decode(nested=True, placement=nf4.EVEN.value),
    *(decode(nested=True, rank=rank) for rank in (16, 64, 256)),
    decode(nested=True, rank=16, placement=nf4.EVEN.value),
    decode(nested=True, rank=16, placement=nf4.ODD.value),
    *(small_product("bf16", M, nested=True) for M in (1, 32, 64)),
    small_product("bf16", 1, nested=False),
    small_product("fp16", 16, nested=True),
    small_product("fp32", 64, nested=True),
    *(finish_product(64, rank) for rank in (16, 256)),
)
