"""The loss's memory grows as the batch, not as its square."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from sda_fast import cmsa_loss
def rss(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) * 1024
def step(B):
    x, y = torch.randn(B, 16, requires_grad=True), torch.randn(B, 16, requires_grad=True)
    cmsa_loss(x, y, 1.0, workspace_bytes=2**22).backward()
step(64)
before = rss("VmRSS")
step(int(sys.argv[1]))
print(rss("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_as_the_batch_not_as_its_square():
    def peak(items):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(items)], capture_output=True, text=True, check=True, timeout=300
        )
        return int(done.stdout)

    small, large = peak(1024), peak(4096)
    # one 4096 x 4096 matrix would be 64 MiB; per item there are two vectors, their gradients and about 40 numbers
    assert large - small < 4096 * (4 * 16 * 4 + 40 * 8) + 2**23, (small, large)
