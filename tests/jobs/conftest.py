"""One very small model and catalogue for all tests of the long jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

RUN_FROM_JSON = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sda_fast.train import FinetuneConfig, finetune
finetune(FinetuneConfig(**json.loads(sys.argv[1])))
"""


PAUSE_AFTER_STEPS = """
import time
from sda_fast.jobs.run_log import RunLog
write = RunLog.write
def write_and_pause(self, step, **values):
    write(self, step, **values)
    time.sleep(0.1)
RunLog.write = write_and_pause
"""
"""So that the run is still at work when its log is seen to have grown, however busy the machine is."""


@dataclass(frozen=True)
class SmallWorld:
    """A model folder and a catalogue of 24 items whose last three lack a readable picture."""

    model: Path
    items: Path


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    from sda_fast.data.items import Catalogue, read_items, write_items
    from sda_fast.data.synthetic import generate_catalogue
    from sda_fast.lvlm.tiny import build_tiny_lvlm

    folder = tmp_path_factory.mktemp("small-world")
    paths = generate_catalogue(folder / "catalogue", num_items=60, num_users=1, seed=0, image_side=56)
    catalogue = Catalogue(read_items(paths.items).items[:24])
    catalogue[23].image.write_bytes(b"no picture")
    for item in catalogue.items[21:23]:
        item.image.unlink()
    items = folder / "catalogue" / "few.jsonl"
    write_items(catalogue, items)
    model = build_tiny_lvlm(
        catalogue, folder / "model", pretrain_steps=0, hidden_size=64, num_layers=1, image_side=56, vocab_size=400
    )
    return SmallWorld(model, items)


@pytest.fixture
def finetune_config(small_world, tmp_path):
    """Makes a FinetuneConfig for the small world; keyword arguments change it."""
    from sda_fast.train import FinetuneConfig

    def make(**changes):
        settings = {
            "model": str(small_world.model), "items": small_world.items, "output": tmp_path / "run", "device": "cpu",
            "batch_size": 6, "steps": 6, "checkpoint_every": 2, "learning_rate": 3e-3, "max_pixels": 56 * 56,
            "gradient_checkpointing": False, "progress": False, "temperature": 1.0,
        }  # fmt: skip
        return FinetuneConfig(**{**settings, **changes})

    return make


@pytest.fixture
def run_and_kill():
    """run_and_kill(config, condition): a training run in a process of its own, killed once the condition holds.

    `first` is code that the process runs before; this process computes with one thread, as that one does.
    """

    def run(config, condition, *, first="", timeout=120):
        arguments = [sys.executable, "-c", PAUSE_AFTER_STEPS + first + RUN_FROM_JSON, json.dumps(config.as_json())]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + timeout
        while not condition():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(before)
