"""Add what the planner says of our own variants to a results file of `sda-fast bench --what finetune`.

    python bench/finetune_plan.py bench/results/finetune-NAME.json

needs neither a GPU nor weights: model, catalogue and batches are made again as they were when it was measured, on fake
tensors, and the step with the highest peak is planned.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune_model
from finetune_methods import VARIANTS, Variant
from finetune_run import longest
from sda_fast.atomic import write_json_atomic
from sda_fast.data.items import Catalogue
from sda_fast.jobs.batches import BatchMaker
from sda_fast.jobs.sampler import BatchOrder
from sda_fast.jobs.train_config import FinetuneConfig
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.load import LVLM
from sda_fast.planning.cards import Card, card_of_device
from sda_fast.planning.model import fake_lvlm
from sda_fast.planning.step import plan_step
from sda_fast.presets import with_preset

Record = dict[str, Any]


def settings(items: int) -> dict[str, Any]:
    """What decides the measured runs, as written to the results file."""
    return {"preset": "published", "batch_size": items, "quantization": "nf4", "double_quant": True, "seed": 0}


def finetune_config(chosen: Record) -> FinetuneConfig:
    """The library's configuration of these settings."""
    given = {name: value for name, value in chosen.items() if name != "preset"}
    paths = {"model": "random weights", "items": "items.jsonl", "output": "adapter"}
    return with_preset(FinetuneConfig, chosen["preset"], **paths, **given)


class Planner:
    """The measured model on fake tensors, and the same catalogue."""

    def __init__(self, document: Record, folder: Path) -> None:
        self.document = document
        device = torch.device(document["kind"])
        self.catalogue: Catalogue = finetune_model.catalogue_in(folder / "catalogue", device)
        processor = finetune_model.processor_for(self.catalogue, device)
        model_config = finetune_model.config_for(processor, device)
        self.config = finetune_config(document["settings"])
        self.card: Card | None = None
        dtype = torch.float32
        if device.type == "cuda":
            self.card = card_of_device(document["device"], document["memory"])
            dtype = torch.bfloat16
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake_mode:
            self.lvlm: LVLM = fake_lvlm(
                model_config,
                "measured",
                quantization=self.config.quantization,
                double_quant=self.config.double_quant,
                dtype=dtype,
                processor=processor,
            )

    def __call__(self, record: Record, variant: Variant) -> Record:
        """The planned step of a measured variant beside the measured peak.

        Raises:
            ValueError: the batch made here has other sizes than the measured one.
        """
        config = dataclasses.replace(
            self.config, chunk_size=variant.chunk_size, gradient_checkpointing=variant.gradient_checkpointing
        )
        options = ImageOptions(config.min_pixels, config.max_pixels, config.seed)
        maker = BatchMaker(self.lvlm, config.prompts(), options, config.length_bucketing)
        order = BatchOrder(len(self.catalogue), config.batch_size, config.seed)
        batch = maker.make([self.catalogue[place] for place in order.batch(record["peak_step"])], config.chunk_size)
        chunks = {"image": longest(batch.images.chunks).tensors, "text": longest(batch.texts.chunks).tensors}
        shapes = {name: list(tensors["input_ids"].shape) for name, tensors in chunks.items()}
        if shapes != record["peak_shapes"]:
            raise ValueError(f"the measured batch had chunks of {record['peak_shapes']} tokens, here it has {shapes}")
        step = plan_step(self.lvlm, config, chunks, self.fake_mode, card=self.card, tower_cached=variant.tower_cached)
        found = {"peak_bytes": step.peak, "parts": dict(step.parts), "seconds": step.seconds, "flops": step.flops}
        if self.card is not None:
            found |= {"card": self.card.name, "deviation": round(step.peak / record["peak_bytes"] - 1, 4)}
        return found


def without_plan(document: Record) -> Iterable[tuple[Record, Variant]]:
    """The measured records of our own variants that have no plan yet."""
    of_name = {variant.name: variant for variant in VARIANTS}
    for record in document["records"]:
        variant = of_name[record["method"]]
        if variant.is_ours and "peak_step" in record and "planned" not in record:
            yield record, variant


def add_plans(document: Record, path: Path) -> None:
    """Plan what has no plan yet; the file is written after each."""
    todo = list(without_plan(document))
    if not todo:
        return
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(document, Path(folder))
        for record, variant in todo:
            record["planned"] = planner(record, variant)
            write_json_atomic(path, document)


def main() -> None:
    for name in sys.argv[1:]:
        add_plans(json.loads(Path(name).read_text(encoding="utf-8")), Path(name))


if __name__ == "__main__":
    main()
