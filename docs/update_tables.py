"""Writes the tables of README.md from the results files: `python docs/update_tables.py` (`--check` only compares)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sda_fast.recommend import read_results
from sda_fast.report.tables import metrics_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REAL = {"movielens-small-posters": "MovieLens small with posters", "amazon-beauty-text": "Amazon Beauty, text only"}


def demo_table() -> str:
    """The demo's recommendation table with the machine it was made on."""
    folder = ROOT / "docs" / "results" / "demo"
    results = read_results(folder)
    picture = "![Hit@10 and NDCG@10 by method](docs/results/demo/metrics.png)"
    return f"{picture}\n\n{metrics_table(results.rows).markdown()}\n\n{_source(folder)}"


def real_tables() -> str:
    """One table per real catalogue, for all users and full ranking."""
    parts = []
    for name, title in REAL.items():
        folder = ROOT / "docs" / "results" / name
        results = read_results(folder)
        table = metrics_table(results.rows, [("full", "all", "hit@10"), ("full", "all", "ndcg@10")])
        parts.append(f"**{title}.**\n\n{table.markdown()}\n\n{_source(folder)}")
    return "\n\n".join(parts)


def _source(folder: Path) -> str:
    made = json.loads((folder / "made_with.json").read_text(encoding="utf-8"))
    path = folder.relative_to(ROOT)
    return f"[{path}](./{path}): {made['device']}; {made['versions']}; `{made['command']}`"


BLOCKS = {"demo": demo_table, "real": real_tables}


def updated(text: str) -> str:
    """README's text with every block between `<!-- name -->` and `<!-- /name -->` written anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{README.name} has no block {name!r}")
        content = make()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
