"""Fine-tune a 4-bit 7B model beside PEFT and the expert loop; `sda-fast bench --what finetune` calls `run`.

On a GPU Qwen2.5-VL-7B from its configuration with random weights, on a CPU a small one. The step is the library's own
(`ContrastiveStep`, `TrainingState`) with the published preset; the methods differ in the adapters alone.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import finetune_model
import finetune_plan
import finetune_tables
from finetune_methods import MAIN, VARIANTS, Variant
from finetune_run import World, clean, held_bytes, measure
from layers import device_name, results_file
from layers import versions as kernel_versions
from measure import PERCENTILES
from sda_fast.atomic import write_json_atomic
from sda_fast.bench_command import chosen_device
from sda_fast.jobs.fingerprint import versions
from sda_fast.losses.cached import is_out_of_memory

logger = logging.getLogger(__name__)

CPU_ITEMS, CPU_STEPS = 8, 4
TIMERS = {"cpu": "wall clock, threads: {}", "cuda": "wall clock, synchronised after every step"}
# Of the seconds given: the main run may take so many times as long as any other.
MAIN_TIMES = 3
Record = dict[str, Any]


def run(config: Any) -> str:
    """Measure, write the device's results file after every variant, and return the table as text; see `BenchConfig`."""
    device = torch.device(chosen_device(config.device))
    path = results_file(config.output, "finetune", device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        world, document = prepare(config, device, Path(folder))
        todo = chosen(config, device)
        for variant in tqdm(todo, unit="variant", desc="finetune", disable=None):
            logger.info("%s", variant.name)
            record = {"method": variant.name, "items": world.config.batch_size}
            if time.perf_counter() - started > config.limit:
                record |= {"reason": "not measured: out of time"}
            else:
                seconds = config.seconds * (MAIN_TIMES if variant.name == MAIN.name else 1)
                record |= measured(world, variant, seconds)
            document["records"].append(record)
            compare(document["records"])
            write_json_atomic(path, document)
        del world
        clean(device)
    if config.plan and time.perf_counter() - started < config.limit:
        finetune_plan.add_plans(document, path)
    else:
        logger.info("without plans; they are added by: python bench/finetune_plan.py %s", path)
    return finetune_tables.as_text(document)


def prepare(config: Any, device: torch.device, folder: Path) -> tuple[World, Record]:
    """Catalogue, model and the head of the results file."""
    items = config.items[0] if config.items else CPU_ITEMS if device.type == "cpu" else 32
    given = finetune_plan.settings(items)
    began = time.perf_counter()
    catalogue = finetune_model.catalogue_in(folder / "catalogue", device)
    processor = finetune_model.processor_for(catalogue, device)
    model_config = finetune_model.config_for(processor, device)
    catalogue_seconds, began = time.perf_counter() - began, time.perf_counter()
    lvlm = finetune_model.random_lvlm(model_config, processor, device)
    clean(device)
    decoder = lvlm.language_model.config
    document: Record = {
        "device": device_name(device),
        "kind": device.type,
        "memory": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "versions": versions() | kernel_versions(),
        "command": config.invocation,
        "timer": TIMERS[device.type].format(torch.get_num_threads()),
        "percentiles": list(PERCENTILES),
        "model": f"Qwen2.5-VL, width {decoder.hidden_size}, {decoder.num_hidden_layers} layers, NF4, random weights",
        "model_bytes": held_bytes(device),
        "attention": decoder._attn_implementation,
        "settings": given,
        "catalogue_items": len(catalogue),
        "seconds_to_prepare": {
            "catalogue and tokenizer": round(catalogue_seconds, 2),
            "model": round(time.perf_counter() - began, 2),
        },
        "records": [],
    }
    return World(lvlm, catalogue, finetune_plan.finetune_config(given), folder), document


def chosen(config: Any, device: torch.device) -> Sequence[Variant]:
    """The variants asked for; on a CPU fewer steps, and no autocast, which PEFT only sees on a GPU.

    Raises:
        ValueError: there is no method of that name.
    """
    names = [variant.name for variant in VARIANTS]
    unknown = sorted(set(config.methods) - set(names))
    if unknown:
        raise ValueError(f"methods must be among {', '.join(map(repr, names))}, got {', '.join(map(repr, unknown))}")
    wanted = [variant for variant in VARIANTS if not config.methods or variant.name in config.methods]
    if device.type == "cpu":
        changes = {"steps": config.steps or CPU_STEPS, "profiled": False}
        return [
            dataclasses.replace(variant, **changes, warm_ups=variant.warm_ups if variant.compiled else 1)
            for variant in wanted
            if not variant.autocast
        ]
    main_steps = config.steps or MAIN.steps
    return [dataclasses.replace(one, steps=main_steps) if one.name == MAIN.name else one for one in wanted]


def measured(world: World, variant: Variant, seconds: float) -> Record:
    """The figures of one variant, or the reason why there are none."""
    try:
        return measure(world, variant, seconds)
    # Whatever one method raises is reported, and the others go on.
    except Exception as error:
        logger.exception("%s failed", variant.name)
        if is_out_of_memory(error):
            return {"reason": "not measured: out of memory"}
        words = str(error).splitlines() or [""]
        return {"reason": f"failed: {type(error).__name__}: {words[0][:200]}"}
    finally:
        clean(world.device)


def compare(records: list[Record]) -> None:
    """Ratios of the newest record's step time and peak to the main one's."""
    main = next((one for one in records if one["method"] == MAIN.name and "milliseconds" in one), None)
    newest = records[-1]
    if main is None or "milliseconds" not in newest:
        return
    newest["time_to_moda"] = round(newest["milliseconds"][1] / main["milliseconds"][1], 3)
    if main.get("peak_bytes") and newest.get("peak_bytes"):
        newest["memory_to_moda"] = round(newest["peak_bytes"] / main["peak_bytes"], 3)
