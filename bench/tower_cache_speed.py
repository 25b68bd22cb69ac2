"""Processor time of a fine-tuning step with and without the tower cache, and padding, on a CPU with the small model.

    OMP_NUM_THREADS=1 python bench/tower_cache_speed.py [bench/results]

The ways take turns in one process on the same batches: batches made and trained on, without prefetching, so that the
time of decoding pictures counts too. Losses that differ are an error. Writes its part of docs/memory.md too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layers import device_name, results_file
from pages import documents_of, replace_between
from sda_fast.atomic import write_json_atomic
from sda_fast.data.items import Catalogue, read_items
from sda_fast.data.synthetic import generate_catalogue
from sda_fast.jobs.batches import BatchMaker
from sda_fast.jobs.features import Tower
from sda_fast.jobs.fingerprint import versions
from sda_fast.jobs.sampler import BatchOrder
from sda_fast.jobs.train_step import ContrastiveStep, training_mode
from sda_fast.losses.modules import CMSALoss
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.load import LVLM, load_lvlm
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tiny import build_tiny_lvlm
from sda_fast.lvlm.tower_cache import TowerCache
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.inject import adapt_model

BATCH, STEPS, ITEMS, CHUNK = 32, 15, 96, 8
OPTIONS = ImageOptions(max_pixels=84 * 84)


def step_of(
    lvlm: LVLM, catalogue: Catalogue, cache: TowerCache | None, group_size: int | None
) -> Callable[[int], float]:
    """step -> loss: makes the batch and its gradients."""
    order = BatchOrder(len(catalogue), BATCH, seed=0)
    maker = BatchMaker(lvlm, PromptConfig(), OPTIONS, cache=cache)
    loss = CMSALoss(3.0)
    run = ContrastiveStep(lvlm, loss, None, Tower(lvlm, cache, group_size=group_size))

    def step(number: int) -> float:
        torch.manual_seed(number)
        with training_mode(lvlm, gradient_checkpointing=False):
            value = run(maker.make([catalogue[place] for place in order.batch(number)], None))
        lvlm.model.zero_grad(set_to_none=True)
        return float(value)

    return step


def padding(lvlm: LVLM, catalogue: Catalogue, **changes: Any) -> float:
    """Share of padding tokens in batches cut into chunks of CHUNK."""
    order = BatchOrder(len(catalogue), BATCH, seed=0)
    maker = BatchMaker(lvlm, PromptConfig(), OPTIONS, **changes)
    batches = [maker.make([catalogue[place] for place in order.batch(step)], CHUNK) for step in range(3)]
    return 1 - sum(batch.num_tokens for batch in batches) / sum(batch.num_slots for batch in batches)


def measure(folder: Path) -> dict[str, Any]:
    paths = generate_catalogue(folder / "catalogue", num_items=ITEMS, num_users=1, seed=0)
    catalogue = read_items(paths.items)
    model = build_tiny_lvlm(catalogue, folder / "model", pretrain_steps=0)
    lvlm = load_lvlm(model, dtype=torch.float32, device="cpu", progress=False)
    adapt_model(lvlm.model, MoDAConfig(lora_dropout=0.1, target_modules=lvlm.family.target_modules))
    cache = TowerCache(lvlm, folder / "cache", OPTIONS)
    ways = {
        "tower in every step": step_of(lvlm, catalogue, None, None),
        "tower in every step, each picture alone": step_of(lvlm, catalogue, None, 1),
        "outputs from the tower cache": step_of(lvlm, catalogue, cache, None),
    }
    for number in range(ITEMS // BATCH):
        for step in ways.values():
            step(number)
    cache.flush()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(STEPS):
        losses = {}
        for name, step in ways.items():
            started = time.process_time()
            losses[name] = step(number)
            seconds[name].append(time.process_time() - started)
        _, alone, cached = losses.values()
        if alone != cached or abs(losses["tower in every step"] - alone) > 1e-4:
            raise RuntimeError(f"step {number}: the losses differ: {losses}")
    size = sum(path.stat().st_size for path in cache.store.folder.glob("shard-*"))
    return {
        "batch": BATCH,
        "processor_seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "processor_seconds": seconds,
        "bytes_per_picture": size / ITEMS,
        "padding_in_chunks_of_8": {
            "--no-length-bucketing": padding(lvlm, catalogue, length_bucketing=False),
            "--length-bucketing": padding(lvlm, catalogue),
            "--packing on": padding(lvlm, catalogue, packs=("image", "text")),
        },
    }


def as_markdown(document: dict[str, Any]) -> str:
    """The part of docs/memory.md."""
    seconds = document["processor_seconds_median"]
    slowest = next(iter(seconds.values()))
    rows = [f"| {name} | {value:.3f} | {value / slowest:.2f} |" for name, value in seconds.items()]
    shares = "; ".join(f"`{name}` {share:.1%}" for name, share in document["padding_in_chunks_of_8"].items())
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join(
        [
            f"On a CPU with the small model of `sda-fast tiny`, batch {document['batch']}, batches made without "
            "prefetching:",
            "",
            "| step | processor seconds | ratio |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            f"{document['bytes_per_picture'] / 1000:.1f} kB per picture. Share of padding tokens in the same batches "
            f"in chunks of {CHUNK}: {shares}.",
            "",
            f"`{document['command']}`; {document['device']}, one thread; {versions}.",
        ]
    )


def text_of(results: Path) -> str:
    """The same of every processor whose file is in `results`."""
    documents = [document for document, _ in documents_of(sorted(results.glob("tower-cache-*.json")))]
    return "\n\n".join(as_markdown(document) for document in documents)


def main() -> None:
    torch.set_num_threads(1)
    folder_of_results = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    cpu = torch.device("cpu")
    facts = {"device": device_name(cpu), "versions": versions()}
    document = {"command": "OMP_NUM_THREADS=1 python bench/tower_cache_speed.py", **facts, **found}
    write_json_atomic(results_file(folder_of_results, "tower-cache", cpu), document)
    page = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
    text = text_of(folder_of_results)
    replace_between(page, "<!-- tower cache speed: begin -->", "<!-- tower cache speed: end -->", text)


if __name__ == "__main__":
    main()
