"""How a layer computes in evaluation with one modality: update folded into the weight, beside it, or a small product.

"fold": decode (or copy) the weight with the update added, then a library GEMM. "unfold": as in training. "small
product": the 4-bit weight is decoded on its way to the multiplication, the update added in the epilogue; nothing of the
weight's size is written.

Folding costs about as much as N * K elements' worth of work, the update beside the weight as much as rows * (N + K), so
folding pays from `rows >= RATIO * N * K / (N + K)` on. Where a kernel decodes a 4-bit weight anyway, folding is free of
extra bytes and always chosen.

Measured on: CPU, float32 and bfloat16 at rank 8 (`bench/fold_speed.py`, whose results file bench/results/fold-cpu.json
names the device); float16 is taken to be as bfloat16, float64 as float32. GPU: not measured; the ratio counts bytes (20
per weight element and fold, 4 N + 2 K per row otherwise, N = K).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from sda_fast.ops.quantized import WeightLayout

EvaluationWay = Literal["fold", "unfold", "small product"]
LARGEST_SMALL_M = 64
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# By device type and bytes per element of x.
RATIOS = {("cpu", 2): 4.0, ("cpu", 4): 2.0, ("cpu", 8): 2.0, ("cuda", 2): 7.0, ("cuda", 4): 7.0, ("cuda", 8): 7.0}

_forced: ContextVar[EvaluationWay | None] = ContextVar("sda_fast_evaluation_way", default=None)


@contextmanager
def forced_evaluation(way: EvaluationWay) -> Iterator[None]:
    """Within this block evaluation goes one way wherever it can; for tests and measurements.

    Raises:
        ValueError: `way` is none of the ways.
    """
    if way not in get_args(EvaluationWay):
        raise ValueError(f"the way of evaluation must be one of {get_args(EvaluationWay)}, got {way!r}")
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


def evaluation_way(x: Tensor, layout: WeightLayout, backend: str, use_library: bool) -> EvaluationWay:
    """The way to take for activations x [M, K], a weight, and what can compute: "triton" or "torch", the library."""
    has_kernels = layout.quant_type != 0 and (backend == "triton" or (use_library and x.dtype in SIXTEEN_BITS))
    is_small = has_kernels and x.shape[0] <= LARGEST_SMALL_M
    forced = _forced.get()
    if forced is not None and (forced != "small product" or is_small):
        return forced
    if has_kernels:
        return "small product" if is_small else "fold"
    N, K = layout.out_features, layout.in_features
    pays = x.shape[0] * (N + K) >= RATIOS[x.device.type, x.element_size()] * N * K
    return "fold" if pays else "unfold"
