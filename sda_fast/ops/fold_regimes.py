"""How a layer computes in evaluation with one modality, chosen by shape: four things to compute, by whom.

"fold": decode (or copy) the weight with the update added, then a library GEMM. "unfold": as in training. "small
product": the 4-bit weight is decoded on its way to the multiplication, the update added in the epilogue; nothing of the
weight's size is written. "bitsandbytes": its own 4-bit product, then the update; on a CPU from a repacked copy of the
codes that the layer keeps (`repacked`).

What `sda-fast bench --tune` measured on this device decides (`measured`). Where it did not, a rule does: folding costs
about as much as N * K elements' worth of work, the update beside the weight as much as rows * (N + K) and, on a GPU,
its launches, so folding pays from `rows * (N + K) + LAUNCHES >= RATIO * N * K` on. Few rows go another way: on a CPU
bitsandbytes' product up to 16, on a GPU the CUDA library's small product up to 16 (where a weight is not so small that
folding costs nothing), and without the library bitsandbytes' up to 4 where folding does not pay.

Measured on: CPU, float32 and bfloat16 at rank 8 (bench/results/fold-amd-epyc-2-cores.json); float16 is taken to be as
bfloat16, float64 as float32. The 16 rows of a CPU: on two (bench/results/nf4-*.json). GPU: on one, an H200, bfloat16
at rank 8 (bench/results/tuned/nvidia-h200.json); for every shape measured there the rule takes the fastest way, or one
within 1 % of its time. Few rows were 1, 16 and 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sda_fast.ops import measured, repacked
from sda_fast.ops.quantized import DECODABLE_BY_BITSANDBYTES, QUANT_NAMES, WeightLayout

What = Literal["fold", "unfold", "small product", "bitsandbytes"]
DECISION = "evaluation"
LARGEST_SMALL_M = 64
LARGEST_REPACKED_M = 16
# By rule; 64 rows were slower than folding, and without the library 16 slower than decoding.
LARGEST_M_BY_LIBRARY, LARGEST_M_BY_BITSANDBYTES = 16, 4
SMALLEST_PRODUCT_BY_LIBRARY = 1 << 22
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# On a CPU by bytes per element of x, on a GPU by who folds.
CPU_RATIOS = {2: 4.0, 4: 2.0, 8: 2.0}
GPU_RATIOS = {"library": 0.8, "triton": 5.0, "torch": 20.0}
# Elements that the H200 folds or updates while it waits for the launches of an update.
LAUNCHES = 2e7


@dataclass(frozen=True)
class Way:
    """What to compute, and whether the CUDA library does its part rather than Triton or PyTorch."""

    what: What
    by_library: bool = False

    @property
    def name(self) -> str:
        """As tables of measured times have it."""
        return f"{self.what} by the library" if self.by_library else self.what


BITSANDBYTES = Way("bitsandbytes")
_forced: ContextVar[Way | None] = ContextVar("sda_fast_evaluation_way", default=None)


@contextmanager
def forced_evaluation(what: What, *, by_library: bool = False) -> Iterator[None]:
    """Within this block evaluation goes one way wherever it can; for tests and measurements.

    Raises:
        ValueError: `what` is none of the ways.
    """
    if what not in get_args(What):
        raise ValueError(f"the way of evaluation must be one of {get_args(What)}, got {what!r}")
    token = _forced.set(Way(what, by_library))
    try:
        yield
    finally:
        _forced.reset(token)


def possible_ways(
    x: Tensor, layout: WeightLayout, backend: str, use_library: bool, *, may_repack: bool = False
) -> tuple[Way, ...]:
    """What activations x [M, K] and a weight allow here; the arguments are those of `evaluation_way`."""
    return ways_of(x.device, x.dtype, rows_of(x), layout, backend, use_library, may_repack)


def rows_of(x: Tensor) -> int:
    """M of activations [..., K]."""
    return x.shape[0] if x.dim() == 2 else x.numel() // x.shape[-1] if x.shape[-1] else 0


def ways_of(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    layout: WeightLayout,
    backend: str,
    use_library: bool,
    may_repack: bool,
) -> tuple[Way, ...]:
    library = use_library and layout.quant_type != 0 and dtype in SIXTEEN_BITS
    ways = [Way("fold"), Way("unfold")]
    if library:
        ways.append(Way("fold", by_library=True))
    if rows <= LARGEST_SMALL_M:
        if layout.quant_type != 0 and backend == "triton":
            ways.append(Way("small product"))
        if library:
            ways.append(Way("small product", by_library=True))
    repacks = may_repack and backend == "torch" and repacked.takes(device, dtype, rows, layout)
    if repacks or bitsandbytes_multiplies(device, dtype, layout):
        ways.append(BITSANDBYTES)
    return tuple(ways)


def bitsandbytes_multiplies(device: torch.device, dtype: torch.dtype, layout: WeightLayout) -> bool:
    """Whether bitsandbytes has its own product for such a weight as it is; on a CPU it wants another layout."""
    return (
        device.type == "cuda"
        and layout.quant_type != 0
        and layout.in_features % layout.blocksize == 0
        and layout.nested_blocksize in (0, 256)
        and dtype in DECODABLE_BY_BITSANDBYTES
        and hasattr(torch.ops.bitsandbytes, "gemm_4bit")
    )


def evaluation_way(
    x: Tensor, layout: WeightLayout, backend: str, use_library: bool, *, may_repack: bool = False
) -> Way:
    """The way to take for activations x [..., K] and a weight.

    Args:
        backend, use_library: what can compute, "triton" or "torch", and the CUDA library.
        may_repack: whether a repacked copy of the weight can be kept, which only a layer can.
    """
    return way_of(x.device, x.dtype, rows_of(x), layout, backend, use_library, may_repack, _forced.get())


@measured.cached_by_tables
def way_of(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    layout: WeightLayout,
    backend: str,
    use_library: bool,
    may_repack: bool,
    forced: Way | None,
) -> Way:
    """`evaluation_way` of what it depends on: asked in every pass of every layer, so answered once."""
    ways = ways_of(device, dtype, rows, layout, backend, use_library, may_repack)
    if forced in ways:
        return ways[ways.index(forced)]
    by_rule = way_by_rule(device, dtype, rows, layout, backend, ways)
    # Tables hold what backend="auto" would run.
    if backend == ("triton" if device.type == "cuda" else "torch"):
        name = measured.fastest(
            device,
            DECISION,
            tuple(way.name for way in ways),
            dtype=dtype,
            weight=QUANT_NAMES.get(layout.quant_type, "float"),
            rows=rows,
            out_features=layout.out_features,
            in_features=layout.in_features,
            must_have=BITSANDBYTES.name if by_rule == BITSANDBYTES else None,
        )
        if name is not None:
            return next(way for way in ways if way.name == name)
    return by_rule


def way_by_rule(
    device: torch.device, dtype: torch.dtype, rows: int, layout: WeightLayout, backend: str, ways: tuple[Way, ...]
) -> Way:
    """What is taken where nothing like it was measured."""
    N, K = layout.out_features, layout.in_features
    if device.type == "cpu" and BITSANDBYTES in ways and rows <= LARGEST_REPACKED_M:
        return BITSANDBYTES
    by_library = Way("fold", by_library=True) in ways
    if by_library and rows <= LARGEST_M_BY_LIBRARY and N * K > SMALLEST_PRODUCT_BY_LIBRARY:
        return Way("small product", by_library=True)
    if by_library or (layout.quant_type != 0 and backend == "triton"):
        pays = rows * (N + K) + LAUNCHES >= GPU_RATIOS["library" if by_library else "triton"] * N * K
    else:
        ratio = CPU_RATIOS[dtype.itemsize] if device.type == "cpu" else GPU_RATIOS["torch"]
        pays = rows * (N + K) >= ratio * N * K
    if pays:
        return Way("fold", by_library)
    return BITSANDBYTES if BITSANDBYTES in ways and rows <= LARGEST_M_BY_BITSANDBYTES else Way("unfold")
