"""Steps of the library's own fine-tuning by one method: time, peak memory, tokens and kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from catalogue_speed import sharing_copy
from cmsa_run import resident_bytes, settled_bytes
from finetune_kernels import kernel_times
from finetune_methods import Variant
from measure import PERCENTILES
from sda_fast.data.items import Catalogue
from sda_fast.jobs.batches import Batch, BatchMaker, Prefetcher
from sda_fast.jobs.features import Tower
from sda_fast.jobs.sampler import BatchOrder
from sda_fast.jobs.train_config import FinetuneConfig
from sda_fast.jobs.train_state import TrainingState, state_of
from sda_fast.jobs.train_step import ContrastiveStep, training_mode
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.packing import packed_modalities
from sda_fast.lvlm.tower_cache import TowerCache
from sda_fast.moda.compiling import compiled_layers
from sda_fast.ops.quantized import workspaces
from sda_fast.timing import percentile

logger = logging.getLogger(__name__)

LEAST_STEPS, CACHED_AT_A_TIME = 2, 16
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class World:
    """What all variants share: the frozen model, the catalogue, the published settings, and a folder for the cache."""

    lvlm: LVLM
    catalogue: Catalogue
    config: FinetuneConfig
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.lvlm.device

    def config_of(self, variant: Variant) -> FinetuneConfig:
        return dataclasses.replace(
            self.config, chunk_size=variant.chunk_size, gradient_checkpointing=variant.gradient_checkpointing
        )


class Steps:
    """A run of fine-tuning that is made step by step, as `sda_fast.finetune` makes it."""

    def __init__(self, world: World, variant: Variant, last_step: int) -> None:
        self.config = config = world.config_of(variant)
        self.variant, self.device = variant, world.device
        lvlm = sharing_copy(world.lvlm)
        variant.adapt(lvlm, config)
        self.state: TrainingState = state_of(config, lvlm, Accelerator(cpu=self.device.type == "cpu"))
        options = ImageOptions(config.min_pixels, config.max_pixels, config.seed)
        cache = TowerCache(lvlm, world.folder / "tower", options) if variant.tower_cached else None
        packs = packed_modalities(config.packing, lvlm)
        maker = BatchMaker(lvlm, config.prompts(), options, config.length_bucketing, packs, cache)
        if cache is not None:
            fill(cache, maker, world.catalogue)
        order = BatchOrder(len(world.catalogue), config.batch_size, config.seed)

        def make(step: int, chunk_size: int | None) -> Batch:
            return maker.make([world.catalogue[place] for place in order.batch(step)], chunk_size)

        self.prefetcher = Prefetcher(make, last_step=last_step, enabled=config.prefetch)
        tower = Tower(lvlm, cache, group_size=config.tower_batch)
        self.step = ContrastiveStep(lvlm, self.state.loss, config.loss_width(lvlm), tower)

    def __call__(self) -> tuple[Batch, float]:
        """One step; its batch and its loss.

        Raises:
            FloatingPointError: loss or gradient are not finite.
        """
        state, config = self.state, self.config
        batch = self.prefetcher.get(state.step, state.chunk_size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.autocast):
            loss = float(self.step(batch))
        norm = state.gradient_norm(config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {state.step + 1}: loss {loss}, gradient norm {norm}")
        state.update(config.learning_rate)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return batch, loss


def fill(cache: TowerCache, maker: BatchMaker, catalogue: Catalogue) -> None:
    """Put all pictures of the catalogue through the tower."""
    tower = Tower(maker.lvlm, cache, group_size=CACHED_AT_A_TIME)
    for first in range(0, len(catalogue), CACHED_AT_A_TIME):
        tower.complete([maker.image_chunk(catalogue.items[first : first + CACHED_AT_A_TIME])])
    cache.flush()


def measure(world: World, variant: Variant, seconds: float) -> Record:
    """Run a variant's steps, none after so many seconds once LEAST_STEPS are timed.

    Returns:
        milliseconds (percentiles of PERCENTILES), steps, losses, tokens, slots, rates, peak and held bytes, peak_step,
        shapes of that step's longest chunks, and kernels where they were to be taken.
    """
    clean(world.device)
    set_seed(world.config.seed)
    began = time.perf_counter()
    held = {"model": held_bytes(world.device)}
    steps = Steps(world, variant, variant.warm_ups + variant.steps + variant.profiled - 1)
    found: Record = {"seconds_to_adapt": round(time.perf_counter() - began, 2)}
    times, losses, peaks, batches = [], [], [], []
    checkpointing = steps.config.gradient_checkpointing
    try:
        lvlm = steps.state.lvlm
        compiled = compiled_layers(lvlm.language_model) if variant.compiled else contextlib.nullcontext()
        with training_mode(lvlm, gradient_checkpointing=checkpointing), compiled:
            for number in range(variant.warm_ups + variant.steps):
                late = time.perf_counter() - began > seconds
                if late and number >= variant.warm_ups + LEAST_STEPS:
                    break
                with peak_of(world.device) as peak:
                    started = time.perf_counter()
                    batch, loss = steps()
                    times.append(time.perf_counter() - started)
                losses.append(loss)
                peaks.append(peak)
                batches.append(described(batch))
                if number == 0:
                    held["between steps"] = held_bytes(world.device)
            if variant.profiled:
                found["kernels"] = kernels_or_reason(steps, world.device)
    finally:
        steps.prefetcher.close()
    return found | summary(variant, times, losses, peaks, batches, steps.config.batch_size) | {"held_bytes": held}


def kernels_or_reason(steps: Steps, device: torch.device) -> Record:
    """`kernel_times`; what has been timed is not lost where the profiler does not work."""
    try:
        return kernel_times(steps, device)
    except Exception as error:
        logger.exception("no times of kernels")
        return {"reason": f"no times of kernels: {type(error).__name__}"}


def described(batch: Batch) -> Record:
    """Sizes of a batch, and the shapes of its longest chunks."""
    sides = {"image": batch.images, "text": batch.texts}
    return {
        "tokens": batch.num_tokens,
        "slots": batch.num_slots,
        "shapes": {name: list(longest(side.chunks).tensors["input_ids"].shape) for name, side in sides.items()},
    }


def longest(chunks: list[Any]) -> Any:
    """The chunk that takes the most memory; the first of equal ones."""
    return max(chunks, key=lambda chunk: chunk.num_slots)


def summary(
    variant: Variant, times: list[float], losses: list[float], peaks: list[Record], batches: list[Record], items: int
) -> Record:
    """What is written of the steps; times and rates without the warm-ups."""
    timed, of = times[variant.warm_ups :], batches[variant.warm_ups :]
    middle = percentile(timed, 50)
    tokens, slots = (sum(batch[name] for batch in of) / len(of) for name in ("tokens", "slots"))
    known = [peak.get("peak_bytes") for peak in peaks]
    found: Record = {
        "steps": len(timed),
        "warm_ups": variant.warm_ups,
        "milliseconds": [round(1e3 * percentile(timed, p), 2) for p in PERCENTILES],
        "first_milliseconds": [round(1e3 * value, 2) for value in times[: variant.warm_ups]],
        "losses": [round(loss, 6) for loss in losses],
        "tokens": round(tokens, 1),
        "slots": round(slots, 1),
        "tokens_per_second": round(tokens / middle, 1),
        "slots_per_second": round(slots / middle, 1),
        "items_per_second": round(items / middle, 2),
    }
    # The first step has no state of the optimiser yet.
    if all(value is not None for value in known[1:]) and len(known) > 1:
        place = max(range(1, len(known)), key=lambda number: known[number])
        found |= {**peaks[place], "peak_step": place, "peak_shapes": batches[place]["shapes"]}
        found["reserved_bytes"] = max(peak.get("reserved_bytes", 0) for peak in peaks) or None
    return found


def clean(device: torch.device) -> None:
    """Give back what the variant before has left."""
    gc.collect()
    workspaces.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_bytes(device: torch.device) -> int | None:
    """What tensors take now on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


@contextlib.contextmanager
def peak_of(device: torch.device) -> Iterator[Record]:
    """Fills in the peak within: on a GPU all that tensors take, on a CPU what comes on top of what was resident."""
    found: Record = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        return
    try:
        before = settled_bytes()
    except OSError:
        yield found
        return
    yield found
    found["peak_bytes"] = resident_bytes("VmHWM") - before
