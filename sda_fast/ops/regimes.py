"""How y and dx get their low-rank update on a GPU, chosen per shape from a table of measurements.

Three ways are written. "before": the update is written first (`expand`, `dx_pass`), and a library GEMM adds its product
to it. "in place": a library GEMM, then one pass over its result (`expand_add`, `dx_pass`). "accumulator": one GEMM of
ours with the update in its accumulator (`gated_linear`, `input_gradient`; dA still takes its pass over x). `sda-fast
bench --tune` times them on the card at hand; without a measurement there (`measured`) every shape takes the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

from torch import Tensor

from sda_fast.ops import measured

Update = Literal["before", "in place", "accumulator"]
DEFAULT: Update = "before"
DECISION, DECISION_ON_DX = "update of y", "update of dx"

_forced: ContextVar[Update | None] = ContextVar("sda_fast_update", default=None)


@contextmanager
def forced_update(way: Update) -> Iterator[None]:
    """Within this block every update goes one way, whatever the table says; for tests and measurements.

    Raises:
        ValueError: `way` is none of the ways.
    """
    if way not in get_args(Update):
        raise ValueError(f"the update must be one of {get_args(Update)}, got {way!r}")
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


def update_of_y(x: Tensor, out_features: int, r: int) -> Update:
    """The way to take for activations x [M, K] and a layer of `out_features` outputs and total rank r."""
    return update_of(DECISION, x, out_features, r)


def update_of_dx(dy: Tensor, in_features: int, r: int) -> Update:
    """The same for the gradient of x [M, in_features] of a layer whose output's is dy [M, N]."""
    return update_of(DECISION_ON_DX, dy, in_features, r)


def update_of(decision: str, read: Tensor, width: int, r: int) -> Update:
    """The forced way, or the fastest by a table for a product that reads `read` [M, inner] and gives [M, width]."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if not read.is_cuda:
        return DEFAULT
    fastest = measured.fastest(
        read.device,
        decision,
        get_args(Update),
        dtype=read.dtype,
        weight="any",
        rows=read.shape[0],
        out_features=width,
        in_features=read.shape[1],
        r=r,
    )
    return cast(Update, fastest or DEFAULT)
