"""What `finetune_bench` measured, as text, as a part of docs/finetune.md, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pages import TablePage

BEGIN = "<!-- tables of sda-fast bench --what finetune: begin -->"
END = "<!-- tables of sda-fast bench --what finetune: end -->"
UNITS = {"cuda": ("GiB", 1024**3), "cpu": ("MiB", 1024**2)}
PARTS = (
    "weights", "adapters", "optimizer", "gradients", "activations", "inputs", "workspaces", "temporary",
)  # fmt: skip
FROZEN = "no adapter"
Record = dict[str, Any]


def header(document: Record) -> tuple[str, ...]:
    unit, _ = UNITS[document["kind"]]
    times = ("method", "steps", "ms p20", "p50", "p80", "x MoDA")
    return (*times, f"peak {unit}", "x MoDA", f"reserved {unit}", "tokens/s", "padded tokens/s", "items/s")


def sized(document: Record, num_bytes: float | None) -> str:
    """Bytes in the unit of the document's device."""
    return "-" if num_bytes is None else f"{num_bytes / UNITS[document['kind']][1]:.2f}"


def cells(document: Record, record: Record) -> list[str]:
    """A timed record as the cells of `header`."""
    return [
        record["method"],
        str(record["steps"]),
        *(f"{value:.4g}" for value in record["milliseconds"]),
        f"{record['time_to_moda']:.2f}" if "time_to_moda" in record else "-",
        sized(document, record.get("peak_bytes")),
        f"{record['memory_to_moda']:.2f}" if "memory_to_moda" in record else "-",
        sized(document, record.get("reserved_bytes")),
        f"{record['tokens_per_second']:.0f}",
        f"{record['slots_per_second']:.0f}",
        f"{record['items_per_second']:.1f}",
    ]


def timed(document: Record) -> list[Record]:
    return [record for record in document["records"] if "milliseconds" in record]


def without_time(document: Record) -> list[str]:
    return [f"{record['method']}: {record['reason']}" for record in document["records"] if "reason" in record]


def as_text(document: Record) -> str:
    """One line per variant, then the plans."""
    width = max((len(record["method"]) for record in document["records"]), default=0) + 1
    lines = [f"{document['device']}; {document['model']}; {document['timer']}"]
    rows = [list(header(document)), *(cells(document, record) for record in timed(document))]
    lines += [f"{row[0]:<{width}}" + " ".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, *without_time(document), *kernel_lines(document), *planned_lines(document)])


def planned_lines(document: Record) -> Iterator[str]:
    unit, _ = UNITS[document["kind"]]
    for record in timed(document):
        if "deviation" in record.get("planned", {}):
            plan = record["planned"]
            yield (
                f"{record['method']}: planned {sized(document, plan['peak_bytes'])} {unit}, "
                f"measured {sized(document, record['peak_bytes'])} {unit}, {plan['deviation']:+.1%}"
            )


def kernel_lines(document: Record) -> Iterator[str]:
    """Where the GPU's time of one step goes, a line per profiled method."""
    frozen = next((one for one in timed(document) if one["method"] == FROZEN), {}).get("kernels", {})
    for record in timed(document):
        kernels = record.get("kernels", {})
        if "milliseconds" not in kernels:
            if "reason" in kernels:
                yield f"{record['method']}: {kernels['reason']}"
            continue
        total = kernels["milliseconds"]
        groups = ", ".join(f"{name} {value / total:.1%}" for name, value in kernels["by_group"].items())
        line = f"{record['method']}: {total:.0f} ms in {kernels['count']} kernels; {groups}"
        if record["method"] != FROZEN and "milliseconds" in frozen:
            line += f"; without an adapter {1 - frozen['milliseconds'] / total:.1%} less"
        yield line


def as_markdown(document: Record, picture: str | None) -> str:
    """One device: what was measured on what and how, then the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    percentiles = "/".join(map(str, document["percentiles"]))
    records = timed(document)
    items = records[0]["items"] if records else "-"
    tokens = f"{records[0]['tokens']:.0f} tokens ({records[0]['slots']:.0f} padded) a step" if records else ""
    beyond = "" if document["kind"] == "cuda" else ", here what a step takes beyond what was resident before it"
    lines = [
        f"### {document['device']}",
        "",
        f"{versions}. {document['model']}; preset `published`, {items} items a batch, {tokens}. One step in "
        f"milliseconds, percentiles {percentiles}: {document['timer']}. Peak: the most that tensors took in any step"
        f"{beyond}. `{document['command']}`",
    ]
    if picture:
        lines += ["", f"![Step time and peak memory by method]({picture})"]
    lines += ["", *table(header(document), [cells(document, record) for record in records])]
    lines += ["", *(f"- {line}" for line in without_time(document))] if without_time(document) else []
    kernels = list(kernel_lines(document))
    if kernels:
        lines += ["", "Time of the GPU in one step:", "", *(f"- {line}" for line in kernels)]
        lines += ["", *longest_kernels(records)]
    return "\n".join([*lines, "", *planned_table(document)]).rstrip()


def longest_kernels(records: Sequence[Record]) -> Iterator[str]:
    """The main run's longest kernels."""
    kernels = records[0].get("kernels", {}) if records else {}
    if "longest" not in kernels:
        return
    rows = [
        [f"`{one['name'][:60]}`", one["group"], str(one["count"]), f"{one['milliseconds']:.1f}"]
        for one in kernels["longest"]
    ]
    yield from table((f"longest kernels of {records[0]['method']}", "of", "launches", "ms"), rows)


def planned_table(document: Record) -> Iterator[str]:
    """The planner beside the measured peaks."""
    rows = []
    for record in timed(document):
        plan = record.get("planned")
        if plan is None:
            continue
        deviation = f"{plan['deviation']:+.1%}" if "deviation" in plan else "-"
        parts = [sized(document, plan["parts"].get(name, 0)) for name in PARTS]
        measured = sized(document, record["peak_bytes"]) if "deviation" in plan else "-"
        seconds = "-" if plan["seconds"] is None else f"{plan['seconds']:.2f}"
        rows.append([record["method"], *parts, sized(document, plan["peak_bytes"]), measured, deviation, seconds])
    if not rows:
        yield "The planner beside it: not run."
        return
    yield f"The planner for the step with the highest peak, parts in {UNITS[document['kind']][0]}:"
    yield ""
    yield from table(("method", *PARTS, "planned peak", "measured peak", "deviation", "planned s/step"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, the first column to the left."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def draw(document: Record, path: Path) -> Path:
    """Step time and peak memory, a bar per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, size = UNITS[document["kind"]]
    records = timed(document)[::-1]
    names = [record["method"] for record in records]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 0.9 + 0.32 * len(records)), layout="constrained")
    colours = ["#0072b2" if name.startswith("MoDA") else "#8a9199" for name in names]
    speed.barh(names, [record["milliseconds"][1] for record in records], color=colours)
    speed.set_xlabel("milliseconds a step")
    memory.barh(names, [(record.get("peak_bytes") or 0) / size for record in records], color=colours)
    memory.set_xlabel(f"peak memory, {unit}")
    memory.set_yticks([])
    for axis in (speed, memory):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"One step of fine-tuning ({document['device']})", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


TITLES = {"cuda": "On a GPU, the 7B model", "cpu": "On a CPU, a small model"}
PAGE = TablePage("finetune", BEGIN, END, TITLES, as_markdown, draw)
