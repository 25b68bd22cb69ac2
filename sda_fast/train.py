"""Fine-tuning on a catalogue: CMSA + MoDA, resumable, with a log and a model card."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from sda_fast.data.items import Catalogue, read_items
from sda_fast.jobs.batches import Batch, BatchMaker, Prefetcher
from sda_fast.jobs.checkpoint import newest_checkpoint
from sda_fast.jobs.checkpointed_layers import CheckpointedLayers
from sda_fast.jobs.features import Tower
from sda_fast.jobs.fingerprint import catalogue_fingerprint
from sda_fast.jobs.fitting import LongestFirst, agreed_checkpointed_layers, agreed_chunk_size
from sda_fast.jobs.run_log import RunLog, read_log
from sda_fast.jobs.sampler import BatchOrder, rank_slice
from sda_fast.jobs.train_config import FinetuneConfig, preset
from sda_fast.jobs.train_state import TrainingState, build_state
from sda_fast.jobs.train_step import ContrastiveStep, loss_across_processes, training_mode
from sda_fast.losses.cached import RandomState, is_out_of_memory
from sda_fast.losses.distributed import sum_gradients
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.packing import packed_modalities
from sda_fast.lvlm.tower_cache import TowerCache
from sda_fast.moda.compiling import compiled_layers

__all__ = ["ConfigMismatchError", "FinetuneConfig", "FinetuneResult", "NonFiniteLossError", "finetune", "preset"]

logger = logging.getLogger(__name__)


class ConfigMismatchError(ValueError):
    """The output folder holds checkpoints of a run with other settings."""


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        step: which step (counted from 1) was not made.
        item_ids: the batch.
    """

    def __init__(self, message: str, step: int, item_ids: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.item_ids = item_ids


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left behind.

    Attributes:
        adapter: folder with adapter_config.json, adapter_model.safetensors, training.json and README.md.
        losses: of the logged steps, the whole run's even if it was resumed.
        steps: of the whole run.
        seconds: spent in these steps, over all resumptions.
        temperature: at the end.
        log: path of log.jsonl.
    """

    adapter: Path
    losses: list[float]
    steps: int
    seconds: float
    temperature: float
    log: Path


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune adapters of a vision-language model on a catalogue, or continue where an interrupted run stopped.

    The output folder gets `adapter/` (at the end), `checkpoints/`, `log.jsonl` and, where it is installed, TensorBoard
    events. Killed at any moment and called again with the same settings, it ends with the same adapter bit for bit on
    the same kind of device. Under `accelerate launch` or `torchrun` each process encodes its share of every batch; the
    output folder must be one that all of them see.

    Raises:
        ConfigMismatchError: the newest checkpoint was made with other settings, which are named.
        FileExistsError: resume="never" and there are checkpoints.
        NonFiniteLossError: the loss or gradient is not finite; the last good checkpoint is kept.
        OSError: a checkpoint cannot be written, e.g. the disk is full; the ones written before are kept.
        ValueError: the catalogue has fewer items than a batch, or settings do not fit the model.
    """
    catalogue = read_items(config.items, config.images)
    order = BatchOrder(len(catalogue), config.batch_size, config.seed)
    accelerator = Accelerator(cpu=config.device == "cpu")
    if config.batch_size < accelerator.num_processes:
        raise ValueError(f"batch_size is {config.batch_size} but there are {accelerator.num_processes} processes")
    identity = _identity(config, catalogue, order, accelerator.num_processes)
    newest = _checkpoint_to_continue(config, identity)
    if newest is not None and newest[1]["step"] == identity["total_steps"] and _finished(config.output, identity):
        logger.info("%s is finished already", config.output)
        return _result(config.output)

    if config.preset is not None:
        for name, (here, published) in config.differences_from_published().items():
            logger.info("%s is %s, the published setting is %s", name, here, published)
    set_seed(config.seed + accelerator.process_index)
    state = build_state(config, accelerator)
    if newest is not None:
        state.restore(*newest)
        logger.info("continuing after step %d from %s", state.step, newest[0])
    _train(config, catalogue, order, state, identity)
    if accelerator.is_main_process:
        facts = _facts(config, catalogue, state)
        state.write_adapter(config.output / "adapter", config, identity, facts)
    accelerator.wait_for_everyone()
    return _result(config.output)


def _identity(config: FinetuneConfig, catalogue: Catalogue, order: BatchOrder, processes: int) -> dict[str, Any]:
    """Everything that a checkpoint and the run that continues it must have in common."""
    settings = {name: value for name, value in config.determining().items() if name not in ("steps", "epochs")}
    return {
        **settings,
        "total_steps": config.total_steps(order.batches_per_epoch),
        "items": catalogue_fingerprint(catalogue),
        "processes": processes,
    }


def _checkpoint_to_continue(config: FinetuneConfig, identity: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    newest = newest_checkpoint(config.output / "checkpoints")
    if newest is None:
        return None
    path, state = newest
    if config.resume == "never":
        raise FileExistsError(f"{path} exists and resume is 'never'; choose another output folder or delete it")
    theirs = state["identity"]
    differing = [
        f"{name} (checkpoint: {theirs.get(name)!r}, now: {identity.get(name)!r})"
        for name in sorted({*theirs, *identity})
        if theirs.get(name) != identity.get(name)
    ]
    if differing:
        raise ConfigMismatchError(f"{path} was made with other settings: {', '.join(differing)}")
    return path, state


def _train(
    config: FinetuneConfig, catalogue: Catalogue, order: BatchOrder, state: TrainingState, identity: Mapping[str, Any]
) -> None:
    accelerator, total_steps = state.accelerator, identity["total_steps"]
    mine = rank_slice(config.batch_size, accelerator.process_index, accelerator.num_processes)
    options = ImageOptions(config.min_pixels, config.max_pixels, config.seed)
    packs = packed_modalities(config.packing, state.lvlm)
    cache = None
    if config.tower_cache != "none":
        cache = TowerCache(state.lvlm, config.tower_cache, options, most_bytes=int(config.tower_cache_gib * 2**30))
    maker = BatchMaker(state.lvlm, config.prompts(), options, config.length_bucketing, packs, cache)
    tower = Tower(state.lvlm, cache, group_size=config.tower_batch, offload=config.tower_offload)

    def make(step: int, chunk_size: int | None) -> Batch:
        return maker.make([catalogue[place] for place in order.batch(step)[mine]], chunk_size)

    loss_function = state.loss if accelerator.num_processes == 1 else loss_across_processes(state.loss)
    contrastive_step = ContrastiveStep(
        state.lvlm, loss_function, config.loss_width(state.lvlm), tower, across_ranks=accelerator.num_processes > 1
    )
    prefetcher = Prefetcher(make, last_step=total_steps - 1, enabled=config.prefetch)
    log = RunLog(config.output, after_step=state.step) if accelerator.is_main_process else None
    progress = tqdm(
        total=total_steps,
        initial=state.step,
        desc="Fine-tuning",
        unit="step",
        disable=not (config.progress and accelerator.is_main_process),
    )
    tokens: Counter[str] = Counter()
    try:
        decoder = state.lvlm.language_model
        with (
            training_mode(
                state.lvlm,
                gradient_checkpointing=config.gradient_checkpointing,
                checkpointed_layers=config.checkpointed_layers,
            ) as layers,
            compiled_layers(decoder) if config.compile else nullcontext(),
        ):
            share, longest = mine.stop - mine.start, LongestFirst(maker, catalogue.items)
            if config.chunk_size == "auto" and state.step == 0:
                state.chunk_size = agreed_chunk_size(contrastive_step, longest, share)
                logger.info("chunk size: %s", state.chunk_size or "the whole batch")
            if config.checkpointed_layers == "auto":
                layers.limit(agreed_checkpointed_layers(contrastive_step, longest, share, state.chunk_size, layers))
                logger.info("%d of %d layers are recomputed in backward", layers.count, len(layers))
            while state.step < total_steps:
                started = time.perf_counter()
                rate = config.learning_rate_at(state.step, total_steps)
                batch, loss = _forward_backward(state, prefetcher, contrastive_step, config.batch_size, layers)
                norm = state.gradient_norm(config.max_grad_norm)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    item_ids = [catalogue[place].item_id for place in order.batch(state.step)]
                    raise _not_finite(config, state.step + 1, loss, norm, item_ids)
                state.update(rate)
                tokens.update(tokens=batch.num_tokens, slots=batch.num_slots)
                seconds = time.perf_counter() - started
                state.seconds += seconds
                speed = config.batch_size / seconds
                if log is not None and (state.step % config.log_every == 0 or state.step == total_steps):
                    log.write(
                        state.step,
                        loss=loss,
                        temperature=state.temperature,
                        learning_rate=rate,
                        grad_norm=norm,
                        seconds=round(state.seconds, 4),
                        items_per_second=round(speed, 3),
                        padding=round(1 - batch.num_tokens / batch.num_slots, 4),
                        **_peak_memory(),
                    )
                progress.set_postfix(loss=f"{loss:.4f}", tau=f"{state.temperature:.3f}", items_s=f"{speed:.1f}")
                progress.update()
                due = config.checkpoint_every and state.step % config.checkpoint_every == 0
                if due or state.step == total_steps:
                    if cache is not None:
                        cache.flush()
                    state.save(config.output / "checkpoints", identity, config.keep_checkpoints)
    finally:
        progress.close()
        prefetcher.close()
        if log is not None:
            log.close()
        if cache is not None:
            cache.flush()
    if tokens["slots"]:
        logger.info("%.1f%% of the tokens were padding", 100 * (1 - tokens["tokens"] / tokens["slots"]))
    if cache is not None:
        logger.info("%s", cache)


def _forward_backward(
    state: TrainingState,
    prefetcher: Prefetcher,
    contrastive_step: ContrastiveStep,
    batch_size: int,
    layers: CheckpointedLayers,
) -> tuple[Batch, float]:
    """Gradients and loss of the batch of the current step.

    Where memory runs out and only some layers are checkpointed, all are from then on; next the chunks are halved. All
    processes have as many layers and one chunk size, the one that a checkpoint holds: if memory runs out on one, all
    change it.
    """
    processes = state.accelerator.num_processes
    largest_share = -(-batch_size // processes)
    while True:
        batch = prefetcher.get(state.step, state.chunk_size)
        random_state = RandomState.now()
        try:
            loss = contrastive_step(batch)
        except (RuntimeError, MemoryError) as error:
            size = min(state.chunk_size or largest_share, largest_share)
            # Without chunks the other processes wait in a collective operation and cannot be told to start again.
            alone = processes > 1 and batch.chunk_size is None
            if not is_out_of_memory(error) or alone or (size == 1 and layers.are_all):
                raise
        else:
            sum_gradients(state.parameters)
            return batch, float(loss)
        if not layers.are_all:
            layers.limit(len(layers))
            change = f"all {len(layers)} layers recomputed"
        else:
            state.chunk_size = (size + 1) // 2
            change = f"chunks of {state.chunk_size} items"
        logger.warning("out of memory at step %d; going on with %s", state.step + 1, change)
        state.optimizer.zero_grad(set_to_none=True)
        random_state.restore()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _not_finite(config: FinetuneConfig, step: int, loss: float, norm: float, item_ids: list[str]) -> NonFiniteLossError:
    newest = newest_checkpoint(config.output / "checkpoints")
    kept = f"the last good checkpoint is {newest[0]}" if newest is not None else "there is no checkpoint yet"
    return NonFiniteLossError(
        f"step {step}: loss {loss}, gradient norm {norm}; {kept}; items of the batch: {', '.join(item_ids)}",
        step,
        item_ids,
    )


def _peak_memory() -> dict[str, int]:
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def _facts(config: FinetuneConfig, catalogue: Catalogue, state: TrainingState) -> dict[str, Any]:
    records = read_log(config.output / "log.jsonl")
    losses = [record["loss"] for record in records]
    device = state.lvlm.device
    return {
        "items": len(catalogue),
        "item_file": config.items.name,
        "warnings": dict(catalogue.warnings),
        "steps": state.step,
        "seconds": round(state.seconds, 3),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "temperature": state.temperature,
        "padding": round(sum(record["padding"] for record in records) / len(records), 4) if records else None,
        "trained_parameters": sum(parameter.numel() for parameter in state.parameters),
        "chunk_size": state.chunk_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": state.accelerator.num_processes,
    }


def _finished(output: Path, identity: Mapping[str, Any]) -> bool:
    path = output / "adapter" / "training.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["identity"] == identity


def _result(output: Path) -> FinetuneResult:
    facts = json.loads((output / "adapter" / "training.json").read_text(encoding="utf-8"))["training"]
    log = output / "log.jsonl"
    losses = [record["loss"] for record in read_log(log)]
    return FinetuneResult(output / "adapter", losses, facts["steps"], facts["seconds"], facts["temperature"], log)
