"""Time the MoDA kernels under many launch configurations on the GPU at hand, for the table in kernels/configs.py.

    python bench/search_configs.py [--kernels project dx_pass] [--ranks 8 64] [--out search.json] [--workers 12]

Candidates are compiled by several processes into Triton's cache first. Nothing is changed by itself: the table is
edited by hand from what this prints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

import sda_fast.kernels.moda_backward as backward
import sda_fast.kernels.moda_forward as forward
from kernel_speed import copy_bandwidth
from sda_fast.kernels.configs import CONFIGS, LaunchConfig, config_for, padded_rank
from sda_fast.timing import gpu_seconds, launch_seconds_of

M, K, N, EXPERTS, SCALING, DTYPE = 8192, 3584, 3584, 8, 4.0, torch.bfloat16
ROUNDS, DROPOUT = 15, 0.1
# By kernel: rows, columns, warps, stages.
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "project": ((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4)),
    "expand": ((32, 64, 128), (64, 128, 256), (4, 8), (1,)),
    "expand_add": ((32, 64, 128), (64, 128, 256), (4, 8), (1,)),
    "dy_pass": ((16, 32, 64), (128, 256, 512), (4, 8), (2, 3, 4)),
    "dx_pass": ((16, 32, 64), (64, 128, 256), (4, 8), (2, 3)),
    "dx_pass written": ((16, 32, 64), (64, 128, 256), (4, 8), (2, 3)),
}


def candidates_of(kernel: str, rank: int) -> Iterator[LaunchConfig]:
    """The frozen configuration first, then those whose tiles are not absurdly large or small."""
    name = kernel.removesuffix(" written")
    yield config_for("expand_add" if name == "expand" else name, DTYPE, rank)
    for rows, columns, warps, stages in product(*CANDIDATES[kernel]):
        if 1024 * warps <= rows * columns <= 4096 * warps and rows * columns * stages * 2 <= 200_000:
            yield LaunchConfig(rows, columns, warps, stages)


def launches(rank: int) -> dict[str, tuple[Callable[[LaunchConfig], object], int]]:
    """By kernel: how to launch it under a configuration, and the bytes it cannot but move."""
    device, size = torch.device("cuda"), DTYPE.itemsize
    torch.manual_seed(0)
    x, dx = (torch.randn(M, K, device=device).to(DTYPE) for _ in range(2))
    y, dy = (torch.randn(M, N, device=device).to(DTYPE) for _ in range(2))
    A, B = torch.randn(rank, K, device=device) * 0.01, torch.randn(N, rank, device=device) * 0.01
    h, dh = torch.randn(M, rank, device=device), torch.randn(M, rank, device=device)
    gates, ids = torch.rand(2, EXPERTS, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    update: Any = (h, B, gates, ids, SCALING)
    gate: Any = {"rows_per_sequence": M}
    drop: Any = {"dropout_p": DROPOUT, "seed": torch.tensor([1], device=device)}
    low_rank = 4 * M * rank
    return {
        "project": (lambda c: forward.project(x, A, config=c, **drop), size * M * K + low_rank + A.nbytes),
        "expand": (lambda c: forward.expand(*update, out=y, config=c, **gate), size * M * N + low_rank + B.nbytes),
        "expand_add": (lambda c: forward.expand_add(y, *update, config=c, **gate), 2 * size * M * N + low_rank),
        "dy_pass": (lambda c: backward.dy_pass(dy, *update, config=c, **gate), size * M * N + 2 * low_rank),
        "dx_pass": (lambda c: backward.dx_pass(x, dh, A, dx, config=c, **drop), 3 * size * M * K + low_rank),
        "dx_pass written": (
            lambda c: backward.dx_pass(x, dh, A, dx, adds=False, config=c, **drop),
            2 * size * M * K + low_rank,
        ),
    }


def compile_one(task: tuple[str, int, LaunchConfig]) -> str:
    """Launch once, so that the compiled kernel is in the cache; why it cannot be, "" if it can."""
    kernel, rank, config = task
    try:
        launches_of_process(rank)[kernel][0](config)
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return ""


_of_process: dict[int, dict[str, Any]] = {}


def launches_of_process(rank: int) -> dict[str, Any]:
    if rank not in _of_process:
        _of_process[rank] = launches(rank)
    return _of_process[rank]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--ranks", nargs="*", type=int, default=[8])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write all times here as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 0
    tasks = [
        (kernel, rank, config)
        for rank in arguments.ranks
        for kernel in arguments.kernels
        for config in dict.fromkeys(candidates_of(kernel, rank))
    ]
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        faults = dict(zip(tasks, pool.map(compile_one, tasks), strict=True))
    bandwidth = copy_bandwidth(torch.device("cuda"))
    rows = []
    for task in tasks:
        kernel, rank, config = task
        row: dict[str, Any] = {"kernel": kernel, "rank": rank, "config": astuple(config), "fault": faults[task]}
        if not faults[task]:
            launch, moved = launches_of_process(rank)[kernel]
            step = lambda launch=launch, config=config: launch(config)  # noqa: E731
            ahead = launch_seconds_of(step)
            seconds = median(gpu_seconds(step, ahead) for _ in range(ROUNDS))
            row |= {"microseconds": round(1e6 * seconds, 2), "of_copy": round(moved / seconds / bandwidth, 3)}
        rows.append(row)
    for kernel, rank in dict.fromkeys((row["kernel"], row["rank"]) for row in rows):
        timed = [r for r in rows if (r["kernel"], r["rank"]) == (kernel, rank) and "microseconds" in r]
        frozen = timed[0]
        print(f"{kernel} R={rank}, padded {padded_rank(rank)}; frozen {frozen['config']} {frozen['microseconds']} us")
        for row in sorted(timed, key=lambda row: row["microseconds"])[:4]:
            print(f"    {row['config']} {row['microseconds']:.1f} us, {row['of_copy']:.0%} of copy bandwidth")
    if arguments.out:
        document = {
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "command": " ".join(["python", *sys.argv]),
            "problem": {"M": M, "K": K, "N": N, "dropout": DROPOUT, "dtype": "bfloat16"},
            "copy_bytes_per_second": bandwidth,
            "table": {str(key): astuple(config) for key, config in CONFIGS.items() if key[1] == 2},
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
