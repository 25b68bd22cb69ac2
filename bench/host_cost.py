"""Time what the host does for one layer in evaluation on a GPU, and for decoder layers in training; it needs no GPU.

    python bench/host_cost.py [--other CHECKOUT] [--out bench/results --page docs/kernels.md]

With --other the same is measured of another checkout, in processes that take turns. What the launches themselves cost
on the device is not in it, nor is Triton's launcher in C and waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["SDA_FAST_TUNED"] = ""

import torch

import host_training
from pages import replace_between
from without_device import without_device

N, K, RANK, EXPERTS, MULTIPROCESSORS = 3584, 3584, 8, 8, 132
CALLS, ROUNDS = 400, 5
BEGIN, END = "<!-- host -->", "<!-- /host -->"
WEIGHT = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, Tensor? offset, "
    "int block_size, int nested_block_size"
)
OPERATIONS = (
    f"decode_4bit({WEIGHT}, Tensor(a!) out) -> ()",
    f"decode_fold_4bit({WEIGHT}, Tensor A, Tensor B, Tensor gates, float scaling, Tensor(a!) out) -> ()",
    f"linear_4bit(Tensor x, {WEIGHT}, Tensor? bias, Tensor? hidden, Tensor? B, Tensor? gates, float scaling, "
    "float multiplier, Tensor(a!) out, int splits) -> ()",
    "moda_gates(Tensor gate_embedding, Tensor gate_proj, int modality, Tensor(a!) out) -> ()",
)
# By name: rows, what is computed, and whether by the CUDA library.
WAYS = {
    "small product in Triton, M=1": (1, "small product", False),
    "small product by the library, M=1": (1, "small product", True),
    "fold in Triton, M=256": (256, "fold", False),
    "fold by the library, M=256": (256, "fold", True),
}


def replace_launches() -> None:
    """Kernels, the library's operations and the GEMM after a fold do nothing; the device seems to be a GPU's size."""
    from sda_fast.kernels import configs, moda_forward, nf4_linear
    from sda_fast.ops import cuda_library, moda_evaluate, moda_linear

    without_device()
    for module in (configs, moda_forward, nf4_linear):
        module.programs_wanted = lambda device: 2 * MULTIPROCESSORS  # type: ignore[attr-defined]
    library = torch.library.Library("sda_fast_cuda", "DEF")
    for schema in OPERATIONS:
        library.define(schema)
        library.impl(schema.split("(")[0], lambda *arguments: None, "CPU")
    replace_launches.library = library  # type: ignore[attr-defined]
    cuda_library.is_available = lambda device="cuda": True
    moda_linear.resolve_backend = lambda backend, x: "triton"  # type: ignore[attr-defined]
    made: dict[Any, torch.Tensor] = {}

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
        return made.setdefault((x.shape, weight.shape), x.new_empty(x.shape[0], weight.shape[0]))

    moda_evaluate.torch = Namespace(torch, nn=Namespace(torch.nn, functional=Namespace(None, linear=linear)))  # type: ignore[attr-defined]


class Namespace:
    """A module with some names replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def microseconds() -> dict[str, float]:
    """Median processor time of one call, by way."""
    from bitsandbytes.nn import Linear4bit

    from sda_fast import MoDALinear, modality
    from sda_fast.ops.fold_regimes import forced_evaluation

    torch.set_num_threads(1)
    replace_launches()
    base = Linear4bit(K, N, bias=False, compute_dtype=torch.float16, quant_type="nf4").to("cpu")
    layer = MoDALinear(base, r=RANK, num_experts=EXPERTS).eval()
    found = {}
    for name, (rows, what, by_library) in WAYS.items():
        # Half precision: the small product by the library asks for 16 bits, and bfloat16 has a way of its own on a CPU.
        x = torch.zeros(rows, K, dtype=torch.float16)
        with torch.no_grad(), modality("text"), forced_evaluation(what, by_library=by_library):
            for _ in range(20):
                layer(x)
            times = []
            for _ in range(CALLS):
                started = time.thread_time()
                layer(x)
                times.append(time.thread_time() - started)
        found[name] = 1e6 * median(times)
    return found


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "evaluation": microseconds,
    "training": host_training.microseconds,
}


def in_process(checkout: Path) -> dict[tuple[str, str], float]:
    """Microseconds by part and way."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    found = {}
    for part in PARTS:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found |= {(part, way): value for way, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--out", type=Path, help="a folder: write the times there, into the file of this processor")
    parser.add_argument("--page", type=Path, help="put the table into this page; needs --out")
    parser.add_argument("--worker", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(PARTS[arguments.worker]()))
        return
    checkouts = {"this": Path(__file__).resolve().parents[1]}
    if arguments.other:
        checkouts["other"] = arguments.other.resolve()
    rounds = [{name: in_process(path) for name, path in checkouts.items()} for _ in range(ROUNDS)]
    records = []
    for part, way in rounds[0]["this"]:
        times = [{name: found[name][part, way] for name in checkouts} for found in rounds]
        lowest = {name: round(min(one[name] for one in times), 1) for name in checkouts}
        record: dict[str, Any] = {"part": part, "way": way, "microseconds": lowest}
        if arguments.other:
            record["this / other"] = round(median(one["this"] / one["other"] for one in times), 3)
        records.append(record)
        print(record)
    if arguments.out:
        document = write(arguments.out, records, checkouts)
        if arguments.page:
            replace_between(arguments.page, BEGIN, END, table(document))


def table(document: dict[str, Any]) -> str:
    """The times as markdown, and where they are from."""
    lines = ["| what | us | us before | ratio |", "| --- | ---: | ---: | ---: |"]
    for record in document["records"]:
        before, ratio = record["microseconds"].get("other", "-"), record.get("this / other", "-")
        lines.append(f"| {record['part']}: {record['way']} | {record['microseconds']['this']} | {before} | {ratio} |")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    revisions = ", ".join(f"{name}: {revision}" for name, revision in document["revisions"].items())
    problem = "; ".join(f"{part}: {what}" for part, what in document["problem"].items())
    source = f"{document['device']}; {versions}; {problem}; {document['timer']}; revisions {revisions}"
    return "\n".join([*lines, "", f"`{document['command']}`: {source}."])


def write(out: Path, records: list[dict[str, Any]], checkouts: dict[str, Path]) -> dict[str, Any]:
    """The results file."""
    from layers import device_name, results_file, versions

    cpu = torch.device("cpu")
    revision = ["git", "rev-parse", "--short", "HEAD"]
    document = {
        "device": device_name(cpu),
        "versions": versions(),
        "command": "python bench/host_cost.py" + " --other CHECKOUT" * (len(checkouts) > 1),
        "revisions": {
            name: subprocess.run(revision, cwd=path, capture_output=True, text=True).stdout.strip()
            for name, path in checkouts.items()
        },
        "problem": {
            "evaluation": f"one layer, {K} to {N}, r = {RANK} in {EXPERTS} experts, nf4, nested",
            "training": "one decoder layer of seven linear layers, forward, recomputation and backward, dropout 0.1, "
            f"r = {RANK} in {EXPERTS} experts, nf4, nested",
        },
        "timer": f"processor time, one thread: median of {CALLS} calls or {host_training.STEPS} steps, the lowest of "
        f"{ROUNDS} processes that took turns; the ratio is the median of theirs; the device's work replaced by nothing",
        "records": records,
    }
    results_file(out, "host-cost", cpu).write_text(json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
