"""Times of steps that take turns, so that what slows a machine down for a while slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch

CLEARED_BYTES = 1 << 28
Step = Callable[[], object]


def percentile(values: list[float], percent: float) -> float:
    """Between the two nearest values, linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(times: list[float], of: list[float]) -> float:
    """The median of the ratios round by round, which what slows a whole round down does not change."""
    return median(a / b for a, b in zip(times, of, strict=True))


def time_in_turns(
    steps: Mapping[str, Step], device: torch.device, *, rounds: int, seconds: float, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every step, round by round: each round runs every step once, in an order that rotates.

    On a CPU this is processor time, which other processes disturb least; on a GPU the time between two events, with
    the cache cleared before each.

    Args:
        rounds: at most so many.
        seconds: no new round after so many seconds, but at least five rounds.
    """
    clock = gpu_seconds if device.type == "cuda" else processor_seconds
    for step in steps.values():
        for _ in range(warm_ups):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, started = list(steps), time.perf_counter()
    for number in range(rounds):
        if number >= 5 and time.perf_counter() - started > seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(steps[name]))
    return times


def processor_seconds(step: Step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def gpu_seconds(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda").zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


@contextmanager
def one_thread_on_a_cpu(device: torch.device) -> Iterator[None]:
    """Processor time is only comparable on one thread."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
