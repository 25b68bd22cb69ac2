"""How y gets its low-rank update on a GPU, chosen per shape from a table of measurements.

Two ways are written. "in place": a library GEMM, then one pass over y (`expand_add`). "accumulator": one Triton GEMM
whose accumulator starts from the low-rank product (`gated_linear`). `bench/regime_speed.py` times both on the card at
hand and prints lines for TABLE.

Measured on: no device yet (not measured), so TABLE is empty and every shape takes the pass in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

UpdateOfY = Literal["in place", "accumulator"]
DEFAULT: UpdateOfY = "in place"


@dataclass(frozen=True)
class Measurement:
    """Microseconds of both ways on one device for one shape; the weight is dense, decoding it is in neither."""

    device: str
    dtype: torch.dtype
    rows: int
    in_features: int
    out_features: int
    r: int
    in_place: float
    accumulator: float

    @property
    def faster(self) -> UpdateOfY:
        return "accumulator" if self.accumulator < self.in_place else "in place"


TABLE: tuple[Measurement, ...] = ()

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
    if not TABLE or not x.is_cuda:
        return DEFAULT
    return faster_way(TABLE, device_name(x.device), x.dtype, x.shape[0], x.shape[1], out_features, r)


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def faster_way(
    table: Sequence[Measurement],
    device: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    r: int,
) -> UpdateOfY:
    """What the measurement nearest in rows, then in rank, says, for the same device, dtype and K and N.

    Args:
        table: measurements of any devices and shapes.
        rows, in_features, out_features, r: M, K, N and R.
    Returns:
        DEFAULT where the layer was not measured on the device.
    """
    key = (device, dtype, in_features, out_features)
    measured = [line for line in table if (line.device, line.dtype, line.in_features, line.out_features) == key]
    if not measured or rows == 0:
        return DEFAULT
    nearest = min(measured, key=lambda line: (abs(math.log2(line.rows / rows)), abs(line.r - r)))
    return nearest.faster
