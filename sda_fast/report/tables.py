"""Tables of results, for the report and for a README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sda_fast.recommend.results import ResultRow

RECOMMENDER_NAMES = {
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "gru4rec": "GRU4Rec",
    "vbpr": "VBPR",
    "bpr": "VBPR",
    "random": "random",
    "popularity": "popularity",
    "transition": "item-to-item transitions",
}
METRIC_NAMES = {"hit@10": "Hit@10", "ndcg@10": "NDCG@10"}
PROTOCOL_NAMES = {"full": "all items", "sampled": "100 negatives"}
BASELINE = "baseline"
NOTHING = "-"


@dataclass
class Table:
    """Cells are plain text; those at (row, column) in `bold` are the best of their kind. The first columns are names.

    Attributes:
        names: how many columns, from the left, hold names; the others hold numbers.
    """

    header: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]]
    names: int = 1

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        align = ["---" if column < self.names else "---:" for column in range(len(self.header))]
        lines = [self.header, align]
        for row, cells in enumerate(self.rows):
            escaped = [cell.replace("|", "\\|") for cell in cells]
            lines.append([f"**{c}**" if (row, column) in self.bold else c for column, c in enumerate(escaped)])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def metrics_table(
    rows: Iterable[ResultRow],
    columns: Sequence[tuple[str, str, str]] = (
        ("full", "all", "hit@10"),
        ("full", "all", "ndcg@10"),
        ("sampled", "all", "hit@10"),
        ("sampled", "all", "ndcg@10"),
    ),
    labels: Sequence[str] | None = None,
) -> Table:
    """Mean ± standard deviation over seeds, a line per recommender and method, the best of a recommender in bold.

    Args:
        rows: of `RecommendResult.rows`.
        columns: (protocol, group, metric) per column.
        labels: of the columns; default made of metric and protocol.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str, str], ResultRow]] = {}
    for row in rows:
        cells.setdefault((row.recommender, row.method), {})[(row.protocol, row.group, row.metric)] = row
    order = _order_of(cells)
    if labels is None:
        labels = [f"{METRIC_NAMES[metric]}, {PROTOCOL_NAMES[protocol]}" for protocol, _, metric in columns]
    table = Table(["Recommender", "Item vectors", *labels], [], set(), names=2)
    blocks: dict[str, list[int]] = {}
    for position, (recommender, method) in enumerate(order):
        name = RECOMMENDER_NAMES.get(recommender, recommender)
        if method == BASELINE:
            names = [name, NOTHING]
        else:
            blocks.setdefault(name, []).append(position)
            names = [
                name,
                "none (BPR)" if recommender == "bpr" else "none (ID only)" if method == "ID only" else method,
            ]
        values = [_cell(cells[recommender, method].get(column)) for column in columns]
        table.rows.append([*names, *values])
    for block in blocks.values():
        for offset, column in enumerate(columns):
            means = {position: _mean(cells[order[position]].get(column)) for position in block}
            best = max(means.values())
            table.bold |= {(position, offset + 2) for position, mean in means.items() if mean == best and best > 0}
    return table


def groups_table(rows: Iterable[ResultRow], metric: str = "ndcg@10", protocol: str = "full") -> Table:
    """One metric by group of users and items; the header gives the number of users in each group."""
    rows = list(rows)
    users: dict[str, int] = {}
    for row in rows:
        if row.protocol == protocol and row.metric == metric:
            users.setdefault(row.group, row.users)
    labels = [f"{group} ({count:,})" for group, count in users.items()]
    return metrics_table(rows, [(protocol, group, metric) for group in users], labels)


def gains_table(rows: Iterable[ResultRow], references: Sequence[str], metric: str = "ndcg@10") -> Table | None:
    """Relative change of a full-ranking metric against reference methods, averaged over the recommenders.

    None where no method can be compared.
    """
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row.protocol, row.group, row.metric) == ("full", "all", metric) and row.method != BASELINE:
            means.setdefault(row.method, {})[RECOMMENDER_NAMES.get(row.recommender, row.recommender)] = row.mean
    references = [name for name in references if name in means]
    table = Table(["Item vectors", *(f"against {name}" for name in references)], [], set())
    for method, values in means.items():
        changes = [_mean_change(values, means[reference]) for reference in references if reference != method]
        if method in references[:1] or not any(changes):
            continue
        cells = [NOTHING if name == method else _mean_change(values, means[name]) or NOTHING for name in references]
        table.rows.append([method, *cells])
    return table if table.rows else None


def key_value_table(values: Mapping[str, object], header: tuple[str, str]) -> Table:
    """Two columns, a line per entry."""
    return Table(list(header), [[key, str(value)] for key, value in values.items()], set(), names=2)


def _mean_change(values: Mapping[str, float], reference: Mapping[str, float]) -> str:
    shared = [name for name in values if reference.get(name)]
    if not shared:
        return ""
    change = sum(values[name] / reference[name] - 1 for name in shared) / len(shared)
    return f"{100 * change:+.1f} %"


def _order_of(cells: Mapping[tuple[str, str], object]) -> list[tuple[str, str]]:
    recommenders = list(dict.fromkeys(RECOMMENDER_NAMES.get(recommender, recommender) for recommender, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))

    def place(pair: tuple[str, str]) -> tuple[bool, int, int]:
        name = RECOMMENDER_NAMES.get(pair[0], pair[0])
        return pair[1] != BASELINE, recommenders.index(name), methods.index(pair[1])

    return sorted(cells, key=place)


def _mean(row: ResultRow | None) -> float:
    return -1.0 if row is None else row.mean


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return NOTHING
    return f"{row.mean:.4f}" if row.std is None else f"{row.mean:.4f} ± {row.std:.4f}"
