"""What decides whether an installation builds the libraries, and where the CUDA library's build finds torch."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sda_fast.ops import host_library

ROOT = Path(__file__).resolve().parents[2]
COMPILE = ROOT / "csrc" / "compile.py"
HOST_COMPILE = ROOT / "csrc" / "host" / "compile.py"


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


def number_of_libraries(**variables):
    """How many libraries setup.py asks for, with the environment variables given, as a finished process."""
    pytest.importorskip("setuptools")
    script = "import runpy; print(len(runpy.run_path('setup.py', run_name='setup')['extensions']()))"
    script = f"import setuptools; setuptools.setup = lambda **options: None; {script}"
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("choice", ["0", "1", "yes"])
def test_the_variable_forces_and_forbids(choice):
    reason = runpy.run_path(str(COMPILE))["reason_not_to_build"](forced=True)
    done = number_of_libraries(SDA_FAST_CUDA=choice, SDA_FAST_HOST="0")
    if choice == "yes":
        assert done.returncode == 1 and "SDA_FAST_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr
    elif choice == "1" and reason is not None:
        assert done.returncode == 1 and f"SDA_FAST_CUDA=1, but {reason}" in done.stderr
    else:
        assert done.stdout.split() == [choice], done.stderr


@pytest.mark.parametrize("choice", ["0", "1", "auto", "yes"])
@pytest.mark.parametrize("compiler", [True, False])
def test_the_host_library_is_built_where_there_is_a_compiler_and_nobody_forbids_it(choice, compiler, tmp_path):
    variables = {"SDA_FAST_CUDA": "0", "SDA_FAST_HOST": choice, "CXX": "", "PATH": str(tmp_path)}
    if compiler:
        (tmp_path / "g++").touch(mode=0o755)
    done = number_of_libraries(**variables)
    if choice == "yes":
        assert done.returncode == 1 and "SDA_FAST_HOST must be 0, 1 or auto, got 'yes'" in done.stderr
    elif compiler or choice == "0":
        assert done.stdout.split() == ["0" if choice == "0" else "1"], done.stderr
    elif choice == "auto":
        assert done.stdout.split() == ["0"] and "optional host library is not built: no C++ compiler" in done.stderr
    else:
        assert done.returncode == 1 and "SDA_FAST_HOST=1, but no C++ compiler was found (CXX, c++, g++" in done.stderr


def test_the_compiler_that_is_named_comes_first_with_its_arguments(monkeypatch, tmp_path):
    find_compiler = runpy.run_path(str(HOST_COMPILE))["find_compiler"]
    for name in ("mine", "g++", "clang++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "mine -m64")
    assert find_compiler() == ["mine", "-m64"]
    monkeypatch.setenv("CXX", "absent")
    assert find_compiler() == ["g++"]
    monkeypatch.delenv("CXX")
    assert find_compiler() == ["g++"]


def build_host_library(folder, **variables):
    """setup.py's build of the host library alone into a folder."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}"]
    environment = {**os.environ, "SDA_FAST_CUDA": "0", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_compiler_that_fails_ends_the_build_only_if_forced(choice, tmp_path):
    pytest.importorskip("setuptools")
    done = build_host_library(tmp_path, SDA_FAST_HOST=choice, CXX="false")
    assert "sda_fast.ops.libsda_fast_host did not compile" in done.stderr
    assert (done.returncode == 0) == (choice == "auto")
    assert not list(tmp_path.rglob("*.so"))


def test_the_host_library_is_built_where_it_is_looked_for(tmp_path):
    pytest.importorskip("setuptools")
    reason = runpy.run_path(str(HOST_COMPILE))["reason_not_to_build"]()
    if reason is not None:
        pytest.skip(reason)
    done = build_host_library(tmp_path, SDA_FAST_HOST="1")
    assert done.returncode == 0, done.stderr
    built = tmp_path / "sda_fast" / "ops" / host_library.LIBRARY_PATH.name
    assert not isinstance(host_library.load(built), str)
