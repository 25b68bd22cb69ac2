"""Measure 4-bit products, decoding, a decoder layer and a catalogue's embedding; `sda-fast bench --what nf4`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import nf4_tables
from catalogue_speed import measure_catalogue
from contest import Record
from decoder_layer import layer_cases, measure_layer
from layers import device_name, results_file, versions
from measure import PERCENTILES
from nf4_products import LAYERS, copy_bandwidth, measure_decode, measure_product, product_cases
from sda_fast.atomic import write_json_atomic
from sda_fast.bench_command import chosen_device
from sda_fast.ops import cuda_library
from sda_fast.timing import one_thread_on_a_cpu
from sda_fast.tune import TIMERS

logger = logging.getLogger(__name__)


def run(config: Any) -> str:
    """Measure, write the device's results file after every case, and return the tables as text; see `BenchConfig`."""
    device = torch.device(chosen_device(config.device))
    path = results_file(config.output, "nf4", device)
    library = cuda_library.reason_unavailable(device)
    document = {
        "device": device_name(device),
        "kind": device.type,
        "versions": versions(),
        "command": config.invocation,
        "timer": TIMERS[device.type],
        "percentiles": list(PERCENTILES),
        "cuda_library": "used" if library is None else f"not used: {library}",
        "records": [],
    }
    started = time.perf_counter()
    with one_thread_on_a_cpu(device):
        document["copy_bytes_per_second"] = bandwidth = copy_bandwidth(device)
        todo = list(measurements(config, device, bandwidth))
        for part, name, measure in tqdm(todo, unit="case", desc="nf4", disable=None):
            if time.perf_counter() - started > config.limit:
                records = [{"part": part, "case": name, "method": "all", "reason": "not measured, out of time"}]
            else:
                logger.info("%s: %s", part, name)
                records = measured(part, name, measure)
            document["records"] += records
            write_json_atomic(path, document)
    return nf4_tables.as_text(document)


def measured(part: str, name: str, measure: Any) -> list[Record]:
    """The records of one case, or why there are none."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        reason = f"not measured, out of memory: {str(error).splitlines()[0][:120]}"
        return [{"part": part, "case": name, "method": "all", "reason": reason}]


def measurements(config: Any, device: torch.device, bandwidth: float) -> Iterator[tuple[str, str, Any]]:
    """Every case: its part, its name, and what measures it; products last."""
    seconds = config.seconds
    for name in LAYERS:
        if device.type == "cuda" or not config.quick or name in ("q, o", "k, v"):
            yield "decode", name, partial(measure_decode, name, device, seconds, bandwidth)
    yield "embedding", "a catalogue", partial(measure_catalogue, device, 2 * seconds, quick=config.quick)
    for size, sequences, tokens in layer_cases(device, quick=config.quick):
        name = f"{size}, {sequences} x {tokens} tokens"
        yield "decoder layer", name, partial(measure_layer, size, sequences, tokens, device, seconds)
    cases = product_cases(device, quick=config.quick)
    # Few rows of all layers first: what the time runs out for is then the least of it.
    for name, rows in sorted(cases, key=lambda case: case[1]):
        yield "product", f"{name}, M={rows}", partial(measure_product, name, rows, device, seconds)
