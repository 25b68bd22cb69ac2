"""Time and peak memory of CMSA and InfoNCE on a CPU, ours beside PyTorch's usual ways; writes results/cmsa-cpu.json.

    python -m pytest bench/test_bench_cmsa.py                     # B = 1024 and 4096, D = 256
    CMSA_BENCH_ITEMS=16384 CMSA_BENCH_METHODS="sda_fast cmsa,plain cmsa" python -m pytest bench/test_bench_cmsa.py
    CMSA_BENCH_DIMENSIONS=768 python -m pytest bench/test_bench_cmsa.py

Each method runs in a process of its own, since a process's peak memory cannot be taken back. A result replaces the one
of the same method and size in the file. On a shared machine compare `cpu_seconds` with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cmsa-cpu.json"
ITEMS = [int(items) for items in os.environ.get("CMSA_BENCH_ITEMS", "1024,4096").split(",")]
METHODS = os.environ.get(
    "CMSA_BENCH_METHODS",
    "plain cmsa,sda_fast cmsa,checkpointed cmsa,compiled cmsa,plain infonce,sda_fast infonce",
).split(",")
DIMENSIONS = int(os.environ.get("CMSA_BENCH_DIMENSIONS", "256"))
REPEATS = int(os.environ.get("CMSA_BENCH_REPEATS", "3"))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def record(result: dict) -> list[dict]:
    """Put one result into the results file and return all that are there."""
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": []}
    kept = [
        r for r in report["results"] if (r["method"], r["B"], r["D"]) != tuple(result[k] for k in ("method", "B", "D"))
    ]
    report = {
        "device": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": "float32",
        "results": sorted([*kept, result], key=lambda r: (r["D"], r["B"], r["method"])),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return report["results"]


@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize("method", METHODS)
def test_loss(benchmark, method: str, items: int) -> None:
    command = [sys.executable, "bench/cmsa_run.py", method, str(items), str(DIMENSIONS), str(REPEATS)]

    def run() -> dict:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    result = benchmark.pedantic(run, rounds=1)
    result["command"] = f"OMP_NUM_THREADS={result['threads']} python " + " ".join(
        f"'{part}'" if " " in part else part for part in command[1:]
    )
    benchmark.extra_info.update(result)
    plain = [
        r
        for r in record(result)
        if r["method"] == "plain " + method.split()[-1] and (r["B"], r["D"]) == (items, DIMENSIONS)
    ]
    if plain:
        assert result["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4), "a wrong answer has no speed"
