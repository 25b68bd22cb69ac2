"""How y and dx get their low-rank update on a GPU, chosen per shape from a table of measurements.

Three ways are written. "before": the update is written first (`expand`, `dx_pass`), and a library GEMM adds its product
to it. "in place": a library GEMM, then one pass over its result (`expand_add`, `dx_pass`). "accumulator", for y alone:
one Triton GEMM whose accumulator starts from the low-rank product (`gated_linear`). `sda-fast bench --tune` times them
on the card at hand; without a measurement there (`measured`) every shape takes the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

from torch import Tensor

from sda_fast.ops import measured

UpdateOfY = Literal["before", "in place", "accumulator"]
UpdateOfDx = Literal["before", "in place"]
DEFAULT: UpdateOfDx = "before"
DECISION, DECISION_ON_DX = "update of y", "update of dx"

_forced: ContextVar[UpdateOfY | None] = ContextVar("sda_fast_update", default=None)


@contextmanager
def forced_update(way: UpdateOfY) -> Iterator[None]:
    """Within this block every update goes one way, whatever the table says; for tests and measurements.

    The accumulator, which dx has not, leaves dx to the pass in place.

    Raises:
        ValueError: `way` is none of the ways.
    """
    if way not in get_args(UpdateOfY):
        raise ValueError(f"the update of y must be one of {get_args(UpdateOfY)}, got {way!r}")
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


def update_of_y(x: Tensor, out_features: int, r: int) -> UpdateOfY:
    """The way to take for activations x [M, K] and a layer of `out_features` outputs and total rank r."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return cast(UpdateOfY, fastest(DECISION, get_args(UpdateOfY), x, out_features, r) or DEFAULT)


def update_of_dx(dy: Tensor, in_features: int, r: int) -> UpdateOfDx:
    """The same for the gradient of x [M, in_features] of a layer whose output's is dy [M, N]."""
    forced = _forced.get()
    if forced is not None:
        return "before" if forced == "before" else "in place"
    return cast(UpdateOfDx, fastest(DECISION_ON_DX, get_args(UpdateOfDx), dy, in_features, r) or DEFAULT)


def fastest(decision: str, ways: tuple[str, ...], read: Tensor, width: int, r: int) -> str | None:
    """The fastest way by a table, for a product that reads `read` [M, inner] and gives [M, width]."""
    if not read.is_cuda:
        return None
    return measured.fastest(
        read.device,
        decision,
        ways,
        dtype=read.dtype,
        weight="any",
        rows=read.shape[0],
        out_features=width,
        in_features=read.shape[1],
        r=r,
    )
