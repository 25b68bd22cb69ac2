"""Builds the CUDA library with plain nvcc: `python csrc/compile.py OUTPUT.so`. Used by setup.py and by the tests.

Only torch's stable ABI is used, so that a library built with one torch serves every later one; the CUDA runtime is
linked in.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNEL_SOURCES = (
    *("decode.cu", "decode_fold.cu", "linear.cu", "gates.cu"),
    *("passes_forward.cu", "passes_backward.cu", "add_parts.cu"),
)
BINDING_SOURCE = "binding.cpp"
DEFAULT_TARGETS = "80,86,89,90"
# The oldest torch whose stable ABI the binding uses, 2.11: torch's headers declare nothing that is newer.
TORCH_TARGET_VERSION = "0x020b000000000000"


def targets_of(text: str) -> tuple[str, ...]:
    """The compute capabilities in words like "80,90"; none are the usual ones.

    Raises:
        ValueError: a word is no compute capability.
    """
    targets = tuple(word.strip() for word in (text.strip() or DEFAULT_TARGETS).split(","))
    for target in targets:
        if not re.fullmatch(r"\d{2,3}[af]?", target):
            raise ValueError(
                f"SDA_FAST_CUDA_TARGETS must be compute capabilities, such as 90 or 80,90, got {text!r} with {target!r}"
            )
    return targets


# SDA_FAST_CUDA_TARGETS=90 builds for one card, and sooner.
TARGETS = targets_of(os.environ.get("SDA_FAST_CUDA_TARGETS", ""))


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the path, or in the usual place."""
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return str(Path(folder) / "bin" / "nvcc")
    return shutil.which("nvcc")


def reason_not_to_build(*, forced: bool = False) -> str | None:
    """Why the library cannot be built here, or None if it can; with a torch without CUDA it is built if forced."""
    if os.name != "posix":
        return "the CUDA library is built on Linux only"
    if find_nvcc() is None:
        return "no CUDA compiler was found (set CUDA_HOME)"
    try:
        torch = runpy.run_path(str(torch_folder() / "version.py"))
    except FileNotFoundError as error:
        return str(error)
    if torch["cuda"] is None and not forced:
        return f"torch {torch['__version__']} is a build without CUDA (SDA_FAST_CUDA=1 builds all the same)"
    return None


def torch_folder() -> Path:
    """Where torch keeps its headers and libraries; it is never imported.

    pip's isolated builds run the environment's own interpreter and hide its packages from imports, so that torch is
    looked for in its package folders as well.

    Raises:
        FileNotFoundError: torch is in none of them.
    """
    specification = find_spec("torch")
    if specification is not None and specification.origin is not None:
        return Path(specification.origin).parent
    prefixes = dict.fromkeys((sys.prefix, sys.base_prefix))
    packages = [sysconfig.get_path("platlib", vars={"base": prefix, "platbase": prefix}) for prefix in prefixes]
    for folder in packages:
        if (Path(folder) / "torch" / "version.py").is_file():
            return Path(folder) / "torch"
    raise FileNotFoundError(f"torch is not installed for this interpreter (looked in {', '.join(packages)})")


def gencode_flags() -> list[str]:
    """Machine code for each target, and PTX of the last for later chips.

    Targets of one generation are made from the same PTX, that of the first: the front end runs once for them all.
    """
    generations: dict[str, list[str]] = {}
    for target in TARGETS:
        generations.setdefault(target[:-1] if target.isdigit() else target, []).append(target)
    flags = []
    for targets in generations.values():
        codes = [f"sm_{target}" for target in targets]
        if targets[-1] == TARGETS[-1]:
            codes.append(f"compute_{targets[0]}")
        flags.append(f"-gencode=arch=compute_{targets[0]},code=[{','.join(codes)}]")
    return flags


def object_command(source: str, output: Path) -> list[str]:
    """The command that compiles one source; kernels need nvcc alone, the binding also torch's headers."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no CUDA compiler was found (set CUDA_HOME)")
    command = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{HERE}", "-c", str(HERE / source)]
    if source == BINDING_SOURCE:
        command += [
            "-x",
            "cu",
            f"-arch=sm_{TARGETS[-1]}",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        ]
        command += [f"-I{torch_folder() / 'include'}"]
    else:
        command += ["-Xptxas=-v", *gencode_flags()]
    return [*command, "-o", str(output)]


def link_command(objects: list[Path], output: Path) -> list[str]:
    """The command that links the library against the torch that is installed."""
    libraries = torch_folder() / "lib"
    names = [name for name in ("torch_cpu", "torch_cuda") if (libraries / f"lib{name}.so").exists()]
    # Only a weak symbol is wanted of torch_cuda, for which a linker would not keep it.
    return [
        *(str(find_nvcc()), "-shared", "-cudart=static", *map(str, objects)),
        *(f"-L{libraries}", "-Xlinker=--no-as-needed"),
        *(f"-l{name}" for name in names),
        *("-o", str(output)),
    ]


def build(output: Path) -> None:
    """Compile and link everything into `output`; raises CalledProcessError with the compiler's message printed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in (*KERNEL_SOURCES, BINDING_SOURCE):
            objects.append(Path(folder) / f"{source}.o")
            subprocess.run([*object_command(source, objects[-1]), "--threads=0"], check=True)
        subprocess.run(link_command(objects, output), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
