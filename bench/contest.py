"""Contestants of one case: each result is checked first, what passes is timed in turns, the rest has a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from measure import PERCENTILES
from sda_fast.timing import percentile, ratio, time_in_turns

FIRST_ROUNDS = 30
Record = dict[str, Any]


@dataclass
class Contestant:
    """A step, what it should give in wider sums, and the relative error it may have in the Euclidean norm."""

    step: Callable[[], Tensor]
    truth: Tensor
    allowed: float


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """In the Euclidean norm; NaN counts as infinite."""
    error = float((actual.to(truth.dtype) - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def contest(
    case: Mapping[str, Any],
    entries: Mapping[str, Contestant | str],
    device: torch.device,
    *,
    seconds: float,
    longest: float = 20.0,
    against: Sequence[str] = (),
) -> list[Record]:
    """The records of one case.

    Args:
        case: what describes it, copied into every record.
        entries: contestants by name, or why there is none.
        seconds: roughly how long all of them together are timed.
        longest: a contestant whose first run takes more seconds is not timed.
        against: names whose times every record is compared with, in its `to`.
    """
    records, contestants, errors = [], {}, {}
    for name, entry in entries.items():
        reason, error = (entry, 0.0) if isinstance(entry, str) else judge(entry, device, longest)
        if reason:
            records.append({**case, "method": name, "reason": reason})
        elif not isinstance(entry, str):
            contestants[name], errors[name] = entry, error
    steps = {name: contestant.step for name, contestant in contestants.items()}
    times = time_in_turns(steps, device, rounds=FIRST_ROUNDS, seconds=seconds) if steps else {}
    for name, values in times.items():
        record = {**case, "method": name, "error": errors[name], "rounds": len(values)}
        record["milliseconds"] = [round(1e3 * percentile(values, p), 5) for p in PERCENTILES]
        record["to"] = {other: round(ratio(values, times[other]), 3) for other in against if other in times}
        records.append(record)
    return records


def judge(contestant: Contestant, device: torch.device, longest: float) -> tuple[str, float]:
    """Why a contestant is not timed ("" if it is), and its error."""
    try:
        result = contestant.step()
        started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        contestant.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
    except Exception as problem:
        said = str(problem).splitlines()
        return f"failed: {type(problem).__name__}: {said[0][:120] if said else ''}", 0.0
    error = relative_error(result, contestant.truth)
    if error > contestant.allowed:
        return f"not timed: its error is {error:.1e}, allowed are {contestant.allowed:.1e}", error
    if took > longest:
        return f"not measured: one run takes {took:.0f} s, the limit is {longest:.0f} s", error
    return "", error
