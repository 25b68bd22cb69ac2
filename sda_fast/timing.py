"""Times of steps that take turns, so that what slows a machine down for a while slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch

CLEARED_BYTES = 1 << 28
# No GPU writes `CLEARED_BYTES` sooner; a launch takes at most so many times as long as the one that was looked at; a
# step that takes longer to launch than so many clearings is bound by the host or long enough not to notice it.
SECONDS_TO_CLEAR, HEAD_START, MOST_CLEARINGS = 30e-6, 2, 200
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
    the cache cleared before each and the host so far ahead that the device never waits for it.

    Args:
        rounds: at most so many.
        seconds: no new round after so many seconds, but at least five rounds.
    """
    clocks: dict[str, Callable[[Step], float]] = {}
    for name, step in steps.items():
        for _ in range(warm_ups):
            step()
        on_gpu = device.type == "cuda"
        clocks[name] = partial(gpu_seconds, launch_seconds=launch_seconds_of(step)) if on_gpu else processor_seconds
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, started = list(steps), time.perf_counter()
    for number in range(rounds):
        if number >= 5 and time.perf_counter() - started > seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clocks[name](steps[name]))
    return times


def processor_seconds(step: Step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def gpu_seconds(step: Step, launch_seconds: float | None = None) -> float:
    """Device time of a step: between two events, after the cache is cleared so often that the host gets ahead.

    Args:
        launch_seconds: how long the host takes to launch the step (`launch_seconds_of`); measured first if absent.
    """
    if launch_seconds is None:
        launch_seconds = launch_seconds_of(step)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    waste = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(min(1 + int(HEAD_START * launch_seconds / SECONDS_TO_CLEAR), MOST_CLEARINGS)):
        waste.zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def launch_seconds_of(step: Step) -> float:
    """How long the host is busy with a step, the device idle before it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    return launched


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
