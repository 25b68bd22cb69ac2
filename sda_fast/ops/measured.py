"""Which way was fastest where: tables of measured times, by device and shape, and the nearest measurement in them.

A table is a JSON file of one device, written by `sda-fast bench --tune` into the user's cache folder (SDA_FAST_TUNED
names another; empty means none) or, for devices that the authors measured, part of the package in `ops/tables`, copied
from bench/results. The user's comes first, the packaged one answers where the user's has nothing alike. A table is read
at the first question about its device and never at import, and it answers for the device it names and no other.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

FORMAT = 1
PACKAGED_TABLES = Path(__file__).with_name("tables")
# A layer whose outputs or inputs are more than this many times those of every measured one is not in the table.
FARTHEST = 2.0
# So is a number of rows this many times another: few rows and many go different ways.
FARTHEST_ROWS = 4.0
# More rows than tuning measures count as so many: the times of all ways grow with them alike.
MOST_ROWS = 8192
# Where nothing else was measured, what moves the same bytes stands in.
STAND_INS = {"float16": "bfloat16", "fp4": "nf4"}
Result = TypeVar("Result")
depending: list[Any] = []


@dataclass(frozen=True)
class Measurement:
    """Microseconds of the ways that ran and passed their check, for one decision on one shape.

    `weight` is "float", "nf4" or "fp4", or "any" where the decision does not depend on it.
    """

    decision: str
    dtype: str
    weight: str
    rows: int
    out_features: int
    in_features: int
    r: int
    microseconds: Mapping[str, float]

    def is_of(self, decision: str, dtype: str, weight: str) -> bool:
        return (self.decision, self.dtype) == (decision, dtype) and self.weight in (weight, "any")

    def distance(self, rows: int, out_features: int, in_features: int, r: int) -> tuple[float, float, float]:
        """How far a shape is: first the layer, then the rows, then the rank, in factors of two."""
        layer = abs(math.log2(self.out_features / out_features)) + abs(math.log2(self.in_features / in_features))
        return layer, abs(math.log2(self.rows / rows)), abs(math.log2(self.r / r))

    def is_like(self, rows: int, out_features: int, in_features: int) -> bool:
        ratios = self.out_features / out_features, self.in_features / in_features
        layer = all(1 / FARTHEST <= ratio <= FARTHEST for ratio in ratios)
        return layer and 1 / FARTHEST_ROWS <= self.rows / rows <= FARTHEST_ROWS


@dataclass(frozen=True)
class Table:
    """The measurements of one device; `path` is where they were read."""

    device: str
    path: Path
    measurements: tuple[Measurement, ...]

    def nearest(
        self, decision: str, dtype: str, weight: str, rows: int, out_features: int, in_features: int, r: int
    ) -> Measurement | None:
        """The measurement nearest to a shape; None if no layer like it was measured with about as many rows."""
        if min(rows, out_features, in_features, r) < 1:
            return None
        shape = min(rows, MOST_ROWS), out_features, in_features, r
        for kind in kinds_of(dtype, weight):
            of_kind = [line for line in self.measurements if line.is_of(decision, *kind)]
            alike = [line for line in of_kind if line.is_like(*shape[:3])]
            if alike:
                return min(alike, key=lambda line: line.distance(*shape))
        return None


def kinds_of(dtype: str, weight: str) -> list[tuple[str, str]]:
    """A dtype and a kind of weight, then those that may stand in for them, nearest first."""
    dtypes, weights = ([name, *filter(None, [STAND_INS.get(name)])] for name in (dtype, weight))
    return [(one, other) for other in weights for one in dtypes]


@functools.lru_cache(maxsize=4096)
def fastest(
    device: torch.device,
    decision: str,
    possible: tuple[str, ...],
    *,
    dtype: torch.dtype,
    weight: str,
    rows: int,
    out_features: int,
    in_features: int,
    r: int = 8,
    must_have: str | None = None,
    same_layer: bool = False,
) -> str | None:
    """The fastest of the `possible` ways in the nearest measurement on `device`, by the first table that has one.

    Args:
        decision: what is to be chosen, such as "evaluation" or "update of y".
        possible: names of ways that this process can go.
        rows, out_features, in_features, r: M, N, K and R.
        must_have: a way without whose time the measurement says nothing, such as one that older tables do not know.
        same_layer: only measurements of these very N and K count.
    Returns:
        None where nothing like it was measured, or fewer than two of the possible ways were.
    """
    shape = decision, str(dtype).removeprefix("torch."), weight, rows, out_features, in_features, r
    for table in tables_of(chip_name(device)):
        line = table.nearest(*shape)
        if line is None or (same_layer and (line.out_features, line.in_features) != (out_features, in_features)):
            continue
        times = {way: time for way, time in line.microseconds.items() if way in possible}
        if len(times) > 1 and (must_have is None or must_have in times):
            return min(times, key=times.__getitem__)
    return None


@functools.cache
def tables_of(device: str) -> tuple[Table, ...]:
    """The user's table of a device and the packaged one, where they are; a file that cannot be read is passed over."""
    paths = [table_path(folder, device) for folder in (user_folder(), PACKAGED_TABLES) if folder is not None]
    found = [read_table_of(device, path) for path in paths]
    return tuple(table for table in found if table is not None)


def read_table_of(device: str, path: Path) -> Table | None:
    """The table in a file; None, and a warning, where that cannot be read or is another device's."""
    if not path.is_file():
        return None
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        logger.warning("the table of measured times %s is not used: %s", path, error)
        return None
    if table.device != device:
        logger.warning("the table of measured times %s is of %s, not of %s", path, table.device, device)
        return None
    return table


def forget() -> None:
    """Read tables anew at the next question."""
    for cleared in (tables_of, fastest, *depending):
        cleared.cache_clear()


def cached_by_tables(function: Callable[..., Result]) -> Callable[..., Result]:
    """`functools.lru_cache` for what depends on the tables."""
    cached = functools.lru_cache(maxsize=4096)(function)
    depending.append(cached)
    return cached


def read_table(path: Path) -> Table:
    """The measurements of a file.

    Raises:
        ValueError: it is no such file, or of another format.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected a table of format {FORMAT}")
    try:
        lines = tuple(measurement_of(record) for record in document["records"] if record["microseconds"])
        return Table(str(document["device"]), path, lines)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its records are incomplete: {error!r}") from error


def measurement_of(record: Mapping[str, Any]) -> Measurement:
    rows, out_features, in_features, r = sizes = [record[name] for name in ("M", "N", "K", "r")]
    times = {str(way): float(time) for way, time in record["microseconds"].items()}
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"M, N, K and r must be positive integers, got {sizes}")
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"times must be positive, got {times}")
    kind = record["decision"], record["dtype"], record["weight"]
    return Measurement(*kind, rows, out_features, in_features, r, times)


def user_folder() -> Path | None:
    """Where the user's tables are: SDA_FAST_TUNED, None if that is empty, else the platform's cache folder."""
    chosen = os.environ.get("SDA_FAST_TUNED")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sda-fast" / "tuned"


def table_path(folder: Path, device: str) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def chip_name(device: torch.device) -> str:
    """The name that tables know a device by; of a processor also family and model, since one name may cover many."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    numbers = [re.findall(rf"^{field}\s*:\s*(\d+)$", text, re.MULTILINE) for field in ("cpu family", "model")]
    if names and all(numbers):
        return f"{names[0]} (family {numbers[0][0]}, model {numbers[1][0]})"
    return platform.processor() or platform.machine() or "unknown processor"


def document_of(device: str, records: Sequence[Mapping[str, Any]], **described: object) -> dict[str, Any]:
    """A table as its file has it: `described` says versions, date, command and timer."""
    return {"format": FORMAT, "device": device, **described, "records": list(records)}
