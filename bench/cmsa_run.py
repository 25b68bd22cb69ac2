"""Time and peak memory of one contrastive loss in a process of its own; `test_bench_cmsa` starts these.

    python bench/cmsa_run.py METHOD B D REPEATS

prints one line of JSON: loss, seconds of forward + backward per repeat (elapsed, and of processor time), and the peak
of the process's memory beyond what it held with the vectors made and a small problem solved.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch

from sda_fast import cmsa_loss, infonce_loss


def baselines():
    spec = importlib.util.spec_from_file_location("cmsa_baselines", Path(__file__).parent / "baselines" / "cmsa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def methods():
    plain = baselines()
    return {
        "sda_fast cmsa": lambda: cmsa_loss,
        "plain cmsa": lambda: plain.plain_cmsa,
        "compiled cmsa": plain.compiled_cmsa,
        "checkpointed cmsa": lambda: plain.checkpointed_cmsa,
        "sda_fast infonce": lambda: infonce_loss,
        "plain infonce": lambda: plain.plain_infonce,
    }


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


def vectors(B: int, D: int):
    """Image vectors that resemble their text vectors, short enough that no exponential underflows."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(B, D, generator=generator)
    x, y = ((shared + 2 * torch.randn(B, D, generator=generator)) / 8 for _ in range(2))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(3.0, requires_grad=True)


def step(loss, x, y, temperature) -> float:
    value = loss(x, y, temperature)
    value.backward()
    return value.item()


def main(method: str, B: int, D: int, repeats: int) -> None:
    loss = methods()[method]()
    step(loss, *vectors(64, D))
    x, y, temperature = vectors(B, D)
    before = settled_bytes()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        x.grad = y.grad = temperature.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        value = step(loss, x, y, temperature)
        seconds.append(round(time.perf_counter() - start, 3))
        cpu_seconds.append(round(time.process_time() - cpu_start, 3))
    extra = resident_bytes("VmHWM") - before
    result = {"method": method, "B": B, "D": D, "loss": value, "seconds": seconds, "cpu_seconds": cpu_seconds}
    print(json.dumps(result | {"extra_bytes": extra, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
