"""What `layers` measured, as text, as a part of docs/performance.md, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import TablePage

BEGIN, END = "<!-- tables of sda-fast bench: begin -->", "<!-- tables of sda-fast bench: end -->"
HEADER = ("method", "ms p20", "p50", "p80", "x frozen", "x PEFT", "peak MiB", "kept / x", "error")
TRAINING = "forward + backward"
FROZEN, OURS = "frozen layer", "MoDA"
Record = dict[str, Any]


def figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cells(record: Record) -> list[str]:
    """A record as the cells of HEADER."""
    milliseconds = [f"{value:.4g}" for value in record["milliseconds"]]
    peak = record["peak_bytes"]
    return [
        record["method"],
        *milliseconds,
        figure(record["to_frozen"], 2),
        figure(record["to_peft"], 2),
        figure(None if peak is None else peak / 2**20, 1),
        figure(record.get("bytes_kept_per_x"), 2),
        f"{record['error']:.1e}",
    ]


def of_cases(document: Record) -> dict[str, list[Record]]:
    """The records by case, in the order of measuring; not those of methods that no case could run."""
    records = [record for record in document["records"] if record["method"] not in document["not_run"]]
    return {case: [r for r in records if r["case"] == case] for case in dict.fromkeys(r["case"] for r in records)}


def as_text(document: Record) -> str:
    """A block per case and pass, after the device and what was not run."""
    lines = [f"{document['device']}; {document['timer']}"]
    lines += [f"{name}: not run, {reason}" for name, reason in document["not_run"].items()]
    for case, records in of_cases(document).items():
        lines += ["", case]
        for mode in dict.fromkeys(record["mode"] for record in records if "mode" in record):
            lines.append(f"{mode:<24} " + " ".join(f"{name:>9}" for name in HEADER[1:]))
            for record in records:
                if record.get("mode") == mode:
                    name, *rest = cells(record)
                    lines.append(f"  {name:<22} " + " ".join(f"{cell:>9}" for cell in rest))
        lines += [f"  {record['method']:<22} {record['reason']}" for record in records if "reason" in record]
    return "\n".join([*lines, "", *summary(document)])


def summary(document: Record) -> list[str]:
    """A line per case: every method's time of forward + backward, in times of the frozen layer's."""
    trained = [record for record in document["records"] if record.get("mode") == TRAINING]
    names = [name for name in dict.fromkeys(record["method"] for record in trained) if name != FROZEN]
    lines = [f"summary: {TRAINING}, times the {FROZEN}'s on {document['device']}"]
    lines += ["   ".join([*names, "case"])] if names else []
    for case, records in of_cases(document).items():
        times = {record["method"]: record["to_frozen"] for record in records if record.get("mode") == TRAINING}
        reason = "" if times else f": {records[0]['reason']}"
        lines.append("   ".join([*(f"{figure(times.get(name), 2):>{len(name)}}" for name in names), case + reason]))
    return lines


def as_markdown(document: Record, picture: str | None) -> str:
    """One device: what was measured on what and how, then a table per case and mode."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    percentiles = "/".join(map(str, document["percentiles"]))
    lines = [
        f"### {document['device']}",
        "",
        f"{versions}. Times in milliseconds, percentiles {percentiles}: {document['timer']}. `{document['command']}`",
    ]
    lines += ["", *(f"{name}: not run, {reason}." for name, reason in document["not_run"].items())]
    if picture:
        lines += ["", f"![Time of forward and backward beside the frozen layer's]({picture})"]
    for case, records in of_cases(document).items():
        lines += ["", f"**{case}**", ""]
        timed = [record for record in records if "mode" in record]
        if timed:
            lines += ["| " + " | ".join(("pass", *HEADER)) + " |", "| --- | --- |" + " ---: |" * (len(HEADER) - 1)]
            lines += ["| " + " | ".join((record["mode"], *cells(record))) + " |" for record in timed]
        lines += ["", *(f"{record['method']}: {record['reason']}." for record in records if "reason" in record)]
    return "\n".join(lines).rstrip()


def draw(document: Record, path: Path) -> Path:
    """Bars of forward + backward beside the frozen layer's time, one panel per case.

    Raises:
        ValueError: no case has a frozen layer's time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars_of = {
        case: [r for r in records if r.get("mode") == TRAINING and r["to_frozen"] is not None]
        for case, records in of_cases(document).items()
    }
    bars_of = {case: bars for case, bars in bars_of.items() if bars}
    if not bars_of:
        raise ValueError(f"nothing to draw in {path}: no case has a time of the {FROZEN}")
    columns = 2 if len(bars_of) > 1 else 1
    lines = -(-len(bars_of) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.2 * columns, 2.1 * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(bars_of) :]:
        axis.set_visible(False)
    for axis, (case, bars) in zip(axes.flat, bars_of.items(), strict=False):
        names, values = [bar["method"] for bar in bars], [bar["to_frozen"] for bar in bars]
        colours = ["#0072b2" if name == OURS else "#8a929c" for name in names]
        drawn = axis.barh(names, values, color=colours)
        axis.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axis.axvline(1.0, color="#1d2127", linewidth=0.8)
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_title(case, loc="left", fontsize=9)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"Forward + backward, times the frozen layer's ({document['device']})", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


TITLES = {"cpu": "One adapted layer on a CPU", "cuda": "One adapted layer on a GPU"}
PAGE = TablePage("moda", BEGIN, END, TITLES, as_markdown, draw, has_picture=lambda document: True)
