"""Few rows times a 4-bit weight on a CPU: bitsandbytes' own product, from a copy of the codes in the layout it wants.

The layout is [N / 32, K / 2, 32, 2] with low and high nibbles 32 elements apart, block scales transposed and rounded to
bfloat16. bitsandbytes repacks its frozen layers in place, which loses nested statistics and the scales' last bits; here
the weight stays as it is and the copy, half a byte per element and two per block, goes with the layer that keeps it.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor

from sda_fast.ops.moda_group import without_autocast
from sda_fast.ops.not_copied import NotCopied
from sda_fast.ops.quantized import (
    WeightLayout,
    decode_absmax,
    describe_weight,
    in_float32,
    is_4bit,
    layout_of,
    state_of,
    statistics_of,
)
from sda_fast.ops.watched import Watched

ROWS_PER_GROUP = 32


@functools.cache
def product_exists() -> bool:
    """Whether this processor has the instructions of bitsandbytes' product and bitsandbytes was built with it."""
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return False
    return bool(has_avx512bf16())


def takes(device: torch.device, dtype: torch.dtype, rows: int, layout: WeightLayout) -> bool:
    """Whether the product exists for activations of so many rows and a weight; it computes in bfloat16 only."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and rows > 0
        and layout.quant_type != 0
        and layout.out_features % ROWS_PER_GROUP == 0
        and layout.in_features % layout.blocksize == 0
        and product_exists()
    )


@torch.no_grad()
def repack(layout: WeightLayout, data: Tensor, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The codes [N, K / 2] uint8 and block scales [K / blocksize, N] bfloat16 that the product reads.

    Args:
        layout, data, statistics: from `describe_weight`, of a weight that `takes` allows.
    """
    N, K = layout.out_features, layout.in_features
    # Rows 16 to 31 of a group go into the high nibbles of the bytes of rows 0 to 15.
    halves = data.reshape(-1).view(torch.uint8).view(N // ROWS_PER_GROUP, 2, ROWS_PER_GROUP // 2, K // 2)
    first, second = halves.unbind(1)
    codes = torch.empty(N // ROWS_PER_GROUP, K // 2, ROWS_PER_GROUP // 2, 2, dtype=torch.uint8)
    codes[..., 0] = ((first >> 4) | (second & 0xF0)).transpose(1, 2)
    codes[..., 1] = ((first & 0xF) | (second << 4)).transpose(1, 2)
    scales = decode_absmax(layout, statistics).view(N, K // layout.blocksize)
    return codes.view(N, K // 2), scales.t().to(torch.bfloat16, memory_format=torch.contiguous_format)


def watchable(weight: Tensor) -> bool:
    """Whether it is a 4-bit weight whose changes are counted; those made under inference_mode are not."""
    return is_4bit(weight) and not any(tensor.is_inference() for tensor in (weight, *statistics_of(state_of(weight))))


class RepackedWeight:
    """One weight's copy for the product, and how to tell that the weight is still the one that was copied."""

    def __init__(self, weight: Tensor) -> None:
        state = state_of(weight)
        self.layout = layout_of(state)
        self.shape = [self.layout.out_features, self.layout.in_features]
        self.code = state.code
        if getattr(state, "packing_format_for_cpu", False):
            # bitsandbytes evaluated the frozen layer before: its weight is what is wanted.
            self.codes, self.scales = weight.data, state.absmax
        else:
            self.codes, self.scales = repack(*describe_weight(weight))
        # The weight is not held: where models are loaded piece by piece, the copy goes when its weight does.
        self.weight = weakref.ref(weight, functools.partial(forget, weakref.ref(self)))
        self.sources: Watched | None = Watched([weight, *statistics_of(state)])

    def is_valid(self, weight: Tensor) -> bool:
        """Whether `weight` and its quantisation state are what was copied, as far as `Watched` can tell."""
        state = weight.quant_state if weight is self.weight() else None  # type: ignore[attr-defined]
        if state is None or self.sources is None:
            return False
        return self.sources.are_still([weight, *statistics_of(state)])

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T for x [M, K] bfloat16; codes and scales rounded to bfloat16, sums float32, rounded once."""
        return torch.ops.bitsandbytes.gemv_4bit.default(
            x, self.codes, self.shape, self.scales, self.code, self.layout.blocksize
        )


def forget(copy: weakref.ref[RepackedWeight], weight: object) -> None:
    """Free the memory of a copy whose weight is gone."""
    of = copy()
    if of is not None:
        of.codes = of.scales = of.sources = None  # type: ignore[assignment]


def output_of(
    repacked: RepackedWeight,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    scaling: float,
) -> Tensor:
    """y = x W^T + bias + (h * G) B^T, the update in float32 and rounded with the sum.

    Args:
        x: [..., K] bfloat16.
        gates: [1, E] float32.
    Returns:
        [..., N] bfloat16.
    """
    rows = dense_rows(x)
    with without_autocast(x.device):
        h = torch.nn.functional.linear(rows.float(), in_float32(lora_A))
        if gates.shape[1] == h.shape[1]:
            h.mul_(gates)
        else:
            h.view(h.shape[0], gates.shape[1], -1).mul_(gates[:, :, None])
        update = torch.nn.functional.linear(h, in_float32(lora_B))
        y = repacked.multiply(rows)
        if bias is None:
            y.add_(update, alpha=scaling)
        else:
            y.add_(update.mul_(scaling).add_(bias.to(x.dtype)))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def frozen_output_of(repacked: RepackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias for x [..., K] bfloat16."""
    y = repacked.multiply(dense_rows(x))
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], y.shape[1])


def dense_rows(x: Tensor) -> Tensor:
    """x as [M, K] with neighbouring columns side by side."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class RepackedWeights(NotCopied):
    """The copy that one layer keeps, or none. Copies of the layer start without."""

    def __init__(self) -> None:
        self.kept: RepackedWeight | None = None

    def valid(self, weight: Tensor) -> RepackedWeight | None:
        """The copy of `weight` if there is one that still holds."""
        if self.kept is not None and not self.kept.is_valid(weight):
            self.kept = None
        return self.kept

    def make(self, weight: Tensor) -> RepackedWeight:
        """A copy of `weight`, kept from now on."""
        self.kept = RepackedWeight(weight)
        return self.kept

    def clear(self) -> None:
        """Free it."""
        self.kept = None
