"""Time and peak memory of one contrastive step of Qwen2.5-VL with MoDA, at once or in chunks.

    python bench/cached_run.py B CHUNK SECONDS

prints one line of JSON for the CPU, in a process of its own; CHUNK 0 is the direct step, the whole batch in one graph.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cmsa_run import resident_bytes, settled_bytes
from sda_fast import CMSALoss, MoDAConfig, adapt_model
from sda_fast.data.items import Catalogue, read_items
from sda_fast.data.synthetic import generate_catalogue
from sda_fast.jobs.batches import Batch, BatchMaker
from sda_fast.jobs.features import Tower
from sda_fast.jobs.train_step import ContrastiveStep, training_mode
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tiny import TinyConfig, build_model, build_processor
from sda_fast.timing import gpu_seconds, processor_seconds

MOST_ROUNDS, CHECKED_ITEMS, CHECKED_CHUNK = 10, 12, 4
# Of all gradients together in the Euclidean norm, between a step in chunks and the direct one.
ALLOWED_ERROR = {"cpu": 1e-4, "cuda": 2e-2}
IMAGE_SIDE = {"cpu": TinyConfig.image_side, "cuda": 252}


def small_model(catalogue: Catalogue) -> LVLM:
    """What `sda-fast tiny` builds, with random weights: Qwen2.5-VL's classes in float32."""
    processor = build_processor(catalogue, PromptConfig(), vocab_size=2048, image_side=IMAGE_SIDE["cpu"])
    model = build_model(processor.tokenizer, hidden_size=TinyConfig.hidden_size, num_layers=TinyConfig.num_layers)
    return LVLM(model.eval().requires_grad_(False), processor, family_of(model.config), "small")


def large_model(catalogue: Catalogue, layers: int) -> LVLM:
    """Qwen2.5-VL-7B from its configuration, the decoder's linear layers in NF4, everything else in bfloat16."""
    from catalogue_speed import full_model
    from decoder_layer import quantise_linears

    processor = build_processor(catalogue, PromptConfig(), vocab_size=2048, image_side=IMAGE_SIDE["cuda"])
    device = torch.device("cuda")
    model = full_model(processor.tokenizer, device, layers=layers).eval().requires_grad_(False)
    lvlm = LVLM(model, processor, family_of(model.config), "7B")
    quantise_linears(lvlm.language_model, device)
    return lvlm


def adapted(lvlm: LVLM) -> LVLM:
    """MoDA as published on the decoder, every lora_B with a value, so that all gradients count."""
    adapt_model(lvlm.model, MoDAConfig(r=8, num_experts=8, lora_alpha=32, lora_dropout=0.1))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lvlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lvlm


def measure(device: str, B: int, chunk: int, seconds: float, *, layers: int = 28) -> dict[str, Any]:
    """Check that chunks give the direct step's gradients, then measure one batch.

    Args:
        chunk: items a chunk; 0 for the direct step.
        layers: of the large model.

    Returns:
        model and error; and seconds (one per round), peak_bytes, tokens; or reason.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = generate_catalogue(Path(folder) / "catalogue", num_items=max(B, 64), num_users=10)
        catalogue = read_items(paths.items)
        lvlm = adapted(small_model(catalogue) if device == "cpu" else large_model(catalogue, layers))
        maker = BatchMaker(lvlm, PromptConfig(), ImageOptions(max_pixels=IMAGE_SIDE[device] ** 2))
        small, batch = (
            maker.make([catalogue[i] for i in range(items)], size)
            for items, size in ((CHECKED_ITEMS, CHECKED_CHUNK), (B, chunk or None))
        )
    loss = CMSALoss().to(device)
    step = ContrastiveStep(lvlm, loss, None, Tower(lvlm))
    parameters = [p for p in (*lvlm.model.parameters(), *loss.parameters()) if p.requires_grad]
    decoder = lvlm.language_model.config
    found: dict[str, Any] = {"model": f"width {decoder.hidden_size}, {decoder.num_hidden_layers} layers"}
    with training_mode(lvlm, gradient_checkpointing=device == "cuda"):
        found["error"] = error = chunking_error(step, small, parameters)
        if not error <= ALLOWED_ERROR[device]:
            return found | {"reason": f"not timed: its error is {error:.1e}, allowed are {ALLOWED_ERROR[device]:g}"}
        step.tower.complete(batch.images.chunks)
        return found | {"tokens": batch.num_tokens} | times_and_peak(lambda: step(batch), parameters, device, seconds)


def chunking_error(step: ContrastiveStep, batch: Batch, parameters: list[torch.nn.Parameter]) -> float:
    """Of the gradients in chunks, relative to the direct step's from the same random state."""
    gradients = []
    for chunk_size in (batch.chunk_size, None):
        torch.manual_seed(1)
        step(dataclasses.replace(batch, chunk_size=chunk_size))
        gradients.append(torch.cat([p.grad.double().flatten() for p in parameters]))
        clear(parameters)
    chunked, direct = gradients
    return float((chunked - direct).norm() / direct.norm())


def clear(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def times_and_peak(
    run: Callable[[], object], parameters: list[torch.nn.Parameter], device: str, seconds: float
) -> dict[str, Any]:
    """Seconds of the rounds, and the peak of memory in the first beyond the model and the batch."""
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else settled_bytes()
    clock = partial(gpu_seconds, launch_seconds=0.0) if on_gpu else processor_seconds
    times: list[float] = []
    started = time.perf_counter()
    while not times or (len(times) < MOST_ROUNDS and time.perf_counter() - started < seconds):
        times.append(clock(run))
        clear(parameters)
        if len(times) == 1:
            peak = (torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")) - before
    return {"seconds": times, "peak_bytes": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure("cpu", int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
