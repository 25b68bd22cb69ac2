"""Times, peak memory and bytes kept for backward of steps that take turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from cmsa_run import resident_bytes, settled_bytes
from sda_fast.ops.quantized import workspaces

PERCENTILES = (20, 50, 80)
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
    steps: dict[str, Step], device: torch.device, *, rounds: int, seconds: float, warm_ups: int = 1
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


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Memory that a step takes beyond what is held before it, its reused workspace included; None if not to be had."""
    gc.collect()
    workspaces.clear()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        before = settled_bytes()
    except OSError:
        return None
    step()
    return resident_bytes("VmHWM") - before


def bytes_kept(layer: nn.Module, x: Tensor) -> int:
    """What forward keeps for backward through autograd, each storage once; weights and their statistics excepted."""
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in frozen_tensors(layer)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """Parameters, buffers and 4-bit statistics: what is there whether or not a step runs."""
    tensors = [*layer.parameters(), *layer.buffers()]
    for parameter in layer.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [value for value in vars(part).values() if torch.is_tensor(value)] if part is not None else []
    return tensors
