"""Launch configurations: a frozen table by kernel, element size and padded rank, and an opt-in search.

Where the table comes from: tiles that compile without spills for every chip of the gate (`docs/kernels.md`). Those of
16-bit activations at padded rank 16 are from a search on an H200 (`bench/results/search-nvidia-h200.json`), the fastest
but for `dy_pass`, whose fastest spill on sm_80; the others were not timed. `search` times candidates on the device at
hand; nothing calls it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of the tile a program works on, warps per program and depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# triton.cdiv and triton.next_power_of_2 also serve device code and cost several microseconds a call on the host.
def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`: size / block, rounded up."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def padded_rank(rank: int) -> int:
    """The rank as kernels see it: the next power of two, at least 16, which is what a contraction needs."""
    return max(16, next_power_of_2(max(rank, 1)))


def rank_block(dtype: torch.dtype, rank: int) -> int:
    """How many ranks an expanding kernel multiplies at once: more would not fit its registers."""
    return min(padded_rank(rank), 64 if dtype.itemsize == 2 else 16)


# (kernel, bytes per element of the activations, padded rank)
CONFIGS: dict[tuple[str, int, int], LaunchConfig] = {
    ("project", 2, 16): LaunchConfig(32, 128, 4, 4),
    ("project", 2, 32): LaunchConfig(64, 64, 4, 4),
    ("project", 2, 64): LaunchConfig(64, 64, 8, 3),
    ("project", 2, 128): LaunchConfig(64, 64, 8, 3),
    ("project", 2, 256): LaunchConfig(64, 32, 8, 3),
    ("project", 4, 16): LaunchConfig(64, 64, 8, 3),
    ("project", 4, 32): LaunchConfig(64, 64, 8, 3),
    ("project", 4, 64): LaunchConfig(64, 32, 8, 3),
    ("project", 4, 128): LaunchConfig(64, 32, 8, 3),
    ("project", 4, 256): LaunchConfig(32, 32, 8, 2),
    ("expand_add", 2, 16): LaunchConfig(64, 128, 4, 1),
    ("expand_add", 2, 32): LaunchConfig(64, 64, 4, 1),
    ("expand_add", 2, 64): LaunchConfig(64, 128, 4, 1),
    ("expand_add", 2, 128): LaunchConfig(64, 64, 4, 1),
    ("expand_add", 2, 256): LaunchConfig(64, 128, 8, 1),
    ("expand_add", 4, 16): LaunchConfig(64, 64, 4, 1),
    ("expand_add", 4, 32): LaunchConfig(64, 64, 4, 1),
    ("expand_add", 4, 64): LaunchConfig(64, 32, 4, 1),
    ("expand_add", 4, 128): LaunchConfig(64, 32, 4, 1),
    ("expand_add", 4, 256): LaunchConfig(64, 32, 4, 1),
    ("dy_pass", 2, 16): LaunchConfig(64, 256, 8, 2),
    ("dy_pass", 2, 32): LaunchConfig(64, 256, 8, 3),
    ("dy_pass", 2, 64): LaunchConfig(64, 128, 8, 3),
    ("dy_pass", 2, 128): LaunchConfig(32, 128, 8, 3),
    ("dy_pass", 2, 256): LaunchConfig(32, 64, 8, 2),
    ("dy_pass", 4, 16): LaunchConfig(32, 128, 8, 2),
    ("dy_pass", 4, 32): LaunchConfig(32, 64, 8, 2),
    ("dy_pass", 4, 64): LaunchConfig(32, 64, 8, 2),
    ("dy_pass", 4, 128): LaunchConfig(32, 64, 8, 2),
    ("dy_pass", 4, 256): LaunchConfig(16, 32, 8, 2),
    ("dx_pass", 2, 16): LaunchConfig(32, 128, 4, 2),
    ("dx_pass", 2, 32): LaunchConfig(32, 128, 4, 3),
    ("dx_pass", 2, 64): LaunchConfig(64, 32, 8, 3),
    ("dx_pass", 2, 128): LaunchConfig(32, 64, 8, 3),
    ("dx_pass", 2, 256): LaunchConfig(32, 64, 8, 2),
    ("dx_pass", 4, 16): LaunchConfig(32, 64, 4, 2),
    ("dx_pass", 4, 32): LaunchConfig(32, 64, 8, 2),
    ("dx_pass", 4, 64): LaunchConfig(32, 32, 4, 2),
    ("dx_pass", 4, 128): LaunchConfig(32, 32, 8, 2),
    ("dx_pass", 4, 256): LaunchConfig(16, 32, 8, 2),
}


def config_for(kernel: str, dtype: torch.dtype, rank: int) -> LaunchConfig:
    """The frozen configuration of a kernel for activations of `dtype` and an adapter of total rank `rank`."""
    return CONFIGS[kernel, dtype.itemsize, padded_rank(rank)]


def programs_wanted(device: torch.device) -> int:
    """How many programs keep every multiprocessor busy: two each."""
    return 1 if device.type != "cuda" else 2 * multiprocessors(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has; asked once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def search(launch: Callable[[LaunchConfig], object], candidates: Iterable[LaunchConfig]) -> LaunchConfig:
    """Time `launch` with every candidate on the current device and return the fastest (median milliseconds).

    Candidates that the device cannot hold are passed over; raises RuntimeError if none is left.
    """
    best: LaunchConfig | None = None
    best_time = float("inf")
    for candidate in candidates:
        try:
            median = triton.testing.do_bench(lambda candidate=candidate: launch(candidate), return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
        if median < best_time:
            best, best_time = candidate, median
    if best is None:
        raise RuntimeError("no candidate configuration fits this device")
    return best
