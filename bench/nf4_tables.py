"""What `nf4_run` measured, as text, as a part of docs/nf4.md, and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import TablePage

BEGIN, END = "<!-- tables of sda-fast bench --what nf4: begin -->", "<!-- tables of sda-fast bench --what nf4: end -->"
Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str]]


def middle(record: Record) -> str:
    return f"{record['milliseconds'][1]:.4g}"


def spread(record: Record) -> str:
    return f"{record['milliseconds'][0]:.4g}-{record['milliseconds'][2]:.4g}"


def times(name: str) -> Callable[[Record], str]:
    return lambda record: f"{record['to'][name]:.2f}" if name in record["to"] else "-"


def error(record: Record) -> str:
    return f"{record['error']:.1e}"


TIME: tuple[Column, ...] = (("ms", middle), ("p20-p80", spread))
# Per part: its title and the columns after the method's name.
PARTS: dict[str, tuple[str, tuple[Column, ...]]] = {
    "decode": (
        "Decoding alone",
        (
            *TIME,
            ("GB/s", lambda r: f"{r['gigabytes_per_second']:.4g}"),
            ("of copy", lambda r: f"{r['of_copy']:.0%}"),
            ("x bitsandbytes", times("bitsandbytes")),
            ("error", error),
        ),
    ),
    "product": (
        "One layer's product",
        (
            *TIME,
            ("x bitsandbytes", times("bitsandbytes")),
            ("x 16-bit", times("16-bit library product")),
            ("error", error),
        ),
    ),
    "decoder layer": (
        "A decoder layer in evaluation",
        (*TIME, ("x frozen", times("frozen, bitsandbytes")), ("x PEFT", times("PEFT LoRA")), ("error", error)),
    ),
    "embedding": (
        "Embedding a catalogue",
        (
            *TIME,
            ("items/s", lambda r: f"{r['items_per_second']:.4g}"),
            ("x loop", times("loop over experts, 16-bit")),
            ("x no adapter", times("no adapter, 4-bit")),
            ("error", error),
        ),
    ),
}


def of_cases(document: Record, part: str) -> dict[str, list[Record]]:
    records = [record for record in document["records"] if record["part"] == part]
    layers = list(dict.fromkeys(record.get("layer") for record in records))
    records.sort(key=lambda record: (layers.index(record.get("layer")), record.get("M", 0)))
    return {case: [r for r in records if r["case"] == case] for case in dict.fromkeys(r["case"] for r in records)}


def as_text(document: Record) -> str:
    """A block per part and case."""
    lines = [f"{document['device']}; {document['timer']}; CUDA library {document['cuda_library']}"]
    lines.append(f"copy: {document['copy_bytes_per_second'] / 1e9:.4g} GB/s, reads and writes counted")
    for part, (title, columns) in PARTS.items():
        for case, records in of_cases(document, part).items():
            lines += ["", f"{title}: {case}", " " * 42 + " ".join(f"{name:>14}" for name, _ in columns)]
            for record in records:
                shown = record.get("reason") or " ".join(f"{cell(record):>14}" for _, cell in columns)
                lines.append(f"  {record['method']:<40}{shown}")
    return "\n".join(lines)


def as_markdown(document: Record, picture: str | None) -> str:
    """One device: what was measured on what and how, then per part a table of every case."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    percentiles = "/".join(map(str, document["percentiles"]))
    lines = [
        f"### {document['device']}",
        "",
        f"{versions}. Times in milliseconds, percentiles {percentiles}: {document['timer']}. CUDA library "
        f"{document['cuda_library']}. Copying memory: {document['copy_bytes_per_second'] / 1e9:.4g} GB/s, reads and "
        f"writes counted. `{document['command']}`",
    ]
    if picture:
        lines += ["", f"![Time of our evaluation beside bitsandbytes' frozen layer]({picture})"]
    for part, (title, columns) in PARTS.items():
        cases = of_cases(document, part)
        lines += ["", f"**{title}**", ""]
        if not cases:
            lines.append("not measured")
            continue
        timed = [(case, r) for case, records in cases.items() for r in records if "milliseconds" in r]
        if timed:
            lines += ["| " + " | ".join(("case", "method", *(name for name, _ in columns))) + " |"]
            lines += ["| --- | --- |" + " ---: |" * len(columns)]
            lines += [
                "| " + " | ".join((case, r["method"], *(cell(r) for _, cell in columns))) + " |" for case, r in timed
            ]
        lines += ["", *without_time(cases)]
    return "\n".join(lines).rstrip()


def without_time(cases: dict[str, list[Record]]) -> list[str]:
    """Methods and cases that have no time, those with the same reason in one line."""
    named: dict[tuple[str, str], list[str]] = {}
    for case, records in cases.items():
        for record in records:
            if "reason" in record:
                named.setdefault((record["method"], record["reason"]), []).append(case)
    lines = []
    for (method, reason), of in named.items():
        where = "" if len(of) == len(cases) else f" ({'; '.join(of)})"
        lines.append(f"- {method}{where}: {reason}")
    return lines


def draw(document: Record, path: Path) -> Path:
    """Time over rows beside bitsandbytes' frozen layer, one panel per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in document["records"] if r["part"] == "product" and "bitsandbytes" in r.get("to", {})]
    layers = list(dict.fromkeys(r["layer"] for r in records))
    figure, axes = pyplot.subplots(
        1, len(layers), figsize=(3.6 * len(layers) + 1, 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    colours = {"MoDA, chosen here": "#0072b2", "bitsandbytes": "#1d2127", "16-bit library product": "#8a929c"}
    others = iter(("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b5b000"))
    for axis, layer in zip(axes.flat, layers, strict=True):
        for method in dict.fromkeys(r["method"] for r in records):
            points = sorted(
                (r["M"], r["to"]["bitsandbytes"]) for r in records if (r["layer"], r["method"]) == (layer, method)
            )
            if points:
                colour = colours.setdefault(method, next(others, "#555555"))
                width = 2.2 if method == "MoDA, chosen here" else 1.1
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=width, color=colour, label=method)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("rows M")
        axis.set_title(layer, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes.flat[0].set_ylabel("time / bitsandbytes' frozen layer")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"4-bit products ({document['device']})", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def has_products(document: Record) -> bool:
    return any(record["part"] == "product" and "milliseconds" in record for record in document["records"])


TITLES = {"cuda": "Measured on a GPU", "cpu": "Measured on a CPU"}
PAGE = TablePage("nf4", BEGIN, END, TITLES, as_markdown, draw, has_picture=has_products)
