"""Measure the cached contrastive step by batch and chunk size; `sda-fast bench --what cached` calls `run`.

On a CPU the small model, every case in a process of its own; on a GPU the 7B configuration in 4-bit with checkpointing.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cached_run
import cached_tables
from layers import device_name, results_file, versions
from measure import PERCENTILES
from sda_fast.atomic import write_json_atomic
from sda_fast.bench_command import chosen_device
from sda_fast.losses.chunking import free_memory, is_out_of_memory
from sda_fast.timing import percentile
from sda_fast.tune import TIMERS

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
# By device and whether the short table is wanted: batches, and chunk sizes with 0 for the direct step.
CASES = {
    ("cpu", True): ((32, 128), (0, 32, 8)),
    ("cpu", False): ((32, 128, 512, 1024), (0, 128, 32, 8)),
    ("cuda", True): ((32, 128), (0, 32, 8)),
    ("cuda", False): ((32, 128, 512, 2048), (0, 128, 32, 8)),
}
QUICK_LAYERS, LAYERS = 4, 28
SHARE_OF_FREE_MEMORY, LONGEST = 0.5, 120.0
Record = dict[str, Any]


def run(config: Any) -> str:
    """Measure, write the device's results file after every case, and return the table as text; see `BenchConfig`."""
    device = torch.device(chosen_device(config.device))
    path = results_file(config.output, "cached", device)
    document: Record = {
        "device": device_name(device),
        "kind": device.type,
        "versions": versions(),
        "command": config.invocation,
        "timer": TIMERS[device.type],
        "percentiles": list(PERCENTILES),
        "records": [],
    }
    batches, chunks = CASES[device.type, config.quick]
    todo = [(B, chunk) for B in config.items or batches for chunk in chunks if chunk < B]
    measure = in_a_process
    if device.type == "cuda":
        measure = partial(cached_run.measure, "cuda", layers=QUICK_LAYERS if config.quick else LAYERS)
    started = time.perf_counter()
    for B, chunk in tqdm(todo, unit="case", desc="cached", disable=None):
        logger.info("B=%d, chunks of %s", B, chunk or "all")
        record = {"B": B, "chunk": chunk}
        if time.perf_counter() - started > config.limit:
            record |= {"reason": "not measured: out of time"}
        else:
            record |= measured(partial(measure, B, chunk, config.seconds), record, document["records"], device)
        document["records"].append(record)
        write_json_atomic(path, document)
    return cached_tables.as_text(document)


def measured(measure: Any, case: Record, records: Sequence[Record], device: torch.device) -> Record:
    """The figures of one case, or the reason why there are none."""
    reason = reason_not_to_start(case, records, device)
    if reason:
        return {"reason": reason}
    try:
        found = measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = None
    if found is None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"reason": "not measured: out of memory"}
    if "reason" in found:
        return found
    times = found.pop("seconds")
    found["rounds"] = len(times)
    found["milliseconds"] = [round(1e3 * percentile(times, p), 2) for p in PERCENTILES]
    direct = next((r for r in records if (r["B"], r["chunk"]) == (case["B"], 0) and "milliseconds" in r), None)
    if direct:
        found["to_direct"] = round(found["milliseconds"][1] / direct["milliseconds"][1], 3)
        found["memory_to_direct"] = round(found["peak_bytes"] / direct["peak_bytes"], 4)
    return found


def in_a_process(B: int, chunk: int, seconds: float) -> Record:
    command = [sys.executable, str(HERE / "cached_run.py"), str(B), str(chunk), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    # the kernel ends a process that takes too much memory
    if done.returncode == -9:
        raise MemoryError("process ended by signal 9")
    raise RuntimeError(done.stderr.strip() or f"status {done.returncode}")


def reason_not_to_start(case: Record, records: Sequence[Record], device: torch.device) -> str:
    """Why a case would take too much memory or time, by a smaller batch in such chunks; "" if it would not."""
    smaller = [r for r in records if r["chunk"] == case["chunk"] and r["B"] < case["B"] and "milliseconds" in r]
    if not smaller:
        return ""
    nearest = max(smaller, key=lambda record: record["B"])
    times_larger = case["B"] / nearest["B"]
    if case["chunk"] == 0:
        needed, free = times_larger * nearest["peak_bytes"], SHARE_OF_FREE_MEMORY * free_memory(device)
        if needed > free:
            return f"not measured: would take about {needed / 1e9:.2g} GB, the limit here is {free / 1e9:.2g} GB"
    expected = 1e-3 * times_larger * nearest["milliseconds"][1]
    if expected > LONGEST:
        return f"not measured: one step would take about {expected:.0f} s, the limit is {LONGEST:.0f} s"
    return ""
