"""Representative kernels compile for every chip without spills, on tensor cores, within shared memory; without a GPU.

The compiler and the interpreter exclude each other in one process, so everything here runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import torch

from sda_fast.cli import main
from sda_fast.kernels.configs import CONFIGS
from sda_fast.kernels.moda_backward import LARGEST_FUSED_DX_RANK, LARGEST_FUSED_DY_RANK
from sda_fast.kernels.moda_variants import RANKS, VARIANTS
from sda_fast.ops.moda_linear import ids_of

# Of every kind one that was found to spill, or to need too much shared memory, with some configuration.
REPRESENTATIVE = (
    "project bf16 R=128 dropout",
    "project fp32 R=32",
    "expand_add bf16 R=128 bf16 adapter",
    "expand bf16 R=16 bias layers=3 one gate",
    "gated_linear bf16 R=128 one gate",
    "input_gradient bf16 R=64 dropout",
    "gated_linear Hopper bf16 R=8 no bias",
    "input_gradient Hopper bf16 R=32 dropout",
    "input_gradient Blackwell bf16 R=16",
    "dy_pass bf16 R=8 row gates",
    "dy_pass bf16 R=32 dB only layers=3",
    "dy_pass bf16 R=256 dB only one gate",
    "dx_pass bf16 R=64 dA only dropout",
    "gate gradient R=256 E=64",
    "decode nested fold R=16",
    "small product bf16 M=1 nested",
    "cmsa merge statistics soft",
    "cmsa values of halves bf16",
    "split sums add two",
)

CHECK = f"""
from sda_fast.kernels.gate import all_variants, check_kernels, format_reports
variants = [variant for variant in all_variants() if variant.name in {REPRESENTATIVE!r}]
assert len(variants) == {len(REPRESENTATIVE)}, [variant.name for variant in variants]
names = [variant.name for variant in all_variants()]
assert len(set(names)) == len(names), "two variants have one name"
reports = check_kernels(variants=variants)
print(format_reports(reports))
assert len(reports) == sum(len(variant.targets) or 3 for variant in variants)
assert not any(report.faults for report in reports)
hopper = [report for report in reports if report.target == "sm_90" and "_linear" in report.variant.name]
assert all(report.instructions["wgmma"] > 0 for report in hopper) and len(hopper) == 2
"""

FAULTY = """
import dataclasses
from sda_fast.kernels.gate import all_variants, check_variant
variants = {variant.name: variant for variant in all_variants()}
gemm = variants["gated_linear bf16 R=16"]
tall = dataclasses.replace(gemm, constexprs={**gemm.constexprs, "BLOCK_M": 256, "BLOCK_N": 256}, num_warps=4)
report = check_variant(tall, "sm_80")
assert report.spill_bytes > 0 and any("local memory" in fault for fault in report.faults), report
assert any("shared memory" in fault for fault in report.faults), report
decode = dataclasses.replace(variants["decode"], tensor_cores=True)
assert check_variant(decode, "sm_80").faults == ("no tensor-core instruction",)
"""

CORNERS = """
import dataclasses
from sda_fast.kernels.gate import compile_variant
from sda_fast.kernels.moda_variants import VARIANTS as MODA
from sda_fast.kernels.cmsa_variants import VARIANTS as CMSA
from sda_fast.kernels.nf4_variants import VARIANTS as NF4
of_kernel = {variant.kernel: variant for variant in (*MODA, *NF4)}
of_kernel |= {variant.kernel: variant for variant in CMSA if not variant.tensor_cores}
of_kernel |= {variant.kernel: variant for variant in MODA if "dropout" in variant.name}
for variant in of_kernel.values():
    if variant.targets:
        continue  # a descriptor's strides are never 1
    integers = [name for name, kind in variant.signature.items() if kind == "i32"]
    others = {name: kind for name, kind in variant.signature.items() if kind != "i32"}
    constexprs = {**variant.constexprs, **dict.fromkeys(integers, 1)}
    compile_variant(dataclasses.replace(variant, signature=others, constexprs=constexprs, aligned=()), "sm_80")
"""

WIDE_LOADS = r"""
import re
from sda_fast.kernels.gate import compile_variant
from sda_fast.kernels.nf4_variants import VARIANTS
variants = {variant.name: variant for variant in VARIANTS}
for target in ("sm_80", "sm_90"):
    for name in ("decode", "decode nested fold R=16", "small product bf16 M=1"):
        ptx = compile_variant(variants[name], target).asm["ptx"]
        loads = re.findall(r"ld\.global\S*", ptx)
        copies = re.findall(r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], 0x10", ptx)
        assert copies if "small" in name else any(load.endswith(".v4.b32") for load in loads), (target, name, loads)
        # Scales may be single bytes, two a thread; codes may not.
        assert sum(load.endswith((".b8", ".u8")) for load in loads) <= 2, (target, name, loads)
"""

INTERPRETED = """
from sda_fast.cli import main
assert main(["kernels", "--name", "project bf16 R=16"]) == 2
"""


def run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


def test_the_table_has_every_gating_and_need_for_every_configuration():
    names = {variant.name for variant in VARIANTS}
    gatings = "", " row gates", " one gate"
    wanted = [f"{kernel} {type_name} R={rank}{gating}"
        for kernel in ("expand_add", "gated_linear") for type_name in ("bf16", "fp32")
        for rank in RANKS for gating in gatings]  # fmt: skip
    for (kernel, size, rank), gating in product(CONFIGS, gatings):
        start = f"{kernel} {'bf16' if size == 2 else 'fp32'} R={rank}"
        if kernel == "dy_pass":
            wanted += [f"{start} dB only{gating}"]
            wanted += [f"{start}{layers}{gating}" for layers in ("", " layers=3") if rank <= LARGEST_FUSED_DY_RANK]
        elif kernel == "dx_pass":
            needs = ("", " dx only", " dA only") if rank <= LARGEST_FUSED_DX_RANK else (" dA only",)
            wanted += [f"{start}{need}{dropout}" for need in needs for dropout in ("", " dropout")]
        elif kernel == "project":
            wanted += [start, f"{start} dropout"]
            wanted += [f"input_gradient{start.removeprefix(kernel)}{dropout}" for dropout in ("", " dropout")]
    assert not set(wanted) - names
    of_adapters = {name.split()[0] for name in names if name.endswith("bf16 adapter")}
    assert of_adapters == {
        *("project", "expand_add", "gated_linear", "dy_pass", "dhg", "dx_pass", "dx", "input_gradient")
    }


def test_modality_ids_are_compiled_as_they_are_passed():
    passed = ids_of(torch.empty(2, 3), torch.zeros(2, dtype=torch.int32), 1).dtype
    assert passed == torch.int64
    kinds = {variant.signature.get("modality_ids_ptr") for variant in VARIANTS}
    assert kinds == {"*i64", None}


def test_representative_kernels_pass_the_gate():
    run(CHECK)


def test_the_gate_sees_spills_shared_memory_and_missing_tensor_cores():
    run(FAULTY)


def test_packed_codes_are_read_sixteen_bytes_at_once_and_ahead_in_the_small_product():
    run(WIDE_LOADS)


def test_kernels_compile_where_every_size_and_stride_is_one():
    # Triton turns an integer argument of 1 into a constant, on which fewer operations exist.
    run(CORNERS)


def test_the_gate_refuses_to_run_in_the_interpreter_without_a_traceback():
    told = run(INTERPRETED, TRITON_INTERPRET="1")
    assert "start a process without it" in told and "Traceback" not in told


def test_a_name_that_no_kernel_has_is_an_error_that_names_near_ones(capsys):
    assert main(["kernels", "--name", "decode nestd"]) == 2
    assert "no kernel's name contains 'decode nestd'; near it are 'decode nested'" in capsys.readouterr().err


def test_targets_may_have_spaces_and_unknown_ones_are_named(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--targets", "sm_80, sm_70", "--name", "decode nested"]) == 2
    assert "target is 'sm_70', expected one of ['sm_100', 'sm_80', 'sm_90']" in capsys.readouterr().err
