"""Packages of the distribution and its optional CUDA library; everything else is in pyproject.toml.

`sda_fast/kernels` is a link to the top-level folder `kernels/`, which has no `__init__.py` on purpose: seen from the
repository root it is then only a namespace, and an installed distribution whose import name is `kernels`
(transformers and bitsandbytes look for it) wins over it.

The CUDA library is built when a CUDA compiler and a CUDA build of torch are at hand, torch being the one installed
beside the interpreter that pip runs; nothing but speed depends on it. SDA_FAST_CUDA=1 makes it an error not to build it
and builds it for a torch without CUDA too, SDA_FAST_CUDA=0 forbids it.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "sda_fast.ops.libsda_fast_cuda"
csrc = runpy.run_path(str(Path(__file__).resolve().parent / "csrc" / "compile.py"))


class BuildCudaLibrary(build_ext):
    """Builds the library with csrc/compile.py in place of the host compiler."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension):
        try:
            csrc["build"](Path(self.get_ext_fullpath(extension.name)).resolve())
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the CUDA library did not compile: {error}") from error


def extensions():
    choice = os.environ.get("SDA_FAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"SDA_FAST_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return []
    reason = csrc["reason_not_to_build"](forced=choice == "1")
    if reason is None:
        return [Extension(LIBRARY, sources=[], optional=choice == "auto")]
    if choice == "1":
        sys.exit(f"SDA_FAST_CUDA=1, but {reason}")
    print(f"sda-fast: the optional CUDA library is not built: {reason}", file=sys.stderr)
    return []


setup(
    packages=[*find_packages(include=["sda_fast", "sda_fast.*"]), "sda_fast.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCudaLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
