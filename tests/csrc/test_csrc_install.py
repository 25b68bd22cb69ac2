"""What decides whether an installation builds the CUDA library, and where its build finds torch."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILE = ROOT / "csrc" / "compile.py"


def reason(monkeypatch, tmp_path, *, nvcc="nvcc", cuda="12.8", forced=False):
    """reason_not_to_build with a compiler and a torch of the given kinds, None for absent ones."""
    functions = runpy.run_path(str(COMPILE))
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
    target = functions["reason_not_to_build"].__globals__
    monkeypatch.setitem(target, "find_nvcc", lambda: nvcc)
    monkeypatch.setitem(target, "torch_folder", lambda: tmp_path)
    return functions["reason_not_to_build"](forced=forced)


def test_a_compiler_and_a_torch_with_cuda_are_enough(monkeypatch, tmp_path):
    assert reason(monkeypatch, tmp_path) is None


def test_a_torch_without_cuda_is_enough_only_if_forced(monkeypatch, tmp_path):
    assert "2.13.0 is a build without CUDA" in reason(monkeypatch, tmp_path, cuda=None)
    assert reason(monkeypatch, tmp_path, cuda=None, forced=True) is None


def test_without_a_compiler_forcing_does_not_help(monkeypatch, tmp_path):
    assert "no CUDA compiler" in reason(monkeypatch, tmp_path, nvcc=None, forced=True)


def test_an_isolated_build_finds_the_torch_beside_its_interpreter():
    folder = Path(torch.__file__).parent
    if folder.parent.name != "site-packages" or Path(sys.prefix) not in folder.parents:
        pytest.skip("torch is not in this interpreter's own package folder")
    # Like pip, which takes the package folders off the path of the interpreter that builds.
    script = "import runpy, sys; sys.path = [path for path in sys.path if 'site-packages' not in path]"
    script += f"; print(runpy.run_path({str(COMPILE)!r})['torch_folder']())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(folder), done.stderr


def test_targets_are_compute_capabilities_and_none_are_the_usual_ones():
    targets_of = runpy.run_path(str(COMPILE))["targets_of"]
    assert targets_of("90") == ("90",) and targets_of(" 80, 90a ,120") == ("80", "90a", "120")
    assert targets_of("") == targets_of("  ") == ("80", "86", "89", "90")
    for text in ("sm_90", "8.0", "80,", "80;90"):
        with pytest.raises(ValueError, match="must be compute capabilities"):
            targets_of(text)


@pytest.mark.parametrize("choice", ["0", "1", "yes"])
def test_the_variable_forces_and_forbids(choice):
    pytest.importorskip("setuptools")
    reason = runpy.run_path(str(COMPILE))["reason_not_to_build"](forced=True)
    script = "import runpy; print(len(runpy.run_path('setup.py', run_name='setup')['extensions']()))"
    script = f"import setuptools; setuptools.setup = lambda **options: None; {script}"
    environment = {**os.environ, "SDA_FAST_CUDA": choice}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if choice == "yes":
        assert done.returncode == 1 and "must be 0, 1 or auto, got 'yes'" in done.stderr
    elif choice == "1" and reason is not None:
        assert done.returncode == 1 and f"SDA_FAST_CUDA=1, but {reason}" in done.stderr
    else:
        assert done.stdout.split() == [choice], done.stderr
