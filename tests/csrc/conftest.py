"""Compiles once for every state of the sources: the host emulation of the CUDA kernels, and what nvcc makes of them."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from sda_fast.ops import cuda_library

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


class EmulatedLibrary:
    """The compiled launchers. A call may use the memory of the tensors that `pointer` was given for it, no other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulated_end.restype = ctypes.c_char_p

    def pointer(self, tensor: torch.Tensor | None, *, written: bool = False) -> int | None:
        """The address of a tensor that the next call reads, or also writes."""
        if tensor is None:
            return None
        rows, row_bytes, stride = pieces(tensor)
        sizes = (c_int64(size) for size in (rows, row_bytes, stride))
        self.library.emulated_allow(c_void_p(tensor.data_ptr()), *sizes, int(written))
        return tensor.data_ptr()

    def call(self, name: str, *arguments: object) -> int:
        """What a function of the library returns.

        Raises:
            AssertionError: a kernel broke one of CUDA's rules.
        """
        result = getattr(self.library, f"emulated_{name}")(*arguments)
        broken = self.library.emulated_end().decode()
        assert not broken, broken
        return result


def pieces(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where a tensor's elements are: so many pieces, bytes of one, bytes from one to the next."""
    size = tensor.element_size()
    if tensor.dim() == 2 and tensor.stride(1) != 1:
        tensor = tensor.t()
    if tensor.is_contiguous():
        return 1, tensor.numel() * size, tensor.numel() * size
    assert tensor.dim() == 2 and tensor.stride(1) == 1
    return tensor.shape[0], tensor.shape[1] * size, tensor.stride(0) * size


class EmulatedKernels:
    """The launchers of csrc/ on CPU tensors; `state` is a bitsandbytes QuantState."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library
        self.kept: list[torch.Tensor | None] = []

    def weight(self, packed: torch.Tensor, state) -> WeightArguments:
        nested = state.state2
        offset = None if nested is None else state.offset.float().reshape(1)
        self.kept = [packed, state.code, state.absmax, offset]
        pointer = self.library.pointer
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

    def pointers(self, *tensors: torch.Tensor | None, written: bool = False) -> list[c_void_p]:
        return [c_void_p(self.library.pointer(tensor, written=written)) for tensor in tensors]

    def decode(self, packed: torch.Tensor, state, out: torch.Tensor) -> torch.Tensor:
        weight = self.weight(packed, state)
        self.library.call("decode", ctypes.byref(weight), *self.pointers(out, written=True), SCALAR_KINDS[out.dtype])
        return out

    def decode_fold(self, packed, state, lora_A, lora_B, gates, scaling, out) -> torch.Tensor:
        rows, columns = state.shape
        self.library.call(
            "decode_fold",
            ctypes.byref(self.weight(packed, state)),
            *self.pointers(lora_A, lora_B, gates),
            SCALAR_KINDS[lora_A.dtype],
            ctypes.c_float(scaling),
            lora_A.shape[0],
            gates.numel(),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            *self.pointers(out, written=True),
            SCALAR_KINDS[out.dtype],
        )
        return out

    def linear(
        self, x, packed, state, bias, hidden, lora_B, code_multiplier, out, splits=1, gates=None, scaling=1.0
    ) -> int:
        """Fills out; returns into how many parts K was split, 0 if the path for any shape was taken."""
        rows, columns = state.shape
        return self.library.call(
            "linear",
            ctypes.byref(self.weight(packed, state)),
            *self.pointers(x, bias, hidden, lora_B, gates),
            ctypes.c_float(scaling),
            1 if gates is None else gates.numel(),
            *self.pointers(out, written=True),
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
        self.library.call(
            "gates",
            *self.pointers(embedding, proj),
            *self.pointers(gates, written=dgates is None),
            *self.pointers(dgates),
            *self.pointers(dembedding, dproj, written=True),
            SCALAR_KINDS[proj.dtype],
            *(*embedding.shape, proj.shape[0], modality),
        )


class Dropout(Structure):
    """Mirrors DropoutArguments in launchers.h, as those below mirror the arguments of the passes."""

    _fields_ = (("seed", c_void_p), ("threshold", c_int), ("scale", c_float))


class Gate(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("gates", "ids")),
        *((name, c_int) for name in ("ids_are_64bit", "rows_per_id", "lines", "num_experts")),
        ("scaling", c_float),
    )


class Project(Structure):
    _fields_ = (
        *(("x", c_void_p), ("x_stride", c_int64), ("lora_A", c_void_p), ("kind", c_int), ("lora_kind", c_int)),
        *(("h", c_void_p), ("h_stride", c_int64), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "K", "R", "splits")),
        ("parts", c_void_p),
    )


class Expand(Structure):
    _fields_ = (
        *(("y", c_void_p), ("y_stride", c_int64), ("bias", c_void_p), ("h", c_void_p), ("h_stride", c_int64)),
        *(("lora_B", c_void_p), ("stride_column", c_int64), ("stride_rank", c_int64)),
        *(("kind", c_int), ("lora_kind", c_int), ("gate", Gate), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "N", "R", "adds")),
    )


class Dy(Structure):
    _fields_ = (
        *(("dy", c_void_p), ("dy_stride", c_int64), ("h", c_void_p), ("h_stride", c_int64)),
        *(("lora_B", c_void_p), ("kind", c_int), ("lora_kind", c_int), ("gate", Gate)),
        *(("dh", c_void_p), ("dh_stride", c_int64), ("dB", c_void_p), ("dgates", c_void_p)),
        *((name, c_int) for name in ("M", "N", "R", "chunks")),
        *((name, c_void_p) for name in ("dhg_parts", "dB_parts", "dgates_parts")),
    )


class Dx(Structure):
    _fields_ = (
        *(("x", c_void_p), ("x_stride", c_int64), ("dh", c_void_p), ("dh_stride", c_int64)),
        *(("lora_A", c_void_p), ("kind", c_int), ("lora_kind", c_int)),
        *(("dx", c_void_p), ("dx_stride", c_int64), ("dA", c_void_p), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "K", "R", "adds", "chunks")),
        ("dA_parts", c_void_p),
    )


class EmulatedOperations:
    """What the binding registers, with the launchers on CPU tensors; results are filled with NaN before."""

    def __init__(self, library: EmulatedLibrary):
        self.library = library
        self.parts = 0  # how many the last call had

    def rows(self, tensor, *, written=False):
        """Pointer and row stride of a matrix."""
        return (None, 0) if tensor is None else (self.library.pointer(tensor, written=written), tensor.stride(0))

    def dropout(self, seed, threshold, scale):
        return Dropout(self.library.pointer(seed), threshold, scale) if threshold else Dropout(None, 0, 1.0)

    def gate(self, gates, ids, rows_per_id, scaling):
        if gates is None:
            return Gate()
        pointers = self.library.pointer(gates), self.library.pointer(ids)
        return Gate(*pointers, ids is not None and ids.dtype == torch.int64, rows_per_id, *gates.shape, scaling)

    def moda_project(self, x, lora_A, seed, threshold, keep_scale, h, parts=0):
        h.fill_(float("nan"))
        arguments = Project(
            *(*self.rows(x), self.library.pointer(lora_A), SCALAR_KINDS[x.dtype], SCALAR_KINDS[lora_A.dtype]),
            *(*self.rows(h, written=True), self.dropout(seed, threshold, keep_scale), *x.shape, lora_A.shape[0]),
        )
        self.parts = self.library.call("project", ctypes.byref(arguments), parts)

    def moda_expand(self, y, h, lora_B, bias, *rest):
        *gate, seed, threshold, keep_scale, adds = rest
        if not adds:
            y.fill_(float("nan"))
        pointer = self.library.pointer
        arguments = Expand(
            *(*self.rows(y, written=True), pointer(bias), *self.rows(h), pointer(lora_B), *lora_B.stride()),
            *(SCALAR_KINDS[y.dtype], SCALAR_KINDS[lora_B.dtype], self.gate(*gate)),
            *(self.dropout(seed, threshold, keep_scale), *y.shape, h.shape[1], adds),
        )
        self.library.call("expand", ctypes.byref(arguments))

    def moda_dy_pass(self, dy, h, lora_B, gates, ids, rows_per_id, scaling, dh, dB, dgates, parts=0):
        for result in (dh, dB, dgates):
            if result is not None and result is not h:
                result.fill_(float("nan"))
        pointer = self.library.pointer
        kinds = SCALAR_KINDS[dy.dtype], SCALAR_KINDS[lora_B.dtype]
        arguments = Dy(
            *(*self.rows(dy), *self.rows(h), pointer(lora_B), *kinds, self.gate(gates, ids, rows_per_id, scaling)),
            *(*self.rows(dh, written=True), pointer(dB, written=True), pointer(dgates, written=True)),
            *(*dy.shape, h.shape[1]),
        )
        self.parts = self.library.call("dy_pass", ctypes.byref(arguments), parts)

    def moda_dx_pass(self, x, dh, lora_A, dx, dA, seed, threshold, keep_scale, adds, parts=0):
        dA.fill_(float("nan"))
        if dx is not None and not adds:
            dx.fill_(float("nan"))
        pointer = self.library.pointer
        arguments = Dx(
            *(*self.rows(x), *self.rows(dh), pointer(lora_A), SCALAR_KINDS[x.dtype], SCALAR_KINDS[lora_A.dtype]),
            *(*self.rows(dx, written=True), pointer(dA, written=True), self.dropout(seed, threshold, keep_scale)),
            *(*x.shape, dh.shape[1], adds),
        )
        self.parts = self.library.call("dx_pass", ctypes.byref(arguments), parts)


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


def emulated_library(
    build_cache: BuildCache, kernels: Iterable[Path], interface: Iterable[Path] = ()
) -> EmulatedLibrary:
    """Kernels with the emulation, and the C functions by which tests call them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ not found: the kernels cannot be emulated on the host")
    here, csrc = ROOT / "tests" / "csrc", ROOT / "csrc"
    common = [
        compiler,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fPIC",
        f"-I{here}",
        f"-I{csrc}",
        "-DSDA_EMULATE",
        "-x",
        "c++",
    ]
    # Every access to memory is reported to emulated_memory.cpp, whole structures as they are in the source.
    watched = ["-fsanitize=thread", "-fno-tree-sra", "-fsanitize=signed-integer-overflow,shift,bounds"]
    headers = [*here.glob("*.h"), *csrc.glob("*.h"), *csrc.glob("*.cuh")]
    sources = [(path, watched) for path in kernels] + [
        (path, []) for path in (*interface, here / "emulated_threads.cpp", here / "emulated_memory.cpp")
    ]
    objects = [build_cache.build([*common, *flags, "-c", str(path)], [path, *headers])[0] for path, flags in sources]
    library, _ = build_cache.build([compiler, "-shared", *map(str, objects)], [], suffix=".so")
    return EmulatedLibrary(ctypes.CDLL(str(library)))


@pytest.fixture(scope="session")
def emulated_kernels(build_cache) -> EmulatedKernels:
    # without_barriers.py names a changed copy of one of them.
    changed = Path(os.environ.get("SDA_FAST_EMULATE_INSTEAD", ""))
    kernels = [changed if name == changed.name else ROOT / "csrc" / name for name in KERNEL_FILES]
    interface = ROOT / "tests" / "csrc" / "emulated_kernels.cpp"
    return EmulatedKernels(emulated_library(build_cache, kernels, [interface]))


@pytest.fixture(scope="session")
def broken_kernels(build_cache) -> EmulatedLibrary:
    return emulated_library(build_cache, [ROOT / "tests" / "csrc" / "broken_kernels.cpp"])


@pytest.fixture
def cuda_passes_on_host(emulated_kernels, monkeypatch):
    """`cuda_passes` on CPU tensors, in place of the binding's operations."""
    torch.manual_seed(0)
    operations = EmulatedOperations(emulated_kernels.library)
    monkeypatch.setattr(torch.ops, "sda_fast_cuda", operations, raising=False)
    monkeypatch.setattr(cuda_library, "reason_unavailable", lambda device: None)
    return operations
