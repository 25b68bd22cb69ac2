"""Packages of the distribution and its optional libraries; everything else is in pyproject.toml.

`sda_fast/kernels` is a link to the top-level folder `kernels/`, which has no `__init__.py` on purpose: seen from the
repository root it is then only a namespace, and an installed distribution whose import name is `kernels`
(transformers and bitsandbytes look for it) wins over it.

Nothing but speed and rounding depends on the libraries. The CUDA library is built when a CUDA compiler and a CUDA build
of torch are at hand, torch being the one installed beside the interpreter that pip runs; SDA_FAST_CUDA=1 makes it an
error not to build it and builds it for a torch without CUDA too, SDA_FAST_CUDA=0 forbids it. The host library is built
when a C++ compiler is at hand; SDA_FAST_HOST=1 makes it an error not to build it, SDA_FAST_HOST=0 forbids it.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
cuda = runpy.run_path(str(CSRC / "compile.py"))
host = runpy.run_path(str(CSRC / "host" / "compile.py"))
CUDA_LIBRARY, HOST_LIBRARY = "sda_fast.ops.libsda_fast_cuda", "sda_fast.ops.libsda_fast_host"
BUILD = {CUDA_LIBRARY: cuda["build"], HOST_LIBRARY: host["build"]}


class BuildLibraries(build_ext):
    """Builds the libraries with their own compile.py in place of setuptools' compiler."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension):
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Of a build that fails no older library may be left to be packed.
        output.unlink(missing_ok=True)
        try:
            BUILD[extension.name](output)
        except (subprocess.CalledProcessError, OSError) as error:
            raise CompileError(f"{extension.name} did not compile: {error}") from error


def extensions():
    return [
        *extension("CUDA", CUDA_LIBRARY, cuda["reason_not_to_build"]),
        *extension("host", HOST_LIBRARY, lambda forced: host["reason_not_to_build"]()),
    ]


def extension(kind, name, reason_not_to_build):
    """The library as setuptools takes it, in a list that is empty if it is not to be built."""
    variable = f"SDA_FAST_{kind.upper()}"
    choice = os.environ.get(variable, "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"{variable} must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return []
    reason = reason_not_to_build(forced=choice == "1")
    if reason is None:
        return [Extension(name, sources=[], optional=choice == "auto")]
    if choice == "1":
        sys.exit(f"{variable}=1, but {reason}")
    print(f"sda-fast: the optional {kind} library is not built: {reason}", file=sys.stderr)
    return []


setup(
    packages=[*find_packages(include=["sda_fast", "sda_fast.*"]), "sda_fast.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
