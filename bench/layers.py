"""Measure one adapted layer, ours beside the frozen layer and every other way, over the table in `cases`.

`sda-fast bench` calls `run`. Per case and method: check first (`check_layers`), then times of all methods in turns
(`measure`), peak memory and bytes kept. What fails its check, or cannot run, has a reason in place of figures.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tables
from baselines.moda_layers import COMPILED, FROZEN, METHODS, OURS, PEFT, Contestant
from cases import Case, cases
from check_layers import Checker, build
from measure import PERCENTILES, bytes_kept, peak_bytes
from sda_fast.atomic import write_json_atomic
from sda_fast.bench_command import chosen_device
from sda_fast.timing import Step, launch_seconds_of, one_thread_on_a_cpu, percentile, ratio, time_in_turns
from sda_fast.tune import TIMERS

logger = logging.getLogger(__name__)

MODES = ("forward", "forward + backward")
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "torchao", "unsloth")
FIRST_ROUNDS = 30
OUT_OF_TIME = "not measured, out of time"
Record = dict[str, Any]


def run(config: Any) -> str:
    """Measure, write the device's results file after every case, and return the table as text; see `BenchConfig`.

    Cases that the file has from the same device, versions and settings are not measured again, unless `config.anew`.
    """
    device = torch.device(chosen_device(config.device))
    four_bit = importlib.util.find_spec("bitsandbytes") is not None
    table = cases(device.type, quick=config.quick, layers=config.layers, four_bit=four_bit)
    path = results_file(config.output, "moda", device)
    document = {
        "device": device_name(device),
        "kind": device.type,
        "versions": versions(),
        "command": config.invocation,
        "timer": TIMERS[device.type],
        "percentiles": list(PERCENTILES),
        "settings": {name: getattr(config, name) for name in ("seconds", "compile_cases")}
        | {"methods": list(config.methods)},
        "not_run": reasons_for_all(table, config.methods),
        "records": [],
    }
    if not config.anew:
        document["records"] = kept_records(path, document)
    there = {record["case"] for record in document["records"]}
    started = time.perf_counter()
    with one_thread_on_a_cpu(device):
        for number, entry in enumerate(table, start=1):
            if str(entry) in there:
                continue
            if time.perf_counter() - started > config.limit:
                records = [described(entry) | {"method": OURS, "reason": OUT_OF_TIME}]
            else:
                logger.info("case %d of %d: %s", number, len(table), entry)
                compiles = config.compile_cases is None or number <= config.compile_cases
                records = measure_case(entry, config.methods, config.seconds, compiles=compiles)
            document["records"] += records
            write_json_atomic(path, document)
    return tables.as_text(document)


def kept_records(path: Path, document: Record) -> list[Record]:
    """What the file has of the measured cases, if device, versions and settings are the document's."""
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    if any(old.get(name) != document[name] for name in ("device", "versions", "settings")):
        return []
    return [record for record in old["records"] if record.get("reason") != OUT_OF_TIME]


def measure_case(
    case: Case, methods: Sequence[str] = (), seconds: float = 4.0, *, compiles: bool = True
) -> list[Record]:
    """The records of one case: one per mode and method, or one with a reason.

    Args:
        methods: names in `METHODS`; all if empty.
        seconds: roughly how long each mode is timed for.
        compiles: whether what needs torch.compile takes part.
    """
    settings, device = case.settings, torch.device(case.settings.device)
    torch.compiler.reset()
    x, dy = inputs_of(case)
    base_layer = settings.base_layer()
    checker = Checker(case, base_layer, x, dy)
    contestants: dict[str, Contestant] = {}
    errors: dict[str, float] = {}
    records = []
    for name, method in METHODS.items():
        if methods and name not in methods:
            continue
        reason = method.reason_not_to(settings)
        if name == COMPILED and not compiles:
            reason = "not compiled for this case"
        if reason is None:
            try:
                verdict = checker.judge(name)
            except Exception as error:
                # A baseline that breaks on this machine is reported; ours must not break.
                if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            else:
                errors[name] = verdict.error
                reason = f"not timed: {verdict.fault}" if verdict.fault else None
        if reason is None:
            contestants[name] = build(method, settings, base_layer)
        else:
            records.append(described(case) | {"method": name, "reason": reason})
    del checker
    for mode in MODES:
        steps = {name: step_of(contestant.layer, x, dy, mode) for name, contestant in contestants.items()}
        times = time_in_turns(steps, device, rounds=FIRST_ROUNDS, seconds=seconds)
        for name, values in times.items():
            record = described(case) | {"mode": mode, "method": name, "error": errors[name], "rounds": len(values)}
            record["milliseconds"] = [round(1e3 * percentile(values, p), 4) for p in PERCENTILES]
            for key, other in (("to_frozen", FROZEN), ("to_peft", PEFT)):
                record[key] = round(ratio(values, times[other]), 3) if other in times else None
            if device.type == "cuda":
                record["launch_milliseconds"] = round(1e3 * min(launch_seconds_of(steps[name]) for _ in range(3)), 4)
            record["peak_bytes"] = peak_bytes(steps[name], device)
            if mode != "forward":
                record["bytes_kept_per_x"] = round(bytes_kept(contestants[name].layer, x) / x.nbytes, 3)
            records.append(record)
    return records


def inputs_of(case: Case) -> tuple[Tensor, Tensor]:
    """x, which requires its gradient, and dy."""
    settings, generator = case.settings, torch.Generator().manual_seed(2)
    x, dy = (
        torch.randn(case.rows, features, generator=generator).to(settings.device, settings.dtype)
        for features in (settings.in_features, settings.out_features)
    )
    return x.requires_grad_(), dy


def step_of(layer: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Step:
    """One step of a mode; dropout is on in both."""

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def forward_and_backward() -> None:
        layer(x).backward(dy)
        # Afterwards, so that every step allocates its gradients and the peak counts them.
        x.grad = None
        layer.zero_grad()

    return forward if mode == "forward" else forward_and_backward


def described(case: Case) -> Record:
    """A case as the results file has it."""
    s = case.settings
    return {
        "case": str(case),
        "layer": case.layer,
        "M": case.rows,
        "K": s.in_features,
        "N": s.out_features,
        "E": s.num_experts,
        "r": s.r,
        "dropout": s.dropout,
        "dtype": str(s.dtype).removeprefix("torch."),
        "weight": s.base,
    }


def reasons_for_all(table: Sequence[Case], methods: Sequence[str]) -> dict[str, str]:
    """Methods that no case can run, with the reason.

    Raises:
        ValueError: a method is unknown.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(map(repr, METHODS))}, got {', '.join(map(repr, unknown))}")
    reasons = {}
    for name, method in METHODS.items():
        of_cases = [method.reason_not_to(case.settings) for case in table]
        if methods and name not in methods:
            reasons[name] = "not asked for"
        elif all(of_cases):
            reasons[name] = str(of_cases[0])
    return reasons


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_file(folder: Path, what: str, device: torch.device) -> Path:
    """Where a benchmark's results on a device go: every card and every processor has a file of its own."""
    return folder / f"{what}-{slug(device_name(device))}.json"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    return found
