"""What `cached_bench` measured, as text, as a part of docs/cmsa.md, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import TablePage

BEGIN = "<!-- tables of sda-fast bench --what cached: begin -->"
END = "<!-- tables of sda-fast bench --what cached: end -->"
HEADER = ("B", "chunks of", "ms p20", "p50", "p80", "x direct", "peak MB", "memory x direct", "error")
COLOURS = ("#1d2127", "#d55e00", "#009e73", "#0072b2", "#cc79a7")
Record = dict[str, Any]


def chunks_of(record: Record) -> str:
    return str(record["chunk"]) if record["chunk"] else "all (direct)"


def cells(record: Record) -> list[str]:
    """A timed record as the cells of HEADER."""
    return [
        str(record["B"]),
        chunks_of(record),
        *(f"{value:.4g}" for value in record["milliseconds"]),
        f"{record['to_direct']:.2f}" if "to_direct" in record else "-",
        f"{record['peak_bytes'] / 1e6:.4g}",
        f"{record['memory_to_direct']:.3f}" if "memory_to_direct" in record else "-",
        f"{record['error']:.0e}",
    ]


def without_time(document: Record) -> list[str]:
    return [f"B = {r['B']}, {chunks_of(r)}: {r['reason']}" for r in document["records"] if "reason" in r]


def timed(document: Record) -> list[Record]:
    return [record for record in document["records"] if "milliseconds" in record]


def as_text(document: Record) -> str:
    """One line per case."""
    lines = [f"{document['device']}; {document['timer']}; one step", " ".join(f"{name:>15}" for name in HEADER)]
    lines += [" ".join(f"{cell:>15}" for cell in cells(record)) for record in timed(document)]
    return "\n".join(lines + without_time(document))


def as_markdown(document: Record, picture: str | None) -> str:
    """One device: what was measured on what and how, then the table."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    percentiles = "/".join(map(str, document["percentiles"]))
    models = ", ".join(dict.fromkeys(record["model"] for record in timed(document)))
    lines = [
        f"### {document['device']}",
        "",
        f"{versions}. Qwen2.5-VL with MoDA (E = 8, r = 8, dropout 0.1), {models}. One step in milliseconds, "
        f"percentiles {percentiles}: {document['timer']}. Peak memory is what a step takes beyond the model and the "
        f"batch's inputs. `{document['command']}`",
    ]
    if picture:
        lines += ["", f"![Peak memory and time of a step by batch and chunk size]({picture})"]
    lines += ["", "| " + " | ".join(HEADER) + " |", "|" + " ---: |" * len(HEADER)]
    lines += ["| " + " | ".join(cells(record)) + " |" for record in timed(document)]
    return "\n".join([*lines, "", *(f"- {line}" for line in without_time(document))]).rstrip()


def draw(document: Record, path: Path) -> Path:
    """Peak memory and time per item against the batch, a line per chunk size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    names = dict.fromkeys(chunks_of(record) for record in timed(document))
    for name, colour in zip(names, COLOURS, strict=False):
        points = [record for record in timed(document) if chunks_of(record) == name]
        batches = [record["B"] for record in points]
        memory.plot(batches, [r["peak_bytes"] / 1e6 for r in points], marker="o", ms=3, color=colour, label=name)
        speed.plot(batches, [r["milliseconds"][1] / r["B"] for r in points], marker="o", ms=3, color=colour)
    memory.set_yscale("log")
    memory.set_ylabel("peak memory, MB")
    speed.set_ylabel("milliseconds per item")
    speed.set_ylim(bottom=0)
    for axis in (memory, speed):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("items B")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    memory.legend(title="chunks of", fontsize=8, frameon=False)
    figure.suptitle(f"One contrastive step ({document['device']})", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


TITLES = {"cuda": "The cached step on a GPU", "cpu": "The cached step on a CPU"}
PAGE = TablePage("cached", BEGIN, END, TITLES, as_markdown, draw)
