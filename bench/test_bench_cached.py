"""The cached contrastive step of a small encoder on a CPU: peak memory and time by batch and chunk size.

python -m pytest bench/test_bench_cached.py        # writes bench/results/cached-step-cpu.json
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
RESULTS = HERE / "results" / "cached-step-cpu.json"
CASES = [(128, 0), (128, 32), (512, 0), (512, 128), (512, 32), (1024, 32)]


@pytest.mark.parametrize(("items", "chunk"), CASES)
def test_step(benchmark, items: int, chunk: int) -> None:
    command = [sys.executable, "bench/cached_run.py", str(items), str(chunk)]

    def run() -> dict:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    result = benchmark.pedantic(run, rounds=1)
    result["command"] = f"OMP_NUM_THREADS={result['threads']} python {' '.join(command[1:])}"
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": []}
    kept = [r for r in report["results"] if (r["B"], r["chunk"]) != (items, chunk)]
    report = {
        "device": f"{platform.machine()} processor, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": "transformer encoder, 4 layers of width 128, 32 tokens an item, dropout 0.1, float32",
        "results": sorted([*kept, result], key=lambda r: (r["B"], r["chunk"])),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
