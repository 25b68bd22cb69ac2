"""Alignment over positions: the CMSA loss of every non-padding position, in memory that does not grow as its square."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sda_fast.data.interactions import Interactions
from sda_fast.data.split import leave_one_out
from sda_fast.ops.cmsa_naive import naive_cmsa_loss
from sda_fast.recommend import RecommendConfig
from sda_fast.recommend.training import _alignment, train_sequence_model

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


@pytest.mark.parametrize(
    ("over", "inputs"),
    [("positions", [[5, 5, 5, 2]]), ("positions", [[5, 6, 6, 6]]), ("items", [[2, 2, 2, 2]])],
    ids=["one short window", "every item masked", "one item again and again"],
)
def test_a_batch_without_two_rows_to_contrast_has_no_alignment_term(over, inputs):
    items, place = torch.tensor([0, 1, 2, 4]), np.array([0, 1, 2, 0, 3])
    config = RecommendConfig(**settings(alignment_over=over))
    vectors = torch.randn(4, 3, requires_grad=True)
    value = _alignment(config, vectors, items, np.array(inputs), 5, place, torch.randn(5, 3))
    assert value.item() == 0 and not value.requires_grad


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_training_with_alignment_survives_windows_of_one_item(name):
    # four interactions leave two to train on: one input of sasrec, and in bert4rec sometimes both are masked
    interactions = [(user, item) for user in range(4) for item in range(user, user + 4)]
    users, items = np.array(interactions, dtype=np.int32).T
    names = [str(user) for user in range(4)], [str(item) for item in range(9)]
    split = leave_one_out(Interactions(*names, users, items, np.arange(len(users), dtype=np.float64)))
    config = RecommendConfig(
        **settings(alignment_weight=1.0, batch_positions=1, epochs=2, embedding_dim=8, max_length=4, progress=False)
    )
    network, log = train_sequence_model(name, split, config, 0, table=torch.randn(9, 5), align_to=torch.randn(9, 8))
    assert np.isfinite(log.losses).all() and not network.training


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twelve_thousand_positions_need_no_square_of_them():
    # the plain formula takes 9.7 GB at 16384 positions (docs/cmsa.md), so 5 GB here
    program = PROGRAM.replace("CONFIG", repr(settings()))
    done = subprocess.run([sys.executable, "-c", program, "12000"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 2**20, done.stdout
