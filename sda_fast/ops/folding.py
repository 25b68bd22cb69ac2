"""One modality's update folded into a weight: W + scaling * B diag(g) A, summed in float32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sda_fast.ops import cuda_library
from sda_fast.ops.moda_torch import Member, gate_of_ranks, wide
from sda_fast.ops.quantized import decode_absmax, decode_scaled, workspaces

# Elements of the weight that are summed at once where they are rounded afterwards: they should stay in the cache.
ELEMENTS_PER_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def folded_weight(
    member: Member, dtype: torch.dtype, *, backend: str, use_library: bool = False, out: Tensor | None = None
) -> Tensor:
    """The folded weight of a layer for its one line of gates.

    Args:
        member: gates [1, E].
        dtype: of the result: float64, float32, float16 or bfloat16; the sum is float32 (float64 for float64).
        backend: "triton" or "torch".
        use_library: let the CUDA library do what it can.
        out: [N, K] contiguous, to write into; a view of the workspace if absent, so hold `workspaces.guard` until the
            product that reads it is launched.
    Returns:
        [N, K].
    """
    layout = member.layout
    shape = (layout.out_features, layout.in_features)
    if out is None:
        out = workspaces.take(shape, dtype, member.weight.device)
    if layout.quant_type and use_library and dtype in SIXTEEN_BITS:
        factors = float32_unless_bfloat16(member.lora_A), float32_unless_bfloat16(member.lora_B)
        described = (layout, member.weight, member.statistics)
        return cuda_library.decode_fold(*described, *factors, member.gates[0], member.scaling, out)
    if layout.quant_type and backend == "triton":
        from sda_fast.kernels.nf4 import decode_4bit

        return decode_4bit(
            packed_bytes(member),
            member.statistics,
            shape,
            layout.blocksize,
            layout.nested_blocksize,
            out=out,
            lora_A=float32_unless_bfloat16(member.lora_A).contiguous(),
            lora_B=float32_unless_bfloat16(member.lora_B).contiguous(),
            gates=member.gates[0].contiguous(),
            scaling=member.scaling,
        )
    return fold_in_pytorch(member, out)


def packed_bytes(member: Member) -> Tensor:
    """The 4-bit codes as flat bytes, whatever dtype they are stored as."""
    return member.weight.reshape(-1).view(torch.uint8)


def float32_unless_bfloat16(matrix: Tensor) -> Tensor:
    """The dtypes of adapters that the kernels take."""
    return matrix if matrix.dtype == torch.bfloat16 else matrix.float()


def fold_in_pytorch(member: Member, out: Tensor) -> Tensor:
    """Fill `out` by chunks of rows: decode or widen, add the update, round."""
    sums = wide(out.dtype)
    lora_A = member.lora_A.to(sums)
    lora_B = member.lora_B.to(sums) * gate_of_ranks(member, None, sums)
    if member.layout.quant_type == 0 and member.weight.dtype == out.dtype == sums:
        return torch.addmm(member.weight, lora_B, lora_A, out=out)
    for rows, weight in wide_rows(member, sums):
        out[rows] = torch.addmm(weight, lora_B[rows], lora_A)
    return out


def wide_rows(member: Member, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in `dtype`, some rows at a time."""
    layout = member.layout
    N, K = layout.out_features, layout.in_features
    step = max(1, ELEMENTS_PER_CHUNK[member.weight.device.type] // max(1, K))
    if layout.quant_type == 0:
        for first in range(0, N, step):
            rows = slice(first, min(first + step, N))
            yield rows, member.weight[rows].to(dtype)
        return
    # A chunk begins where a block does, and so where a byte does.
    rows_per_period = layout.blocksize // math.gcd(layout.blocksize, K)
    step = max(1, step // rows_per_period) * rows_per_period
    codes, absmax = packed_bytes(member), decode_absmax(layout, member.statistics)
    buffer = torch.empty(min(step, N), K, dtype=dtype, device=codes.device)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        part = replace(layout, out_features=rows.stop - first)
        bytes_of_part = slice(first * K // 2, (rows.stop * K + 1) // 2)
        blocks = slice(first * K // layout.blocksize, -(-rows.stop * K // layout.blocksize))
        out = buffer[: part.out_features]
        yield rows, decode_scaled(part, codes[bytes_of_part], absmax[blocks], member.statistics[1], dtype, out)
