"""The tables of docs/memory.md and docs/planning.md are those of their results files."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pages_hold_the_tables_of_the_results_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import memory_diet
    import tower_cache_speed

    document = json.loads((ROOT / "bench" / "results" / "memory-diet.json").read_text(encoding="utf-8"))
    memory, planning = ((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("memory", "planning"))
    assert "\n".join(memory_diet.diet_table(document)) in memory
    assert tower_cache_speed.text_of(ROOT / "bench" / "results") in memory
    assert "\n".join(memory_diet.planned_tables(document)) in planning


def test_the_goals_are_met_batch_32_in_12_gib_and_4096_in_16():
    document = json.loads((ROOT / "bench" / "results" / "memory-diet.json").read_text(encoding="utf-8"))
    base = next(iter(document["diet"].values()))
    assert base["fits"] and base["memory"] == 12 * 2**30 and base["step"]["batch_size"] == 32
    large = document["planned"]["4096"]
    assert [line["step"]["batch_size"] for line in large] == [4096, 4096]
    assert all(line["fits"] and line["memory"] == 16 * 2**30 for line in large)
