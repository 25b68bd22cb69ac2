"""The gate without a GPU: compile every kernel variant for several chips and read what the compiler made of it.

How to enter a kernel. A module with device code has beside it a table, a module-level tuple `VARIANTS` of
`KernelVariant`, and the table's module is named in `TABLES` below. A variant says

    name          what to print, e.g. "project bf16 R=16 dropout"
    kernel        the function decorated with `triton.jit` or `launching.kernel`
    signature     run-time arguments in any order: name -> "*bf16", "*fp32", "i32", "i64", "fp32", ...
    constexprs    every other argument: name -> value (None for an absent pointer)
    num_warps, num_stages
    aligned       names of integer arguments that are multiples of 16 in practice (row strides, sizes);
                  pointers are always taken as aligned
    problem       the sizes that the formulas below were worked out for, e.g. "M=8192 K=3584 R=16"
    bytes_moved   bytes the kernel moves through device memory for that problem, by formula
    bytes_floor   bytes that any implementation must move
    flops         operations, two per multiply-add
    tensor_cores  False for a kernel without matrix products
    fp_fusion     whether the launcher lets multiplications and additions fuse
    targets       the only chips it is launched on; none named: all

It fails if a chip would spill registers, lacks the shared memory, or if a kernel with matrix products has no
tensor-core instruction. The process must not run with TRITON_INTERPRET=1. Results are kept by Triton's own cache.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLES = (
    "sda_fast.kernels.moda_variants",
    "sda_fast.kernels.gates_variants",
    "sda_fast.kernels.nf4_variants",
    "sda_fast.kernels.cmsa_variants",
)

# Bytes of shared memory one program may use. Code for sm_80 also runs on sm_86 and sm_89, which have the least.
SHARED_MEMORY_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448}

TENSOR_CORE_INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
}


@dataclass(frozen=True)
class KernelVariant:
    """One way a kernel is launched; see the top of this module."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    problem: str
    bytes_moved: int
    bytes_floor: int
    flops: int
    aligned: tuple[str, ...] = ()
    tensor_cores: bool = True
    fp_fusion: bool = True
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelReport:
    """What the compiler made of one variant for one chip."""

    variant: KernelVariant
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    faults: tuple[str, ...] = field(default=())


def all_variants(tables: Iterable[str] = TABLES) -> list[KernelVariant]:
    """Every variant of the given tables, in order."""
    return [variant for table in tables for variant in importlib.import_module(table).VARIANTS]


def check_kernels(
    targets: Sequence[str] = ("sm_80", "sm_90", "sm_100"), variants: Iterable[KernelVariant] | None = None
) -> list[KernelReport]:
    """Compile variants (default: all) for each target that they run on and report on them; no GPU is needed.

    Raises:
        ValueError: Triton runs as an interpreter in this process, or a target is not one of those in
            SHARED_MEMORY_LIMIT.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("kernels cannot be compiled with TRITON_INTERPRET=1; start a process without it")
    for target in targets:
        if target not in SHARED_MEMORY_LIMIT:
            raise ValueError(f"target is {target!r}, expected one of {sorted(SHARED_MEMORY_LIMIT)}")
    chosen = all_variants() if variants is None else list(variants)
    pairs = [(one, target) for one in chosen for target in targets if target in (one.targets or targets)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: check_variant(*pair), pairs))


def check_variant(variant: KernelVariant, target: str) -> KernelReport:
    """Compile one variant for one target and look for faults."""
    compiled = compile_variant(variant, target)
    registers, spill_bytes = resource_usage(compiled.asm["cubin"])
    shared_bytes = compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    instructions = {name: len(re.findall(pattern, ptx)) for name, pattern in TENSOR_CORE_INSTRUCTIONS.items()}
    faults = []
    if spill_bytes:
        faults.append(f"{spill_bytes} bytes of local memory")
    if shared_bytes > SHARED_MEMORY_LIMIT[target]:
        faults.append(f"{shared_bytes} bytes of shared memory, limit {SHARED_MEMORY_LIMIT[target]}")
    if variant.tensor_cores and not any(instructions.values()):
        faults.append("no tensor-core instruction")
    return KernelReport(variant, target, registers, spill_bytes, shared_bytes, instructions, tuple(faults))


def compile_variant(variant: KernelVariant, target: str) -> triton.compiler.CompiledKernel:
    """The compiled kernel, `.asm` holding ttir, ttgir, ptx and cubin."""
    names = variant.kernel.arg_names
    described = set(variant.signature) | set(variant.constexprs)
    if described != set(names):
        raise ValueError(f"{variant.name}: arguments {sorted(described ^ set(names))} are missing or unknown")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in variant.aligned]
    source = ASTSource(
        variant.kernel,
        signature,
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread (spills) of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


@dataclass
class GateConfig:
    """What `sda-fast kernels` compiles."""

    targets: str = field(default="sm_80,sm_90,sm_100", metadata={"help": "chips to compile for, separated by commas"})
    name: str = field(default="", metadata={"help": "only kernels whose name contains this"})


def run_gate(config: GateConfig) -> str:
    """The table for `sda-fast kernels`.

    Raises:
        ValueError: a variant has a fault (the message holds the table), no variant has the name, a target is unknown,
            or Triton runs as an interpreter.
    """
    variants = [variant for variant in all_variants() if config.name in variant.name]
    if not variants:
        names = [variant.name for variant in all_variants()]
        near = difflib.get_close_matches(config.name, names, n=5, cutoff=0.0)
        raise ValueError(f"no kernel's name contains {config.name!r}; near it are {', '.join(map(repr, near))}")
    reports = check_kernels([target.strip() for target in config.targets.split(",")], variants)
    table = format_reports(reports)
    if any(report.faults for report in reports):
        raise ValueError(f"kernels with faults\n{table}")
    return table


def format_reports(reports: Sequence[KernelReport]) -> str:
    """A table, one line per variant and target, with faults at the end of the line and counted in the last one."""
    header = (
        f"{'kernel':<50} {'chip':<6} {'regs':>4} {'spill':>5} {'shared':>7}  {'tensor cores':<14} {'moved/floor':>17}"
    )
    lines = [header]
    for report in reports:
        variant = report.variant
        used = " ".join(f"{name}:{count}" for name, count in report.instructions.items() if count) or "-"
        moved = f"{variant.bytes_moved / 1e6:.1f}/{variant.bytes_floor / 1e6:.1f} MB"
        ratio = f"{variant.bytes_moved / variant.bytes_floor:.2f}"
        lines.append(
            f"{variant.name:<50} {report.target:<6} {report.registers:>4} {report.spill_bytes:>5} "
            f"{report.shared_bytes:>7}  {used:<14} {moved:>17} {ratio}"
            + (f"  FAULT: {'; '.join(report.faults)}" if report.faults else "")
        )
    faulty = sum(bool(report.faults) for report in reports)
    lines.append(f"{len(reports)} compilations, {faulty} with faults")
    return "\n".join(lines)
