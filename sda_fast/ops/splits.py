"""Into how many parts the small 4-bit product cuts K, so that a layer with few outputs still fills the device.

The kernels have a rule of their own: as many parts as give every multiprocessor two programs. `sda-fast bench --tune`
times other numbers on the card at hand, for the Triton kernel and for the CUDA library's, and its table (`measured`)
decides where that very layer was measured; what is best for one N and K says little about another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from sda_fast.ops import measured
from sda_fast.ops.quantized import QUANT_NAMES, WeightLayout

DECISION_IN_TRITON, DECISION_BY_LIBRARY = "parts of K, Triton", "parts of K, library"
BY_RULE = 0
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_forced: ContextVar[int | None] = ContextVar("sda_fast_splits", default=None)


@contextmanager
def forced_splits(count: int) -> Iterator[None]:
    """Within this block every small product cuts K into so many parts, 0: as the kernels' rule says.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"the number of parts must be 0 (by the rule) or positive, got {count}")
    token = _forced.set(count)
    try:
        yield
    finally:
        _forced.reset(token)


def splits_of(x: torch.Tensor, layout: WeightLayout, by_library: bool) -> int:
    """The number of parts for x [M, K] and a 4-bit weight, 0 for the kernels' rule."""
    forced = _forced.get()
    return measured_splits(x.device, x.dtype, x.shape[0], layout, by_library) if forced is None else forced


@measured.cached_by_tables
def measured_splits(device: torch.device, dtype: torch.dtype, rows: int, layout: WeightLayout, by_library: bool) -> int:
    """The fastest number of parts in the table of `device`, 0 where this layer was not measured."""
    if device.type != "cuda":
        return BY_RULE
    name = measured.fastest(
        device,
        DECISION_BY_LIBRARY if by_library else DECISION_IN_TRITON,
        tuple(map(name_of, (BY_RULE, *COUNTS))),
        dtype=dtype,
        weight=QUANT_NAMES[layout.quant_type],
        rows=rows,
        out_features=layout.out_features,
        in_features=layout.in_features,
        same_layer=True,
    )
    return BY_RULE if name is None else count_of(name)


def name_of(count: int) -> str:
    """A number of parts as tables have it."""
    return "by rule" if count == BY_RULE else str(count)


def count_of(name: str) -> int:
    """The inverse of `name_of`."""
    return BY_RULE if name == "by rule" else int(name)


def candidates(in_features: int, columns: int) -> tuple[int, ...]:
    """What is worth timing for K inputs that a program reads `columns` at a time: numbers that make different parts."""
    blocks = -(-in_features // columns)
    made = {-(-blocks // -(-blocks // count)): count for count in reversed(COUNTS) if count <= blocks}
    return BY_RULE, *sorted(made.values())
