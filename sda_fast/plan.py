"""What a fine-tuning step will need, found without a GPU and without the weights (DESIGN.md section 4)."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.arguments import setting
from sda_fast.data.items import Item, read_items
from sda_fast.jobs.batches import BatchMaker
from sda_fast.jobs.train_config import TOWER_BATCH_HELP, TOWER_OFFLOAD_HELP, FinetuneConfig
from sda_fast.jobs.train_state import activation_dtype
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.processor import load_processor
from sda_fast.planning.batch import (
    Lengths,
    estimated_lengths,
    longest_chunks,
    synthetic_chunks,
    tokenized_lengths,
)
from sda_fast.planning.cards import GIB, Card, card_named
from sda_fast.planning.model import config_of_model, fake_lvlm
from sda_fast.planning.step import StepPlan, plan_step

logger = logging.getLogger(__name__)

# Beside what tensors take: the CUDA context, the loaded kernels, and blocks that the allocator cannot fill.
RESERVED_BYTES = 3 * GIB // 4
UNITS = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}
MOST_TRIES = 4


@dataclass(frozen=True)
class PlanConfig:
    """One question to the planner.

    Raises:
        ValueError: a size that cannot be read, or one below 1.
    """

    model: str = dataclasses.field(
        metadata={"help": "model folder, config.json or hub name, e.g. Qwen/Qwen2.5-VL-7B-Instruct"}
    )
    items: Path | None = setting(None, "catalogue whose longest texts and pictures decide; or give --text-tokens")
    images: Path | None = setting(None, "folder that image paths start from; default: the catalogue's")
    gpu_memory: str = setting("12GiB", "memory of the card, e.g. 12GiB")
    gpu: str = setting("RTX 3060 12GB", "card whose speed and size of launches are taken, e.g. RTX 4090")
    batch_size: int = setting(32, "items per step")
    chunk_sizes: tuple[int, ...] = setting((1, 4, 32), "items encoded at a time, one line of the table each")
    search: bool = setting(
        True,
        "look for the largest chunk that fits, with and without gradient checkpointing, and for the fewest layers that "
        "need it with that chunk",
    )
    text_tokens: int | None = setting(None, "tokens of the longest text sequence, in place of the items'")
    image_tokens: int | None = setting(None, "tokens of the largest picture, in place of the items'")
    gradient_checkpointing: bool = setting(True, "recompute activations in backward, in the lines of the table")
    checkpointed_layers: int | None = setting(None, "in these lines, how many layers, from the first on; none: all")
    quantization: Literal["nf4", "none"] = setting("nf4", "how the language model's frozen weights are held")
    double_quant: bool = setting(True, "hold the scales of the 4-bit weights in 8 bits too (nested statistics)")
    precision: Literal["bf16", "fp32"] = setting("bf16", "dtype of activations and of what is not in 4 bits")
    tower_cached: bool = setting(False, "plan a step whose pictures are all in the tower cache")
    tower_offload: bool = setting(False, TOWER_OFFLOAD_HELP)
    tower_batch: int | None = setting(None, TOWER_BATCH_HELP)
    optimizer: Literal["adamw", "adamw8bit", "paged"] = setting("adamw", "as for finetune")
    adapter: Literal["moda", "lora"] = setting("moda", "as for finetune")
    r: int = setting(8, "total rank of an adapted layer")
    num_experts: int = setting(8, "experts per layer; must divide r")
    min_pixels: int = setting(20 * 20, "smaller images are enlarged to this area")
    max_pixels: int = setting(256 * 256, "larger images are reduced to this area")

    def __post_init__(self) -> None:
        bytes_of(self.gpu_memory)
        for name in ("text_tokens", "image_tokens", "tower_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.chunk_sizes or min(self.chunk_sizes) < 1:
            raise ValueError(f"chunk_sizes must be at least 1, got {self.chunk_sizes}")

    def finetune(self, chunk_size: int, checkpointed_layers: int | None) -> FinetuneConfig:
        """The fine-tuning run that a line of the table is about; a chunk of the whole batch is no chunk.

        Args:
            checkpointed_layers: None: all.
        """
        return FinetuneConfig(
            model=self.model,
            items=self.items or Path("items.jsonl"),
            output=Path("adapter"),
            batch_size=self.batch_size,
            chunk_size=None if chunk_size >= self.batch_size else chunk_size,
            gradient_checkpointing=checkpointed_layers != 0,
            checkpointed_layers=checkpointed_layers or None,
            quantization=self.quantization,
            double_quant=self.double_quant,
            precision=self.precision,
            tower_offload=self.tower_offload,
            tower_batch=1 if self.tower_batch is None and self.tower_cached else self.tower_batch,
            optimizer=self.optimizer,
            adapter=self.adapter,
            r=self.r,
            num_experts=self.num_experts,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True)
class Plan:
    """The planner's answer; `str` of it is a page in Markdown.

    Attributes:
        lines: a step per setting asked for.
        largest: gradient checkpointing or not -> the step with the largest chunk that fits; None if not even one item
            does.
        fewest: the step with this chunk, with gradient checkpointing, and the fewest layers under it that fit.
        assumptions: what was not looked up or measured.
    """

    model: str
    card: Card
    memory: int
    lengths: Lengths
    lines: list[StepPlan]
    largest: dict[bool, StepPlan | None]
    fewest: StepPlan | None
    assumptions: list[str]

    def fits(self, step: StepPlan) -> bool:
        return step.peak + RESERVED_BYTES <= self.memory

    def __str__(self) -> str:
        rows = [[*cells(step), "yes" if self.fits(step) else "no"] for step in self.lines]
        head = [*HEAD, f"fits {self.memory / GIB:g} GiB"]
        page = [f"# {self.model} on {self.card.name}", "", *table(head, rows), ""]
        for checkpointing, step in self.largest.items():
            how = "with" if checkpointing else "without"
            found = f"nothing fits {how} gradient checkpointing"
            if step is not None:
                found = (
                    f"the largest chunk that fits {how} gradient checkpointing is {chunk_name(step)}: "
                    f"{step.peak / GIB:.2f} GiB, {step.seconds:.1f} s a step"
                )
            page.append(f"- {found}")
        if self.fewest is not None:
            page.append(
                f"- of its layers {self.fewest.checkpointed_layers} of {self.fewest.num_layers} have to be under it "
                f"(`finetune --checkpointed-layers auto`) with the chunk {chunk_name(self.fewest)}: "
                f"{self.fewest.peak / GIB:.2f} GiB, {self.fewest.seconds:.1f} s a step"
            )
        page += [f"- {assumption}" for assumption in self.assumptions]
        return "\n".join(page)


HEAD = [
    "batch", "chunk", "checkpointing", "weights", "adapters", "optimizer", "gradients", "activations", "inputs",
    "workspaces", "temporary", "peak GiB", "s/step",
]  # fmt: skip


def cells(step: StepPlan) -> list[str]:
    """A line of the table; parts in GiB."""
    parts = [f"{step.parts[name] / GIB:.2f}" for name in HEAD[3:11]]
    seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
    on = checkpointing_name(step.checkpointed_layers, step.num_layers)
    return [str(step.batch_size), chunk_name(step), on, *parts, f"{step.peak / GIB:.2f}", seconds]


def chunk_name(step: StepPlan) -> str:
    return f"all {step.batch_size}" if step.chunk_size is None else str(step.chunk_size)


def checkpointing_name(checkpointed_layers: int, num_layers: int) -> str:
    if checkpointed_layers in (0, num_layers):
        return "yes" if checkpointed_layers else "no"
    return f"{checkpointed_layers} of {num_layers}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, line by line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' ---: |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def plan(config: PlanConfig) -> Plan:
    """Run the training step on fake tensors, once per setting, and say what it takes.

    Raises:
        FileNotFoundError: the model's configuration or the items are not there.
        ValueError: an unknown card or model type, a model that needs its processor, or neither items nor lengths.
    """
    card, memory = card_named(config.gpu), bytes_of(config.gpu_memory)
    model_config, is_preset = config_of_model(config.model)
    items = read_items(config.items, config.images).items if config.items is not None else []
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    processor = None if is_preset else processor_if_there(config.model, model_config)
    with fake_mode:
        lvlm = fake_lvlm(
            model_config,
            config.model,
            quantization=config.quantization,
            double_quant=config.double_quant,
            dtype=activation_dtype(config.precision, torch.device("cpu")),
            processor=processor,
        )
    source = ChunkSource(config, lvlm, items)

    def step(chunk_size: int, checkpointed_layers: int | None) -> StepPlan:
        logger.info("chunk %d, checkpointed layers %s", chunk_size, checkpointed_layers)
        chunk_size = min(chunk_size, config.batch_size)
        run = config.finetune(chunk_size, checkpointed_layers)
        shares = {"image": source.lengths.image_share, "text": source.lengths.text_share}
        return plan_step(
            lvlm,
            run,
            source.chunks(chunk_size),
            fake_mode,
            card=card,
            shares=shares,
            tower_cached=config.tower_cached,
        )

    asked = config.checkpointed_layers if config.gradient_checkpointing else 0
    lines = [step(size, asked) for size in config.chunk_sizes]
    assumptions = [
        f"the largest picture takes {lines[0].picture_bytes / 1e6:.2f} MB in a tower cache",
        f"lengths: {source.lengths.text} tokens in a text, {source.lengths.image} in an image sequence "
        f"({source.lengths.source}); time is for mean lengths, {source.lengths.text_share:.2f} and "
        f"{source.lengths.image_share:.2f} of these",
        f"{RESERVED_BYTES / GIB:g} GiB are kept free for the CUDA context and the allocator's unused blocks",
    ]
    if is_preset:
        assumptions.append("the configuration is the library's copy of the published one; the hub was not reached")
    result = Plan(config.model, card, memory, source.lengths, lines, {}, None, assumptions)
    if not config.search:
        return result
    done = {one.chunk_size or config.batch_size: one for one in lines}
    for checkpointing, layers in ((True, None), (False, 0)):
        known = done if asked == layers else {}
        result.largest[checkpointing] = largest_that_fits(
            lambda size, layers=layers: step(size, layers), result.fits, memory, config.batch_size, known
        )
    largest = result.largest[True]
    if largest is None:
        return result
    fewest = fewest_layers_that_fit(
        lambda layers: step(largest.chunk_size or config.batch_size, layers), result.fits, memory, largest
    )
    return dataclasses.replace(result, fewest=fewest)


class ChunkSource:
    """Chunks of the longest sequences, by the model's processor where there is one and the lengths are not given."""

    def __init__(self, config: PlanConfig, lvlm: LVLM, items: Sequence[Item]) -> None:
        self.lvlm, self.items = lvlm, items
        example = config.finetune(1, None)
        options = ImageOptions(config.min_pixels, config.max_pixels)
        given = config.text_tokens is not None or config.image_tokens is not None
        self.maker = None
        if lvlm.processor is not None and items and not given:
            self.maker = BatchMaker(lvlm, example.prompts(), options)
            self.lengths = tokenized_lengths(self.maker, items)
        else:
            self.lengths = estimated_lengths(
                lvlm.model.config,
                items,
                example.prompts(),
                options,
                text_tokens=config.text_tokens,
                image_tokens=config.image_tokens,
            )

    def chunks(self, size: int) -> dict[str, dict[str, torch.Tensor]]:
        if self.maker is not None:
            return longest_chunks(self.maker, self.items, size)
        return synthetic_chunks(self.lvlm, size, self.lengths)


def largest_that_fits(
    step: Any, fits: Any, memory: int, batch_size: int, known: dict[int, StepPlan]
) -> StepPlan | None:
    """The step with the largest size that fits, each candidate being run; the peak grows about evenly with the size.

    Args:
        step: size, of a chunk or what else may grow up to `batch_size`, -> StepPlan.
        fits: StepPlan -> bool.
        known: size -> steps already run.
    """
    runs = dict(known)
    for size in (1, min(2, batch_size)):
        if not any(fits(one) for one in runs.values()) or len(runs) < 2:
            runs[size] = runs.get(size) or step(size)
    for _ in range(MOST_TRIES):
        fitting = [size for size, one in runs.items() if fits(one)]
        failing = [size for size, one in runs.items() if not fits(one)]
        best, least = max(fitting, default=0), min(failing, default=batch_size + 1)
        if best + 1 >= least or best == 0:
            break
        (small, first), (large, second) = sorted(runs.items())[0], sorted(runs.items())[-1]
        slope = max(1.0, (second.peak - first.peak) / max(1, large - small))
        guess = math.floor(small + (memory - RESERVED_BYTES - first.peak) / slope)
        size = min(max(guess, best + 1), least - 1)
        runs[size] = step(size)
    fitting = [size for size, one in runs.items() if fits(one)]
    return runs[max(fitting)] if fitting else None


def fewest_layers_that_fit(step: Any, fits: Any, memory: int, complete: StepPlan) -> StepPlan | None:
    """The step with the fewest checkpointed layers that fits: with the most that keep their activations.

    Args:
        step: number of checkpointed layers -> StepPlan.
        fits: StepPlan -> bool.
        complete: the step with all layers checkpointed, which fits.
    """
    total = complete.num_layers
    return largest_that_fits(lambda kept: step(total - kept), fits, memory, total, {0: complete})


def processor_if_there(name: str, config: Any) -> Any:
    """The model's processor, or None where only its configuration is at hand."""
    if name.endswith(".json"):
        return None
    try:
        return load_processor(name, config)
    except (OSError, ValueError) as error:
        logger.info("%s has no processor at hand, lengths are estimated: %s", name, str(error).splitlines()[0])
        return None


def bytes_of(words: str) -> int:
    """ "12GiB" or "12 GB" as a number of bytes.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", words)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"expected a size like 12GiB, got {words!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])
