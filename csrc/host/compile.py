"""Builds the host library with the host's C++ compiler: `python csrc/host/compile.py OUTPUT.so`. Used by setup.py and
by the tests.

No flag names a processor: what is faster with AVX2 or AMX is chosen when the library runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path

SOURCES = tuple(Path(__file__).resolve().parent / name for name in ("dropout.cpp", "low_rank.cpp"))
COMPILERS = ("c++", "g++", "clang++")


def find_compiler() -> list[str] | None:
    """The C++ compiler, with the arguments that CXX may give it: CXX, or the first of COMPILERS that is on the path."""
    for command in (os.environ.get("CXX", ""), *COMPILERS):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def reason_not_to_build() -> str | None:
    """Why the library cannot be built here, or None if it can."""
    if os.name != "posix":
        return "the host library is built on Linux and macOS only"
    if find_compiler() is None:
        return f"no C++ compiler was found (CXX, {', '.join(COMPILERS)})"
    return None


def command(output: Path) -> list[str]:
    """The command that compiles and links the library."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler was found (CXX, {', '.join(COMPILERS)})")
    return [*compiler, "-std=c++17", "-O3", "-fPIC", "-pthread", "-shared", *map(str, SOURCES), "-o", str(output)]


def build(output: Path) -> None:
    """Compile and link into `output`; raises CalledProcessError with the compiler's message printed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(output), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
