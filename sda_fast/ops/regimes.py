"""How y gets its low-rank update on a GPU, chosen per shape from a table of measurements.

Two ways are written. "in place": a library GEMM, then one pass over y (`expand_add`). "accumulator": one Triton GEMM
whose accumulator starts from the low-rank product (`gated_linear`). `sda-fast bench --tune` times both on the card at
hand; without a measurement there (`measured`) every shape takes the pass in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

from torch import Tensor

from sda_fast.ops import measured

UpdateOfY = Literal["in place", "accumulator"]
DEFAULT: UpdateOfY = "in place"
DECISION = "update of y"

_forced: ContextVar[UpdateOfY | None] = ContextVar("sda_fast_update_of_y", default=None)


@contextmanager
def forced_update(way: UpdateOfY) -> Iterator[None]:
    """Within this block every update of y goes one way, whatever the table says; for tests and measurements.

    Raises:
        ValueError: `way` is neither way.
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
    if not x.is_cuda:
        return DEFAULT
    way = measured.fastest(
        x.device,
        DECISION,
        get_args(UpdateOfY),
        dtype=x.dtype,
        weight="any",
        rows=x.shape[0],
        out_features=out_features,
        in_features=x.shape[1],
        r=r,
    )
    return cast(UpdateOfY, way or DEFAULT)
