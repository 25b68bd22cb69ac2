"""What each part of the memory diet saves, by the planner: `python bench/memory_diet.py` (no GPU, no weights).

Writes bench/results/memory-diet.json and the tables of docs/memory.md and docs/planning.md. `--pages` only writes the
tables anew.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from layers import device_name
from pages import replace_between
from sda_fast.jobs.batches import Chunk
from sda_fast.jobs.fingerprint import versions
from sda_fast.lvlm.family import ImageFeatures
from sda_fast.plan import HEAD, PlanConfig, checkpointing_name, plan, table
from sda_fast.planning import step
from sda_fast.planning.cards import GIB
from sda_fast.planning.ledger import HOST
from sda_fast.planning.model import preset_configs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "memory-diet.json"
QWEN, LLAMA = "Qwen/Qwen2.5-VL-7B-Instruct", "meta-llama/Llama-3.2-11B-Vision-Instruct"
COMMON = {"text_tokens": 128, "search": False}
WHOLE = {**COMMON, "model": QWEN, "chunk_sizes": (32,)}
TOWER_IS_READ, TOWER_IS_KEPT = {"tower_cached": True}, {"tower_cached": True, "tower_offload": True}

# Tables of docs/planning.md: what -> settings.
PLANNED: dict[str, list[dict[str, Any]]] = {
    "qwen": [{**COMMON, "model": QWEN}],
    "llama": [{**COMMON, "model": LLAMA}],
    "cached": [{**COMMON, "model": model, **TOWER_IS_KEPT} for model in (QWEN, LLAMA)],
    "4096": [
        {**COMMON, "model": model, "batch_size": 4096, "chunk_sizes": (chunk,), "gpu_memory": "16GiB"}
        for model, chunk in ((QWEN, 32), (LLAMA, 4))
    ],
}

# The table of docs/memory.md: what is changed -> how.
DIET: dict[str, dict[str, Any]] = {
    "nothing: the published settings, the whole batch at once": {},
    "weights in 16 bits": {"quantization": "none"},
    "NF4 without nested statistics": {"double_quant": False},
    "everything beside the 4-bit weights in float32": {"precision": "fp32"},
    "26 of 28 layers checkpointed": {"checkpointed_layers": 26},
    "14 of 28 layers checkpointed": {"checkpointed_layers": 14},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "8-bit optimiser": {"optimizer": "adamw8bit"},
    "paged 8-bit optimiser": {"optimizer": "paged"},
    "all 32 pictures through the tower at once": {"tower_batch": 32},
    "the tower's outputs read from the cache": TOWER_IS_READ,
    "the same, and its weights in main memory": TOWER_IS_KEPT,
    "chunks of 4": {"chunk_sizes": (4,)},
    "chunks of 4, no gradient checkpointing": {"chunk_sizes": (4,), "gradient_checkpointing": False},
    "chunks of 1": {"chunk_sizes": (1,)},
    "chunks of 4, 8-bit optimiser, tower cached and parked": {
        "chunk_sizes": (4,), "optimizer": "adamw8bit", **TOWER_IS_KEPT,
    },
    "a batch of 256 at once": {"batch_size": 256, "chunk_sizes": (256,)},
    "a batch of 256 in chunks of 32": {"batch_size": 256},
}  # fmt: skip


class TowerWithGraph(step.PlannedTower):
    """The tower as it would run with gradients recorded, all pictures at once."""

    def _run(self, chunk: Chunk, group: Sequence[int]) -> list[ImageFeatures]:
        inputs = self.lvlm.family.pictures(self.lvlm.model, chunk.tensors, group)
        with torch.enable_grad():
            inputs["pixel_values"].requires_grad_()
            features = self.lvlm.family.image_features(self.lvlm.model, inputs)
        self.kept = features
        with self.ledger.allocating(HOST), torch.no_grad():
            return [{name: part.detach().clone() for name, part in one.items()} for one in features]


def command(settings: dict[str, Any]) -> str:
    """The command line of a PlanConfig."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            words.append(f"--{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(["sda-fast plan", *words])


def lines(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per line of the plan."""
    answer = plan(PlanConfig(**settings))
    print(command(settings), [f"{one.peak / GIB:.2f}" for one in answer.lines], file=sys.stderr, flush=True)
    return [
        {
            "command": command(settings),
            "model": answer.model,
            "peak": one.peak,
            "memory": answer.memory,
            "fits": answer.fits(one),
            "step": {**dataclasses.asdict(one), "parts": dict(one.parts)},
        }
        for one in answer.lines
    ]


def beside_the_plan() -> dict[str, int]:
    """Bytes of what the library never loads or keeps, from the model's sizes and the planned lengths."""
    config = preset_configs()[QWEN].text_config
    longest = 128
    return {
        "language head": config.vocab_size * config.hidden_size * 2,
        "hidden states of the layers before the last, of 32 texts": config.num_hidden_layers
        * 32 * longest * config.hidden_size * 2,
    }  # fmt: skip


def picture_bytes() -> dict[str, int]:
    """What a picture takes in the tower cache, by model."""
    return {
        model: lines({**COMMON, "model": model, "chunk_sizes": (1,)})[0]["step"]["picture_bytes"]
        for model in (QWEN, LLAMA)
    }


def measure() -> dict[str, Any]:
    """The results file's document."""
    diet = {what: lines({**WHOLE, **changes})[0] for what, changes in DIET.items()}
    with mock.patch.object(step, "PlannedTower", TowerWithGraph):
        diet["the tower with gradients recorded, all 32 pictures"] = lines({**WHOLE, "tower_batch": 32})[0]
    with set_checkpoint_early_stop(False):
        diet["gradient checkpointing that repeats down_proj too"] = lines(WHOLE)[0]
    return {
        "command": "OMP_NUM_THREADS=1 python bench/memory_diet.py",
        "device": f"planned for an RTX 3060 12GB on {device_name(torch.device('cpu'))}",
        "versions": versions(),
        "diet": diet,
        "planned": {name: [line for one in settings for line in lines(one)] for name, settings in PLANNED.items()},
        "beside": beside_the_plan(),
        "picture_bytes": picture_bytes(),
    }


def cells(line: dict[str, Any]) -> list[str]:
    """A record as a row of the planner's table."""
    one = line["step"]
    parts = [f"{one['parts'][name] / GIB:.2f}" for name in HEAD[3:11]]
    chunk = f"all {one['batch_size']}" if one["chunk_size"] is None else str(one["chunk_size"])
    on = checkpointing_name(one["checkpointed_layers"], one["num_layers"])
    end = [f"{line['peak'] / GIB:.2f}", f"{one['seconds']:.1f}", "yes" if line["fits"] else "no"]
    return [str(one["batch_size"]), chunk, on, *parts, *end]


def planned_tables(document: dict[str, Any]) -> Iterator[str]:
    """The tables of docs/planning.md."""
    titles = {
        "qwen": f"{QWEN}:",
        "llama": f"{LLAMA}:",
        "cached": "With a warm tower cache and the tower's weights in main memory (`--tower-cached --tower-offload`):",
        "4096": "A batch of 4096 on 16 GiB:",
    }
    for name, records in document["planned"].items():
        yield titles[name]
        yield ""
        several = len({line["model"] for line in records}) > 1
        fits = f"fits {records[0]['memory'] / GIB:g} GiB"
        head = [*(["model"] if several else []), *HEAD, fits]
        rows = [[*([line["model"].split("/")[1]] if several else []), *cells(line)] for line in records]
        yield from table(head, rows)
        yield ""
    yield f"`{document['command']}` wrote these tables; the lines' own commands are in bench/results/memory-diet.json."


def diet_table(document: dict[str, Any]) -> Iterator[str]:
    """The table of docs/memory.md."""
    base = next(iter(document["diet"].values()))
    rows = []
    for what, line in document["diet"].items():
        options = line["command"].removeprefix(base["command"]).strip()
        if options == line["command"]:
            given = set(base["command"].split(" --"))
            options = " ".join(f"--{word}" for word in line["command"].split(" --") if word not in given)
        rows.append(
            [
                what,
                f"`{options}`" if options and what in DIET else "",
                f"{line['peak'] / GIB:.2f}",
                f"{(line['peak'] - base['peak']) / GIB:+.2f}",
                f"{line['step']['seconds']:.1f}",
                "yes" if line["fits"] else "no",
            ]
        )
    head = ["changed", "options of `sda-fast plan`", "peak GiB", "difference", "s/step", "fits 12 GiB"]
    first, second, *body = table(head, rows)
    yield first
    yield second.replace(" ---: |", " --- |", 2)
    yield from body
    yield ""
    beside = [f"{name}: {size / GIB:.2f} GiB" for name, size in document["beside"].items()]
    yield f"Never there, so not in the table: {'; '.join(beside)}."
    yield ""
    sizes = [f"{model} {size / 1e6:.2f} MB" for model, size in document["picture_bytes"].items()]
    yield f"In the tower cache a picture of 256 x 256 takes: {'; '.join(sizes)}."
    yield ""
    names = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield f"`{document['command']}`; {document['device']}; {names}; base: `{base['command']}`."


def write_pages(document: dict[str, Any]) -> None:
    for page, make in (("memory", diet_table), ("planning", planned_tables)):
        begin, end = "<!-- tables of memory_diet: begin -->", "<!-- tables of memory_diet: end -->"
        replace_between(ROOT / "docs" / f"{page}.md", begin, end, "\n".join(make(document)))


def main() -> None:
    if "--pages" not in sys.argv:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    write_pages(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
