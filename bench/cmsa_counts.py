"""Count what a step of our losses starts and takes on an H200, without one: `python bench/cmsa_counts.py`.

The real code runs on fake tensors (`sda_fast.planning.loss`); nothing is timed. Writes bench/results/counts-cmsa.json
and the table of docs/cmsa.md. `--pages` only writes the table anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cmsa_cases import FLOOR, METHODS, OURS
from pages import replace_between
from sda_fast.atomic import write_json_atomic
from sda_fast.jobs.fingerprint import versions
from sda_fast.ops.cmsa import GPU_WORKSPACE_BYTES, batch_of, gpu_workspace
from sda_fast.ops.cmsa_blocks import cut_within
from sda_fast.ops.cmsa_products import forced_products
from sda_fast.planning.cards import Card, card_named
from sda_fast.planning.ledger import OTHER, PRODUCT, TRITON
from sda_fast.planning.loss import count_loss

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "counts-cmsa.json"
PAGE = ROOT / "docs" / "cmsa.md"
BEGIN, END = "<!-- table of cmsa_counts: begin -->", "<!-- table of cmsa_counts: end -->"
ITEMS, DIMENSIONS, CARD = (1024, 8192, 16384, 65536), 3584, "H200 SXM"
KINDS = (PRODUCT, TRITON, OTHER)
HEADER = ("loss", "B", "blocks of", "operations", "floor", *KINDS, "launches", "extra MiB", "peak MiB")
BY_HALVES = " by halves"
LOSSES = ("CMSA", f"CMSA{BY_HALVES}", "InfoNCE")
Record = dict[str, Any]


def counted(name: str, items: int, dimensions: int, card: Card) -> Record:
    """One step in bfloat16; `operations` in units of B^2 D, `extra_bytes` beside vectors and gradients."""
    loss, way = name.removesuffix(BY_HALVES), "halves" if name.endswith(BY_HALVES) else "library"
    with forced_products(way):
        count = count_loss(items, dimensions, torch.bfloat16, card, METHODS[loss][OURS].make())
    vectors = torch.empty(items, dimensions, dtype=torch.bfloat16, device="meta")
    batch = batch_of(vectors, loss == "CMSA", way)._replace(multiprocessors=card.multiprocessors)
    cut = cut_within(gpu_workspace(vectors, way), batch)
    return {
        "loss": name,
        "B": items,
        "D": dimensions,
        "dtype": "bfloat16",
        "block": cut.block,
        "strip": cut.strip,
        "operations": round(count.operations / (items**2 * dimensions), 3),
        "launches": {kind: count.launches.get(kind, 0) for kind in KINDS},
        "extra_bytes": count.extra_bytes,
        "peak_bytes": count.peak_bytes,
    }


def measure() -> Record:
    card = card_named(CARD)
    return {
        "card": card.name,
        "multiprocessors": card.multiprocessors,
        "workspace_bytes": GPU_WORKSPACE_BYTES,
        "versions": versions(),
        "command": "python bench/cmsa_counts.py",
        "what": "counted on fake tensors, not measured",
        "records": [counted(loss, items, DIMENSIONS, card) for loss in LOSSES for items in ITEMS],
    }


def table(document: Record) -> str:
    """The records as markdown, and where they are from."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    for record in document["records"]:
        launches = [record["launches"][kind] for kind in KINDS]
        cells = [
            record["loss"],
            record["B"],
            "all" if record["block"] == record["B"] else record["block"],
            f"{record['operations']:.1f}",
            FLOOR[record["loss"].removesuffix(BY_HALVES)],
            *launches,
            sum(launches),
            *(f"{record[name] / 2**20:.0f}" for name in ("extra_bytes", "peak_bytes")),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    first = document["records"][0]
    source = (
        f"`{document['command']}`: D = {first['D']}, {first['dtype']}, {document['multiprocessors']} multiprocessors "
        f"({document['card']}); {document['what']}."
    )
    return "\n".join([*lines, "", source])


def main() -> None:
    if "--pages" not in sys.argv:
        write_json_atomic(RESULTS, measure())
    replace_between(PAGE, BEGIN, END, table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
