"""What `cmsa_bench` measured, as text, as a part of docs/cmsa.md, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmsa_cases import PLAIN
from pages import TablePage

BEGIN = "<!-- tables of sda-fast bench --what cmsa: begin -->"
END = "<!-- tables of sda-fast bench --what cmsa: end -->"
HEADER = ("B", "method", "ms p20", "p50", "p80", "x floor", "x plain", "peak MB", "memory x plain", "error")
COUNTED = "counted MB"
OURS = "ours"
COLOURS = {
    OURS: "#0072b2",
    "plain PyTorch": "#d55e00",
    "as in open_clip": "#d55e00",
    "torch.compile": "#cc79a7",
    "checkpointed chunks": "#009e73",
}
Record = dict[str, Any]


def ratio(record: Record, name: str) -> str:
    return f"{record[name]:.3g}" if name in record else "-"


def step_bytes(record: Record) -> int:
    """The peak of the step itself: that of older records holds the memory that clears the cache before it."""
    return record["peak_bytes"] - record.get("clearing_bytes", 0)


def cells(record: Record, counted: bool = False) -> list[str]:
    """A timed record as the cells of HEADER, and of COUNTED if asked for."""
    expected = [f"{record['expected_bytes'] / 1e6:.4g}" if "expected_bytes" in record else "-"] if counted else []
    return [
        str(record["B"]),
        record["method"],
        *(f"{value:.4g}" for value in record["milliseconds"]),
        f"{record['to_floor']:.2f}",
        ratio(record, "to_plain"),
        f"{step_bytes(record) / 1e6:.4g}",
        ratio(record, "memory_to_plain"),
        f"{record['error']:.0e}",
        *expected,
    ]


def with_memory_ratios(records: Sequence[Record]) -> list[Record]:
    """Timed records with their memory over the plain way's, both that of the steps themselves."""
    plain = {record["B"]: record for record in records if record["method"] == PLAIN[record["loss"]]}
    return [
        record | {"memory_to_plain": step_bytes(record) / max(1, step_bytes(plain[record["B"]]))}
        if "memory_to_plain" in record
        else record
        for record in records
    ]


def of_tables(document: Record) -> dict[str, list[Record]]:
    """The records of one loss, length of vectors and dtype under a title."""
    tables: dict[str, list[Record]] = {}
    for record in document["records"]:
        tables.setdefault(f"{record['loss']}, D = {record['D']}, {record['dtype']}", []).append(record)
    return tables


def without_time(records: Sequence[Record]) -> list[str]:
    """Methods that have no time, each with its reason and the batches it holds for."""
    batches: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "reason" in record:
            batches.setdefault((record["method"], record["reason"]), []).append(str(record["B"]))
    return [f"{method}, B = {', '.join(of)}: {reason}" for (method, reason), of in batches.items()]


def as_text(document: Record) -> str:
    """A block per loss and length of vectors."""
    lines = [f"{document['device']}; {document['timer']}; forward + backward"]
    for title, records in of_tables(document).items():
        lines += ["", title, f"{HEADER[0]:>6} {HEADER[1]:<20}" + " ".join(f"{name:>9}" for name in HEADER[2:])]
        for record in records:
            if "milliseconds" in record:
                B, method, *rest = cells(record)
                lines.append(f"{B:>6} {method:<20}" + " ".join(f"{cell:>9}" for cell in rest))
        lines += [f"  {line}" for line in without_time(records)]
    return "\n".join(lines)


def as_markdown(document: Record, picture: str | None) -> str:
    """One device: what was measured on what and how, then a table per loss and length of vectors."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    percentiles = "/".join(map(str, document["percentiles"]))
    lines = [
        f"### {document['device']}",
        "",
        f"{versions}. Forward and backward, milliseconds, percentiles {percentiles}: {document['timer']}. Peak memory "
        f"is what a step takes beyond the vectors, gradients included. {rates(document)}",
        "",
        *(f"- `{command}`" for command in dict.fromkeys(r["command"] for r in document["records"])),
    ]
    if picture:
        lines += ["", f"![Time and peak memory by batch size]({picture})"]
    for title, records in of_tables(document).items():
        lines += ["", f"**{title}**", ""]
        timed = with_memory_ratios([record for record in records if "milliseconds" in record])
        if timed:
            counted = any("expected_bytes" in record for record in timed)
            header = [*HEADER, *[COUNTED] * counted]
            lines += ["| " + " | ".join(header) + " |", "| ---: | --- |" + " ---: |" * (len(header) - 2)]
            lines += ["| " + " | ".join(cells(record, counted)) + " |" for record in timed]
        lines += ["", *(f"- {line}" for line in without_time(records))]
    return "\n".join([*lines, *about_memory(document["records"])]).rstrip()


def about_memory(records: Sequence[Record]) -> list[str]:
    """What the figures of memory leave out, and which code they are of."""
    clearing = {record["clearing_bytes"] for record in records if "clearing_bytes" in record}
    lines = [f"The {size / 1e6:.4g} MB that clear the cache are taken off the measured peaks." for size in clearing]
    lines += [
        f"Measured of commit {code}, and counted of it too; what has changed since is not measured."
        for code in dict.fromkeys(record["code"] for record in records if "code" in record)
    ]
    return ["", *lines] if lines else []


def rates(document: Record) -> str:
    found = sorted(record["rate"] for record in document["records"] if "rate" in record)
    if not found:
        return ""
    return (
        f"The matrix product that the floor is from was measured in the same process each time: {found[0] / 1e9:.4g} "
        f"to {found[-1] / 1e9:.4g} Gop/s."
    )


def draw(document: Record, path: Path) -> Path:
    """Time over its floor (above) and peak memory (below) against the batch, a column per loss and D."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {
        title: [record for record in records if "milliseconds" in record]
        for title, records in of_tables(document).items()
    }
    timed = {title: records for title, records in timed.items() if records}
    figure, axes = pyplot.subplots(
        2, len(timed), figsize=(2.7 * len(timed) + 1, 5.6), squeeze=False, sharex=True, sharey="row",
        layout="constrained",
    )  # fmt: skip
    labelled: dict[str, Any] = {}
    for (title, records), (above, below) in zip(timed.items(), axes.T, strict=True):
        for method in dict.fromkeys(record["method"] for record in records):
            points = [record for record in records if record["method"] == method]
            style = {"color": COLOURS[method], "marker": "o", "ms": 3, "lw": 2.0 if method == OURS else 1.2}
            batches = [record["B"] for record in points]
            (labelled[method],) = above.plot(batches, [record["to_floor"] for record in points], **style)
            below.plot(batches, [step_bytes(record) / 1e6 for record in points], **style)
        above.axhline(1.0, color="#1d2127", lw=0.8)
        above.set_title(title, loc="left", fontsize=9)
        below.set_xlabel("items B")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("time / floor of its products")
    axes[1][0].set_ylabel("peak memory, MB")
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=len(labelled), fontsize=8, frameon=False
    )
    figure.suptitle(f"Contrastive losses, forward + backward ({document['device']})", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


TITLES = {"cuda": "The losses on a GPU", "cpu": "The losses on a CPU"}
PAGE = TablePage("cmsa", BEGIN, END, TITLES, as_markdown, draw)
