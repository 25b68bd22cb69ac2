"""nvcc compiles every kernel for every target within its resources, and the binding registers with this torch."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("csrc_compile", ROOT / "csrc" / "compile.py")
csrc_compile = importlib.util.module_from_spec(specification)
specification.loader.exec_module(csrc_compile)

pytestmark = pytest.mark.skipif(csrc_compile.find_nvcc() is None, reason="nvcc not found")

# A multiprocessor has 65536 registers; CTAs have 256 threads, those of project and dy 512. Static shared memory ends at
# 48 KiB.
REGISTER_LIMITS = {
    "decode_kernel": 64,
    "decode_fold_kernel": 128,
    "decode_fold_any_kernel": 64,
    "linear_any_kernel": 64,
    "linear_finish_kernel": 64,
    "gates_kernel": 64,
    "gates_backward_kernel": 64,
    "project_kernel": 128,
    "expand_kernel": 128,
    "dy_kernel": 128,
    "dy_finish_kernel": 64,
    "dx_kernel": 128,
    "add_parts_kernel": 64,
}
LINEAR_REGISTER_LIMITS = {1: 85, 2: 128, 4: 128, 8: 255}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiled(build_cache):
    """Object file and report of any source of csrc/."""

    def compile_source(source):
        command = csrc_compile.object_command(source, Path("unused"))[:-2]
        folder = Path(csrc_compile.HERE)
        headers = [*folder.glob("*.h"), *folder.glob("*.cuh")]
        if source == csrc_compile.BINDING_SOURCE:
            headers.append(csrc_compile.torch_folder() / "version.py")
        return build_cache.build(command, [folder / source, *headers])

    return compile_source


@pytest.fixture(scope="module")
def objects(compiled):
    """Object file and ptxas report of every kernel source."""
    built = {source: compiled(source) for source in csrc_compile.KERNEL_SOURCES}
    assert not any("warning" in report for _, report in built.values())
    return built


def register_limit(mangled_name):
    linear = re.search(r"linear_kernelI.*?Li(\d)ELi(\d)ELi(\d)E", mangled_name)
    if linear:
        return LINEAR_REGISTER_LIMITS[int(linear[2])]
    return next(limit for name, limit in REGISTER_LIMITS.items() if f"{len(name)}{name}" in mangled_name)


def test_no_kernel_spills_or_exceeds_its_resources_on_any_target(objects):
    for source, (_, report) in objects.items():
        entries = [match.groupdict() for match in ENTRY.finditer(report)]
        assert {entry["target"] for entry in entries} >= set(csrc_compile.TARGETS), source
        for entry in entries:
            assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), entry
            assert int(entry["registers"]) <= register_limit(entry["name"]), entry
            assert int(entry["shared"] or 0) <= 48 * 1024, entry


@pytest.fixture(scope="module")
def machine_code(objects):
    """What cuobjdump lists of the object of a source, of one target or of all."""
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        triton = importlib.util.find_spec("triton")
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else Path()
        cuobjdump = str(bundled / "cuobjdump") if (bundled / "cuobjdump").exists() else None
    if cuobjdump is None:
        pytest.skip("cuobjdump not found")
    environment = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}

    def listing(source, *options):
        command = [cuobjdump, "-sass", *options, str(objects[source][0])]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    return listing


def test_kernels_use_wide_memory_access_permutation_and_tensor_cores(machine_code):
    expected = {
        "decode.cu": ("LDG.E.EF.128", "STG.E.128", "PRMT"),
        "decode_fold.cu": ("LDGSTS.E.BYPASS.128", "STG.E.128", "HMMA.1688.F32.TF32", "SHFL.IDX"),
        "passes_forward.cu": ("LDG.E.EF.128", "STG.E.128", "HMMA.16816.F32.BF16", "HMMA.1688.F32.BF16"),
        "passes_backward.cu": (
            "LDG.E.EF.128",
            "STG.E.128",
            "MOVM.16.MT88",
            "HMMA.16816.F32.BF16",
            "HMMA.1688.F32.BF16",
        ),
        "linear.cu": ("LDG.E.EF.64", "LDG.E.EF.128", "HMMA.16816.F32.BF16", "HMMA.16816.F32 "),
    }
    for source, instructions in expected.items():
        listing = machine_code(source, "-arch=sm_90")
        for instruction in instructions:
            assert instruction in listing, (source, instruction)
        assert not re.search(r"\b(LDL|STL)\b", listing), source


@pytest.mark.parametrize(
    ("source", "kernel", "load", "most_stores_of_single_elements"),
    [
        ("decode.cu", "decode_kernel", "LDG.E.EF.128", 1),
        ("decode_fold.cu", "decode_fold_kernel", "LDGSTS.E.BYPASS.128", 0),
    ],
)
def test_both_decodes_load_codes_and_store_in_16_bytes_on_every_target(
    machine_code, source, kernel, load, most_stores_of_single_elements
):
    functions = machine_code(source).split("Function : ")[1:]
    decodes = [text for text in functions if f"{len(kernel)}{kernel}" in text.split("\n", 1)[0]]
    assert len(decodes) >= 2 * len(csrc_compile.TARGETS)
    for text in decodes:
        stores = re.findall(r"\bSTG\.[A-Z0-9.]+", text)
        assert text.count(load) >= 2 and stores.count("STG.E.128") >= 4, text[:200]
        assert len(stores) - stores.count("STG.E.128") == stores.count("STG.E.U16"), stores
        assert stores.count("STG.E.U16") <= most_stores_of_single_elements, stores


LOAD_WITH_A_NEWER_OPERATION = """
import sys
from pathlib import Path
from sda_fast.ops import cuda_library
cuda_library.OPERATIONS = (*cuda_library.OPERATIONS, "newer")
print(cuda_library.load(Path(sys.argv[1])))
"""


# Of torch's stable ABI as 2.11 has it; torch exports more from version to version and takes nothing back.
STABLE_ABI = re.compile(
    r"aoti_torch_(?:abi_version|(?:create|delete)_device_guard|delete_(?:library|tensor)_object|new_tensor_handle)"
    r"|aoti_torch_(?:device_type|layout)_\w+|aoti_torch_dtype_(?!float8_e8m0fnu|float4)\w+"
    r"|aoti_torch_get_(?:current_cuda_stream|device_index|device_type|dim|dtype|numel|size|stride)"
    r"|aoti_torch_is_contiguous|aoti_torch_library_(?:def|init_def|init_impl)|torch_library_impl"
    r"|torch_(?:call_dispatcher|get_(?:const|mutable)_data_ptr|dtype_float8_e8m0fnu|dtype_float4_e2m1fn_x2)"
    r"|torch_(?:delete_list|list_push_back|new_list_reserve_size)"
)


def test_the_binding_wants_nothing_of_torch_that_the_oldest_one_lacks(compiled):
    binding, _ = compiled(csrc_compile.BINDING_SOURCE)
    wanted = subprocess.run(["nm", "-u", str(binding)], capture_output=True, text=True, check=True).stdout.split()
    of_torch = {name for name in wanted if name.startswith(("aoti_", "torch_"))}
    assert len(of_torch) > 30 and all(STABLE_ABI.fullmatch(name) for name in of_torch)


@pytest.mark.parametrize(("function", "since"), [("torch_get_const_data_ptr", 10), ("torch_tag_core", 12)])
def test_a_function_newer_than_the_oldest_torch_does_not_compile(function, since, tmp_path):
    source = tmp_path / "probe.cpp"
    source.write_text(f"#include <torch/csrc/stable/library.h>\nauto* used = &{function};\n")
    flags = [f"-DTORCH_TARGET_VERSION={csrc_compile.TORCH_TARGET_VERSION}", f"-I{csrc_compile.torch_folder()}/include"]
    assert flags[0] in csrc_compile.object_command(csrc_compile.BINDING_SOURCE, source)
    command = ["c++", "-std=c++17", "-fsyntax-only", str(source), flags[1]]
    done = subprocess.run([*command, flags[0]], capture_output=True, text=True)
    assert (done.returncode == 0) == (since <= 11), done.stderr
    assert since <= 11 or function in done.stderr


@pytest.fixture(scope="module")
def library(objects, compiled, tmp_path_factory):
    """The library, linked with the installed torch."""
    output = tmp_path_factory.mktemp("library") / "libsda_fast_cuda.so"
    binding, _ = compiled(csrc_compile.BINDING_SOURCE)
    kernels = [path for path, _ in objects.values()]
    subprocess.run(csrc_compile.link_command([*kernels, binding], output), check=True)
    return output


def test_the_binding_uses_nothing_but_the_stable_abi(compiled):
    binding, _ = compiled(csrc_compile.BINDING_SOURCE)
    symbols = subprocess.run(["nm", "-uC", str(binding)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(c10|at|torch)::", symbols), "libtorch's C++ ABI is used"


def test_the_library_loads_and_registers_operations_that_refuse_cpu_tensors(library):
    command = [sys.executable, str(ROOT / "csrc" / "load_in.py"), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for operation in (
        *("decode_4bit", "decode_fold_4bit", "linear_4bit", "moda_gates", "moda_gates_backward"),
        *("moda_project", "moda_expand", "moda_dy_pass", "moda_dx_pass"),
    ):
        assert f"sda_fast_cuda::{operation}(" in done.stdout
    assert "9 operations, each refuses tensors of a CPU" in done.stdout


def test_a_library_without_a_later_operation_is_refused_with_a_reason(library):
    command = [sys.executable, "-c", LOAD_WITH_A_NEWER_OPERATION, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "it was built from an earlier version and lacks newer\n", done.stderr
    assert "has to be built anew" in done.stderr
