"""Launches that remember their binary, with a driver that records launches in place of making them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launch_twice.py")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    "name",
    [
        "repeated_launches_hand_over_what_triton_does",
        "hooks_see_every_launch",
        "an_integer_and_a_float_of_one_value_differ",
        "what_is_remembered_stays_bounded",
        "a_launch_goes_to_the_device_of_its_tensors",
        "constants_must_come_last",
    ],
)
def test_launches_without_a_device(name: str) -> None:
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, SCRIPT, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
