"""Alignment over positions: the CMSA loss of every non-padding position, in memory that does not grow as its square."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sda_fast.ops.cmsa_naive import naive_cmsa_loss
from sda_fast.recommend import RecommendConfig
from sda_fast.recommend.training import _alignment

PROGRAM = """
import sys
import numpy as np
import torch
from sda_fast.recommend import RecommendConfig
from sda_fast.recommend.training import _alignment

def resident(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) * 1024

def step(positions):
    config = RecommendConfig(**CONFIG)
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 301, (positions // 50, 50))
    vectors = (0.1 * torch.randn(300, 8)).requires_grad_()
    items = np.arange(300)
    _alignment(config, vectors, torch.as_tensor(items), inputs, 300, items, torch.randn(300, 8)).backward()

step(200)
before = resident("VmRSS")
step(int(sys.argv[1]))
print(resident("VmHWM") - before)
"""


def settings(**changes) -> dict:
    return {"interactions": "log.tsv", "output": "out", "alignment_over": "positions", **changes}


def test_every_position_that_is_not_padding_counts_once():
    inputs = np.array([[5, 5, 2, 0], [1, 2, 2, 4]])  # 5 is the padding of 5 items
    items = torch.tensor([0, 1, 2, 4])
    place = np.array([0, 1, 2, 0, 3])
    vectors, align_to = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    value = _alignment(RecommendConfig(**settings()), vectors, items, inputs, 5, place, align_to)
    seen = [2, 0, 1, 2, 2, 4]
    expected = naive_cmsa_loss(vectors[place[seen]], align_to[seen], 2.0)
    torch.testing.assert_close(value, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twelve_thousand_positions_need_no_square_of_them():
    # the plain formula takes 9.7 GB at 16384 positions (docs/cmsa.md), so 5 GB here
    program = PROGRAM.replace("CONFIG", repr(settings()))
    done = subprocess.run([sys.executable, "-c", program, "12000"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 2**20, done.stdout
