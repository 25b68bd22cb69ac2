"""Compiles once for every state of the sources: the host emulation of the CUDA kernels, and what nvcc makes of them."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNEL_FILES = (
    *("decode.cu", "decode_fold.cu", "linear.cu", "gates.cu"),
    *("passes_forward.cu", "passes_backward.cu", "add_parts.cu"),
)
SCALAR_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class WeightArguments(ctypes.Structure):
    """Mirrors WeightArguments in emulated_kernels.cpp."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("packed", "code", "absmax")],
        *[(name, ctypes.c_void_p) for name in ("nested_code", "nested_absmax", "nested_offset")],
        ("numel", ctypes.c_int64),
        ("log2_block_size", ctypes.c_int32),
        ("log2_nested_block_size", ctypes.c_int32),
    )


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class EmulatedKernels:
    """The launchers of csrc/ on CPU tensors; `state` is a bitsandbytes QuantState."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.kept: list[torch.Tensor | None] = []

    def weight(self, packed: torch.Tensor, state) -> WeightArguments:
        nested = state.state2
        offset = None if nested is None else state.offset.float().reshape(1)
        self.kept = [packed, state.code, state.absmax, offset]
        return WeightArguments(
            pointer(packed),
            pointer(state.code),
            pointer(state.absmax),
            pointer(nested.code) if nested else None,
            pointer(nested.absmax) if nested else None,
            pointer(offset),
            state.shape.numel(),
            state.blocksize.bit_length() - 1,
            (nested.blocksize if nested else 256).bit_length() - 1,
        )

    def decode(self, packed: torch.Tensor, state, out: torch.Tensor) -> torch.Tensor:
        self.library.emulated_decode(
            ctypes.byref(self.weight(packed, state)), ctypes.c_void_p(pointer(out)), SCALAR_KINDS[out.dtype]
        )
        return out

    def decode_fold(self, packed, state, lora_A, lora_B, gates, scaling, out) -> torch.Tensor:
        rows, columns = state.shape
        self.library.emulated_decode_fold(
            ctypes.byref(self.weight(packed, state)),
            *(ctypes.c_void_p(pointer(tensor)) for tensor in (lora_A, lora_B, gates)),
            SCALAR_KINDS[lora_A.dtype],
            ctypes.c_float(scaling),
            lora_A.shape[0],
            gates.numel(),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            ctypes.c_void_p(pointer(out)),
            SCALAR_KINDS[out.dtype],
        )
        return out

    def linear(
        self, x, packed, state, bias, hidden, lora_B, code_multiplier, out, splits=1, gates=None, scaling=1.0
    ) -> int:
        """Fills out; returns into how many parts K was split, 0 if the path for any shape was taken."""
        rows, columns = state.shape
        return self.library.emulated_linear(
            ctypes.byref(self.weight(packed, state)),
            *(ctypes.c_void_p(pointer(tensor)) for tensor in (x, bias, hidden, lora_B, gates)),
            ctypes.c_float(scaling),
            1 if gates is None else gates.numel(),
            ctypes.c_void_p(pointer(out)),
            SCALAR_KINDS[x.dtype],
            SCALAR_KINDS[torch.float32 if lora_B is None else lora_B.dtype],
            ctypes.c_float(code_multiplier),
            0 if hidden is None else hidden.shape[1],
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            splits,
        )

    def gates(self, embedding, proj, modality) -> torch.Tensor:
        """What `cuda_library.gates` returns."""
        wanted = embedding.shape[0] if modality < 0 else 1
        out = torch.full((wanted, proj.shape[0]), float("nan"))
        self._gates(embedding, proj, modality, out)
        return out

    def gates_backward(self, dgates, gates, embedding, proj, modality, needs) -> list[torch.Tensor | None]:
        """The gradients of embedding and proj, None for those that are not wanted."""
        gradients = [
            torch.full_like(one, float("nan")) if needed else None
            for one, needed in zip((embedding, proj), needs, strict=True)
        ]
        self._gates(embedding, proj, modality, gates, dgates, *gradients)
        return gradients

    def _gates(self, embedding, proj, modality, gates, dgates=None, dembedding=None, dproj=None) -> None:
        tensors = (embedding, proj, gates, dgates, dembedding, dproj)
        self.library.emulated_gates(
            *(ctypes.c_void_p(pointer(tensor)) for tensor in tensors),
            SCALAR_KINDS[proj.dtype],
            *(*embedding.shape, proj.shape[0], modality),
        )


class BuildCache:
    """Compiled files in pytest's cache folder, named by a hash of what they are made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, command: list[str], sources: Iterable[Path], suffix: str = ".o") -> tuple[Path, str]:
        """What `command` makes when `-o FILE` is added, with what it printed.

        Args:
            command: the compiler's.
            sources: every file of ours that it reads.
        """
        key = hashlib.sha256(version_of(command[0]).encode())
        for part in (*command, *(path.read_text() for path in sorted(sources))):
            key.update(part.encode() + b"\0")
        output = self.folder / f"{key.hexdigest()[:24]}{suffix}"
        report = output.with_suffix(".txt")
        if not (output.exists() and report.exists()):
            # Beside its place, then renamed: another process may be at the same.
            unfinished = output.with_suffix(f".{os.getpid()}.tmp")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            report.write_text(done.stdout + done.stderr)
            unfinished.rename(output)
        return output, report.read_text()


def version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session")
def build_cache(request, tmp_path_factory) -> BuildCache:
    if request.config.pluginmanager.hasplugin("cacheprovider"):
        return BuildCache(Path(request.config.cache.mkdir("csrc")))
    return BuildCache(tmp_path_factory.mktemp("csrc"))


@pytest.fixture(scope="session")
def emulated_kernels(build_cache) -> EmulatedKernels:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ not found: the kernels cannot be emulated on the host")
    here, csrc = ROOT / "tests" / "csrc", ROOT / "csrc"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-DSDA_EMULATE"]
    command += [f"-I{here}", f"-I{csrc}", "-x", "c++", str(here / "emulated_kernels.cpp")]
    command += [str(csrc / name) for name in KERNEL_FILES]
    sources = [*csrc.glob("*.*"), here / "emulated_kernels.cpp", here / "emulator.h"]
    library, _ = build_cache.build(command, sources, suffix=".so")
    return EmulatedKernels(ctypes.CDLL(str(library)))
