"""Time every MoDA kernel on a GPU against the bytes it has to move; a speed is printed only if its check passes.

    python bench/kernel_speed.py [--out results.json] [--quick]

Times are medians of repeated launches between device events, with the L2 cache cleared before each. The low-rank passes
of the CUDA library stand beside their Triton twins where it is built.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton

import check_kernels
from sda_fast.kernels import moda_gemm, moda_gemm_tma
from sda_fast.kernels.gates import gates_of_layers
from sda_fast.kernels.moda_backward import dy_pass_of_group, fuses_dy
from sda_fast.kernels.moda_forward import expand_group
from sda_fast.kernels.moda_gemm import gated_linear, input_gradient
from sda_fast.kernels.nf4 import decode_4bit
from sda_fast.kernels.nf4_linear import small_linear_4bit
from sda_fast.ops import cuda_library
from sda_fast.ops.passes import CUDA, TRITON, Passes

SCALING, DTYPE, EXPERTS, BLOCKSIZE = 4.0, torch.bfloat16, 8, 64


def median_milliseconds(launch: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(launch, warmup=20, rep=80, return_mode="median"))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, reads and writes counted."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_milliseconds(lambda: target.copy_(source)) * 1e-3)


def implementations(device: torch.device) -> dict[str, Passes]:
    """The passes to time, by what is added to their names."""
    return {"": TRITON} | ({", CUDA": CUDA} if cuda_library.is_available(device) else {})


def cases(M: int, K: int, N: int, R: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int, str]]:
    """name -> (launch, bytes that must be moved, the kernel whose check it needs, if any)."""
    x, dx = (torch.randn(M, K, device=device).to(DTYPE) for _ in range(2))
    y, dy = (torch.randn(M, N, device=device).to(DTYPE) for _ in range(2))
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.01, torch.randn(N, R, device=device) * 0.01
    h, dh = torch.randn(M, R, device=device), torch.randn(M, R, device=device)
    gates, ids = torch.rand(2, EXPERTS, device=device), torch.randint(0, 2, (M,), dtype=torch.int32, device=device)
    seed = torch.tensor([1], device=device)
    size, low_rank = x.element_size(), 4 * M * R
    # dx and y keep growing by tiny steps under repetition; their values do not matter to the time.
    timed = {}
    for suffix, passes in implementations(device).items():
        timed |= {
            f"project{suffix}": (
                lambda passes=passes: passes.project(x, lora_A),
                size * M * K + low_rank + lora_A.nbytes,
                f"project{suffix}",
            ),
            f"project, dropout{suffix}": (
                lambda passes=passes: passes.project(x, lora_A, dropout_p=0.1, seed=seed),
                size * M * K + low_rank + lora_A.nbytes,
                f"project{suffix}",
            ),
            f"expand{suffix}": (
                lambda passes=passes: passes.expand(h, lora_B, gates, ids, SCALING, out=y),
                size * M * N + low_rank + lora_B.nbytes,
                f"expand{suffix}",
            ),
            f"expand_add{suffix}": (
                lambda passes=passes: passes.expand_add(y, h, lora_B, gates, ids, SCALING),
                2 * size * M * N + low_rank + lora_B.nbytes,
                f"expand_add{suffix}",
            ),
            f"dy_pass{suffix}": (
                lambda passes=passes: passes.dy_pass(dy, h, lora_B, gates, ids, SCALING),
                size * M * N + 2 * low_rank + 2 * lora_B.nbytes,
                f"dy_pass{suffix}",
            ),
            f"dx_pass, dropout{suffix}": (
                lambda passes=passes: passes.dx_pass(x, dh, lora_A, dx, dropout_p=0.1, seed=seed),
                3 * size * M * K + low_rank + 2 * lora_A.nbytes,
                f"dx_pass{suffix}",
            ),
        }
    return timed


def gemm_cases(
    M: int, K: int, N: int, R: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], int, str]]:
    """The same for the GEMMs with the update in them, beside the library's; ", TMA" is what the copy engine feeds."""
    x, dy, weight = (torch.randn(*shape, device=device).to(DTYPE) for shape in ((M, K), (M, N), (N, K)))
    weight *= K**-0.5
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.01, torch.randn(N, R, device=device) * 0.01
    h, dh = torch.randn(M, R, device=device), torch.randn(M, R, device=device)
    gates, ids = torch.rand(2, EXPERTS, device=device), torch.randint(0, 2, (M,), device=device)
    dropout = {"dropout_p": 0.1, "seed": torch.tensor([1], device=device)}
    moved = x.element_size() * (M * K + N * K + M * N) + 4 * M * R
    configs = {"": moda_gemm.CONFIGS[2]} | ({", TMA": None} if moda_gemm_tma.serves(x, weight, dy, R) else {})
    found: dict[str, tuple[Callable[[], object], int, str]] = {
        "library x W^T": (lambda: torch.nn.functional.linear(x, weight), moved, ""),
        "library dy W": (lambda: dy @ weight, moved, ""),
    }
    for suffix, config in configs.items():
        found |= {
            f"gated_linear{suffix}": (
                lambda config=config: gated_linear(x, weight, None, h, lora_B, gates, ids, SCALING, config=config),
                moved,
                f"gated_linear{suffix}",
            ),
            f"input_gradient{suffix}": (
                lambda config=config: input_gradient(dy, weight, dh, lora_A, config=config),
                moved,
                f"input_gradient{suffix}",
            ),
            f"input_gradient, dropout{suffix}": (
                lambda config=config: input_gradient(dy, weight, dh, lora_A, config=config, **dropout),
                moved,
                f"input_gradient, dropout{suffix}",
            ),
        }
    return found


def group_cases(M: int, R: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int, str]]:
    """The same for q, k and v of Qwen2.5-VL-7B in one launch, and one by one."""
    widths, lines = (3584, 512, 512), torch.rand(1, EXPERTS, device=device)
    outs = [torch.randn(M, width, device=device).to(DTYPE) for width in widths]
    lora_B = [torch.randn(width, R, device=device) * 0.01 for width in widths]
    gates, h, nothing = [lines] * 3, torch.randn(M, 3 * R, device=device), [None] * 3
    parts = [h[:, place * R : (place + 1) * R] for place in range(3)]
    layers = list(zip(outs, parts, lora_B, gates, strict=True))
    embeddings, projs = ([torch.randn(count, 64, device=device) for _ in widths] for count in (2, EXPERTS))
    moved = sum(out.nbytes + matrix.nbytes for out, matrix in zip(outs, lora_B, strict=True))
    found = {
        "expand, q k v": (
            lambda: expand_group(h, lora_B, gates, None, SCALING, biases=nothing, outs=outs),
            moved + h.nbytes,
            "expand, group",
        ),
        "expand, one by one": (
            lambda: [TRITON.expand(part, B, gate, None, SCALING, out=out) for out, part, B, gate in layers],
            moved + h.nbytes,
            "expand",
        ),
        "gates, q k v": (
            lambda: gates_of_layers(embeddings, projs, 0, 1),
            sum(one.nbytes for one in (*embeddings, *projs)),
            "gates",
        ),
        "dy_pass, one by one": (
            lambda: [TRITON.dy_pass(dy, part, B, gate, None, SCALING) for dy, part, B, gate in layers],
            moved + 2 * h.nbytes,
            "dy_pass",
        ),
    }
    if fuses_dy(R):
        found["dy_pass, q k v"] = (
            lambda: dy_pass_of_group(outs, h, lora_B, gates, None, SCALING),
            moved + 2 * h.nbytes,
            "dy_pass, group",
        )
    return found


def four_bit_cases(K: int, N: int, R: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int, str]]:
    """The same for the 4-bit kernels."""
    data = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device)
    absmax, code = torch.rand(N * K // BLOCKSIZE, device=device), torch.linspace(-1, 1, 16, device=device)
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.01, torch.randn(N, R, device=device) * 0.01
    gates, out = torch.rand(EXPERTS, device=device), torch.empty(N, K, dtype=DTYPE, device=device)
    fold = {"lora_A": lora_A, "lora_B": lora_B, "gates": gates, "scaling": SCALING}
    packed = data.nbytes + absmax.nbytes
    small_cases = {}
    for M in (1, 16, 64):
        x = torch.randn(M, K, device=device).to(DTYPE)
        small_cases[f"small product, M={M}"] = (
            lambda x=x: small_linear_4bit(x, data, [absmax, code], N, BLOCKSIZE),
            packed + 2 * x.shape[0] * (N + K),
            "small_linear_4bit",
        )
    return {
        "decode": (
            lambda: decode_4bit(data, [absmax, code], (N, K), BLOCKSIZE, out=out),
            packed + out.nbytes,
            "decode_4bit",
        ),
        "decode, fold": (
            lambda: decode_4bit(data, [absmax, code], (N, K), BLOCKSIZE, out=out, **fold),
            packed + out.nbytes + lora_A.nbytes + lora_B.nbytes,
            "decode_4bit, fold",
        ),
        **small_cases,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="one shape and rank only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 0
    device = torch.device("cuda")
    torch.manual_seed(0)
    shape = check_kernels.SHAPES[0]
    ratios = check_kernels.moda_ratios(shape, DTYPE, device) | check_kernels.four_bit_ratios(shape, DTYPE, device)
    ratios |= check_kernels.group_ratios(shape, DTYPE, device) | check_kernels.gemm_ratios(shape, DTYPE, device)
    if moda_gemm_tma.has_copy_engine(device):
        ratios |= check_kernels.gemm_ratios(check_kernels.CUDA_SHAPES[2], DTYPE, device, by_copy_engine=True)
    lacking = cuda_library.reason_unavailable(device)
    if lacking is None:
        ratios |= check_kernels.moda_ratios(check_kernels.CUDA_SHAPES[-1], DTYPE, device, CUDA)
    else:
        print(f"without the CUDA library's passes: {lacking}")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'kernel':<28} {'M':>6} {'R':>4} {'microseconds':>13} {'TB/s':>6} {'of copy':>8}")
    rows = []
    for M, R in [(8192, 8)] if arguments.quick else [(8192, 8), (8192, 64), (512, 8), (32768, 8)]:
        K = N = 3584
        todo = cases(M, K, N, R, device) | group_cases(M, R, device) | gemm_cases(M, K, N, R, device)
        if M == 8192:
            todo |= four_bit_cases(K, N, R, device)
        for case, (launch, moved, checked_by) in todo.items():
            if checked_by and ratios[checked_by] > 1:
                print(f"{case:<28} {M:>6} {R:>4}   not timed: its check fails")
                continue
            seconds = median_milliseconds(launch) * 1e-3
            rows.append({"kernel": case, "M": M, "K": K, "N": N, "R": R, "seconds": seconds, "bytes": moved})
            rate = moved / seconds
            print(f"{case:<28} {M:>6} {R:>4} {seconds * 1e6:>13.1f} {rate / 1e12:>6.2f} {rate / bandwidth:>8.0%}")
    if arguments.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        document = {"device": name, "versions": versions, "copy_bytes_per_second": bandwidth, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(ratio > 1 for ratio in ratios.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
