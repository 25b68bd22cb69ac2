"""Time, peak memory and error of one contrastive loss by one method on one batch.

    python bench/cmsa_run.py LOSS METHOD B D SECONDS

prints one line of JSON for the CPU, in float32. On a CPU every measurement has a process of its own, since the peak of
a process's memory holds what came before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops.cmsa_naive import naive_cmsa_loss, naive_infonce_loss
from sda_fast.timing import gpu_seconds, launch_seconds_of, processor_seconds

CHECKED_ITEMS, TEMPERATURE = 512, 3.0
MOST_ROUNDS, WARMED_ITEMS = 20, 4096
# Of the loss and of the vectors' gradients in the Euclidean norm, against float64.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Vectors = tuple[Tensor, Tensor, Tensor]


def resident_bytes(field: str) -> int:
    """A memory figure of this process from the kernel: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def settled_bytes() -> int:
    """Bytes held now, once freed memory has gone back to the kernel; the highest figure starts anew from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def vectors(B: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Vectors:
    """Image vectors that resemble their text vectors, as long as makes the targets neither flat nor certain."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(B, D, generator=generator)
    size = (5 * D / 4) ** 0.5
    sides = ((shared + torch.randn(B, D, generator=generator) / 2) / size for _ in range(2))
    x, y = ((1.4 * side).to(device, dtype).requires_grad_() for side in sides)
    return x, y, torch.tensor(TEMPERATURE, device=device, requires_grad=True)


def step(loss: Callable[..., Tensor], given: Vectors) -> Tensor:
    """Forward and backward, gradients allocated anew; the loss."""
    for tensor in given:
        tensor.grad = None
    value = loss(*given)
    value.backward()
    return value.detach()


def error_on_a_small_batch(name: str, loss: Callable[..., Tensor], B: int, D: int, dtype: torch.dtype, device: str):
    """The largest relative error of the loss and of the vectors' gradients against the formula in float64."""
    given = vectors(min(B, CHECKED_ITEMS), D, dtype, device)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in given)
    truth = step({"CMSA": naive_cmsa_loss, "InfoNCE": naive_infonce_loss}[name], exact)
    pairs = [(step(loss, given), truth), *((given[i].grad, exact[i].grad) for i in range(2))]
    return max(float((mine.double() - true).norm() / true.norm()) for mine, true in pairs)


def digest(value: Tensor, given: Vectors) -> list[float]:
    """A few numbers that every right answer shares: the loss, and the norms of the vectors' gradients."""
    return [float(value), *(float(tensor.grad.float().norm()) for tensor in given[:2])]


def product_rate(D: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of a plain matrix product x y^T of 2048 vectors (a GPU: 8192) in the same dtype."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, D, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    clock = gpu_seconds if device == "cuda" else processor_seconds
    times = [clock(lambda: torch.mm(a, b.T, out=out)) for _ in range(4)]
    return 2 * n * n * D / min(times[1:])


def peak_of_a_step(step: Callable[[], object]) -> int:
    """Bytes of the allocator at most beyond what is held before, in a step that is not timed: no cache is cleared."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    loss_name: str, make: Callable[[], Callable[..., Tensor]], B: int, D: int, dtype: torch.dtype, device: str,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Check, then measure; without times where the check fails.

    Returns:
        error; and seconds (one per round), peak_bytes beyond the vectors, digest, rate; or reason.
    """
    loss = make()
    rate = product_rate(D, dtype, device)
    error = error_on_a_small_batch(loss_name, loss, B, D, dtype, device)
    if not error <= ALLOWED_ERROR[dtype]:
        return {"error": error, "reason": f"not timed: its error is {error:.1e}, allowed are {ALLOWED_ERROR[dtype]:g}"}
    given, on_gpu = vectors(B, D, dtype, device), device == "cuda"
    if on_gpu or B <= WARMED_ITEMS:
        step(loss, given)
        for tensor in given:
            tensor.grad = None
    gc.collect()
    if on_gpu:
        peak_bytes = peak_of_a_step(lambda: step(loss, given))
    else:
        before = settled_bytes()
    values: list[Tensor] = []
    clock = (
        partial(gpu_seconds, launch_seconds=launch_seconds_of(lambda: step(loss, given)))
        if on_gpu
        else processor_seconds
    )
    times, started = [], time.perf_counter()
    while not times or (len(times) < MOST_ROUNDS and time.perf_counter() - started < seconds):
        times.append(clock(lambda: values.append(step(loss, given))))
        if len(times) == 1 and not on_gpu:
            peak_bytes = resident_bytes("VmHWM") - before
    found = {"error": error, "seconds": times, "peak_bytes": peak_bytes, "rate": rate}
    return found | {"digest": digest(values[-1], given)}


def main(loss_name: str, method: str, B: int, D: int, seconds: float) -> None:
    from cmsa_cases import METHODS

    torch.set_num_threads(1)
    print(json.dumps(measure(loss_name, METHODS[loss_name][method].make, B, D, torch.float32, "cpu", seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
