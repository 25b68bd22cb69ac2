"""The top-level folder `kernels` does not get in the way of the distribution of that name."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def from_the_root(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_libraries_that_look_for_the_distribution_kernels_import_from_the_repository_root() -> None:
    code = "import transformers.integrations.hub_kernels, bitsandbytes, sda_fast.kernels.philox as p; print(p.__name__)"
    assert from_the_root(code) == "sda_fast.kernels.philox"


def test_the_distribution_wins_over_the_folder() -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the distribution `kernels` is not installed")
    assert not Path(from_the_root("import kernels; print(kernels.__file__)")).is_relative_to(ROOT / "kernels")
