"""The loss's memory grows as the batch, not as its square, and keeps to the workspace beside what it says it keeps."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEBIBYTE = 2**20
PROGRAM = """
import sys, torch
from sda_fast import cmsa_loss
items, dimensions, workspace_bytes, normalize = map(int, sys.argv[2:])
def memory(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) * 1024
def vectors(B):
    return [torch.randn(B, dimensions, dtype=getattr(torch, sys.argv[1])).requires_grad_() for _ in range(2)]
def step(x, y):
    cmsa_loss(x, y, 1.0, workspace_bytes=workspace_bytes or None, normalize=bool(normalize)).backward()
step(*vectors(64))
sides = vectors(items)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
step(*sides)
print(memory("VmHWM") - before)
"""


def peak(dtype: str, *numbers: int) -> int:
    """Bytes of one step beside the vectors, their gradients included."""
    command = [sys.executable, "-c", PROGRAM, dtype, *map(str, numbers)]
    # With a threshold that does not move, glibc gives large blocks back when they are freed, and counts them once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


def test_peak_memory_grows_as_the_batch_not_as_its_square():
    small, large = (peak("float32", items, 16, 4 * MEBIBYTE, 0) for items in (1024, 4096))
    # one 4096 x 4096 matrix would be 64 MiB; per item there are two vectors, their gradients and about 40 numbers
    assert large - small < 4096 * (4 * 16 * 4 + 40 * 8) + 8 * MEBIBYTE, (small, large)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_step_on_a_cpu_keeps_to_its_default_workspace_in_every_dtype(dtype, size, normalize):
    items, dimensions = 2048, 4096
    gradients = 2 * items * dimensions * size
    # beside the workspace a tile's vectors in float32, or the sums of its rows
    allowed = 32 * MEBIBYTE + 8 * 256 * dimensions * 4
    if normalize:
        # copies of both sides and their gradients, and on the way to one side's rows three of them in float32
        allowed += 2 * gradients + 3 * items * dimensions * 4
    assert peak(dtype, items, dimensions, 0, int(normalize)) - gradients < allowed
