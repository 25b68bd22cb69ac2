"""Measure the contrastive losses, ours beside PyTorch's usual ways; `sda-fast bench --what cmsa` calls `run`.

Per case every method is checked, then timed with its peak memory; on a CPU each in a process of its own. What is
expected to need too much time or memory is not started and has the reason in place of figures.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import cmsa_run
import cmsa_tables
from cmsa_cases import METHODS, OURS, PLAIN, Case, cases
from layers import device_name, results_file, versions
from measure import PERCENTILES
from sda_fast.atomic import write_json_atomic
from sda_fast.bench_command import chosen_device
from sda_fast.losses.chunking import free_memory, is_out_of_memory
from sda_fast.planning.cards import card_of_device
from sda_fast.planning.loss import count_loss
from sda_fast.timing import percentile
from sda_fast.tune import TIMERS

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
LONGEST = {"cpu": 300.0, "cuda": 20.0}
SHARE_OF_FREE_MEMORY = 0.5
SAME_ANSWER = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
KEY = ("loss", "method", "B", "D", "dtype")
Record = dict[str, Any]


def run(config: Any) -> str:
    """Measure, write the device's results file after every case, and return the table as text; see `BenchConfig`.

    Records that the file has from the same device and versions stay in it. Those with figures of as many seconds are
    not measured again, unless `config.anew`.
    """
    device = torch.device(chosen_device(config.device))
    path = results_file(config.output, "cmsa", device)
    document = begun(path, device)
    todo = [
        (case, method)
        for case in cases(device.type, quick=config.quick, items=config.items, dimensions=config.dimensions)
        for method in METHODS[case.loss]
        if not config.methods or method in config.methods
    ]
    if not todo:
        raise ValueError(f"no method {', '.join(config.methods)}; there are {', '.join(all_methods())}")
    started = time.perf_counter()
    for case, method in tqdm(todo, unit="case", desc="cmsa", disable=None):
        logger.info("%s: %s", case, method)
        record = described(case, method) | {"command": config.invocation, "timed_for": config.seconds}
        if not config.anew and any(has_figures_of(record, old) for old in document["records"]):
            continue
        others = without(record, document["records"])
        if time.perf_counter() - started <= config.limit:
            record |= measured(case, method, device, config.seconds, document["records"])
        elif len(others) < len(document["records"]):
            continue
        else:
            reason = reason_not_to_start(case, method, device, others)
            record["reason"] = reason or "not measured: the time allowed for the run was over"
        document["records"] = with_ratios([*others, record])
        write_json_atomic(path, document)
    return cmsa_tables.as_text(document)


def begun(path: Path, device: torch.device) -> Record:
    """The results file's document, with its records if they were made on the same device and versions."""
    document = {
        "device": device_name(device),
        "kind": device.type,
        "versions": versions(),
        "timer": TIMERS[device.type],
        "percentiles": list(PERCENTILES),
    }
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(old.get(name) == value for name, value in document.items())
    return document | {"records": old["records"] if same else []}


def all_methods() -> list[str]:
    return list(dict.fromkeys(method for of_loss in METHODS.values() for method in of_loss))


def described(case: Case, method: str) -> Record:
    dtype = str(case.dtype).removeprefix("torch.")
    return {"loss": case.loss, "method": method, "B": case.B, "D": case.D, "dtype": dtype}


def without(record: Record, records: Sequence[Record]) -> list[Record]:
    return [other for other in records if not is_same_case(record, other)]


def is_same_case(record: Record, other: Record) -> bool:
    return all(other[name] == record[name] for name in KEY)


def has_figures_of(record: Record, old: Record) -> bool:
    """Whether `old` has the figures that `record` is to get."""
    return is_same_case(record, old) and old.get("timed_for") == record["timed_for"] and "milliseconds" in old


def measured(case: Case, method: str, device: torch.device, seconds: float, records: Sequence[Record]) -> Record:
    """The figures of one method on one case, or the reason why there are none."""
    reason = reason_not_to_start(case, method, device, records)
    if reason:
        return {"reason": reason}
    try:
        if device.type == "cuda":
            make = METHODS[case.loss][method].make
            found = cmsa_run.measure(case.loss, make, case.B, case.D, case.dtype, "cuda", seconds)
        else:
            found = in_a_process(case, method, seconds)
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if is_out_of_memory(error):
            return {"reason": "not measured: out of memory"}
        # A baseline that breaks on this machine is reported; ours must not break.
        if method == OURS:
            raise
        said = str(error).splitlines() or [""]
        return {"reason": f"failed: {type(error).__name__}: {said[-1][:120]}"}
    if "reason" in found:
        return found
    fault = disagreement(case, found["digest"], records)
    if fault:
        return {"error": found["error"], "reason": fault}
    if device.type == "cuda" and method == OURS:
        found |= expected(case, device)
    times = found.pop("seconds")
    floor = case.floor_operations() / found["rate"]
    found["rounds"] = len(times)
    found["milliseconds"] = [round(1e3 * percentile(times, p), 4) for p in PERCENTILES]
    return found | {"floor_milliseconds": round(1e3 * floor, 4), "to_floor": round(median(times) / floor, 3)}


def expected(case: Case, device: torch.device) -> Record:
    """What the planner counts for our own loss on this card, if it knows the card."""
    properties = torch.cuda.get_device_properties(device)
    try:
        card = card_of_device(device_name(device), properties.total_memory)
    except ValueError:
        return {}
    count = count_loss(case.B, case.D, case.dtype, card, METHODS[case.loss][OURS].make())
    return {"expected_bytes": count.peak_bytes}


def in_a_process(case: Case, method: str, seconds: float) -> Record:
    command = [sys.executable, str(HERE / "cmsa_run.py"), case.loss, method, str(case.B), str(case.D), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    # the kernel ends a process that takes too much memory
    if done.returncode == -9:
        raise MemoryError(f"process ended by signal {-done.returncode}")
    raise RuntimeError(done.stderr.strip() or f"status {done.returncode}")


def reason_not_to_start(case: Case, method: str, device: torch.device, records: Sequence[Record]) -> str:
    """Why a measurement would take too much memory or time, as far as can be told; "" if it would not."""
    needed, free = case.expected_bytes(method), SHARE_OF_FREE_MEMORY * free_memory(device)
    if needed > free:
        return f"not measured: would take about {needed / 1e9:.2g} GB, the limit here is {free / 1e9:.2g} GB"
    smaller = [
        record
        for record in records
        if "milliseconds" in record
        and (record["loss"], record["method"], record["D"]) == (case.loss, method, case.D)
        and record["B"] < case.B
    ]
    if smaller:
        nearest = max(smaller, key=lambda record: record["B"])
        expected = 1e-3 * nearest["milliseconds"][1] * (case.B / nearest["B"]) ** 2
        if expected > LONGEST[device.type]:
            return (
                f"not measured: one step would take about {expected:.0f} s, the limit is {LONGEST[device.type]:.0f} s"
            )
    return ""


def disagreement(case: Case, digest: Sequence[float], records: Sequence[Record]) -> str:
    """What differs from the answer of whoever was measured first on this case; "" if nothing does."""
    first = next(
        (r for r in records if "digest" in r and (r["loss"], r["B"], r["D"]) == (case.loss, case.B, case.D)), None
    )
    if first is None:
        return ""
    names = ("loss", "gradient of the image vectors", "gradient of the text vectors")
    for name, mine, other in zip(names, digest, first["digest"], strict=True):
        if not abs(mine - other) <= SAME_ANSWER[case.dtype] * abs(other):
            return f"not timed: its {name} is {mine:.6g} where {first['method']} has {other:.6g}"
    return ""


def with_ratios(records: list[Record]) -> list[Record]:
    """Records in order, each with its time and memory over those of the loss's plain way where that was measured."""
    plain = {(r["loss"], r["B"], r["D"]): r for r in records if r["method"] == PLAIN[r["loss"]] and "milliseconds" in r}
    for record in records:
        other = plain.get((record["loss"], record["B"], record["D"]))
        if other and "milliseconds" in record:
            record["to_plain"] = round(record["milliseconds"][1] / other["milliseconds"][1], 3)
            record["memory_to_plain"] = round(record["peak_bytes"] / max(1, other["peak_bytes"]), 4)
    order = {name: number for number, name in enumerate(all_methods())}
    return sorted(records, key=lambda r: (r["D"], r["loss"], r["B"], order[r["method"]]))
