"""The job `report`: one page, as Markdown with pictures beside it and as one HTML file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sda_fast import __version__
from sda_fast.atomic import write_text_atomic
from sda_fast.data.images import load_image
from sda_fast.data.items import Catalogue, read_items
from sda_fast.data.vectors import ItemVectors, read_item_vectors
from sda_fast.jobs.run_log import read_log
from sda_fast.recommend.results import RecommendResult, read_results
from sda_fast.report.agreement import agreement
from sda_fast.report.config import ReportConfig
from sda_fast.report.measures import label_of
from sda_fast.report.page import Heading, Paragraph, Part, Picture, to_html, to_markdown
from sda_fast.report.tables import gains_table, groups_table, key_value_table, metrics_table

logger = logging.getLogger(__name__)

SHEET_ITEMS = 24
SYNTHETIC_NOTICE = (
    "These data are synthetic: generated pictures, generated texts and simulated users. "
    "The figures show that the parts work together; they say nothing about real catalogues."
)


def write_report(config: ReportConfig) -> Path:
    """Write report.html (pictures inside), report.md (pictures as PNG beside it) and measures.json.

    Sections, each present where its input is: the data, the catalogue's pictures, loss curves, agreement of image and
    text vectors (heat maps, retrieval, spread and the targets they give), metrics by method and by group, durations,
    settings and versions.

    Returns:
        The path of report.html.

    Raises:
        DataError: a table of vectors or the catalogue is missing or broken.
        FileNotFoundError: no results where `config.results` points.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    catalogue = None if config.items is None else read_items(config.items, config.images)
    results = None if config.results is None else read_results(config.results)
    tables = {name: read_item_vectors(path) for name, path in config.vectors.items()}
    title = config.title or (results.data["dataset"]["name"] if results else "") or "item vectors"
    parts: list[Part] = [Heading(f"SDA on {title}", 1)]
    if config.synthetic:
        parts.append(Paragraph(SYNTHETIC_NOTICE, emphasized=True))
    if results is not None:
        parts += _summary(results, list(tables))
    parts += _data(config, catalogue, results)
    parts += _losses(config, list(tables))
    parts += agreement(config, catalogue, tables)
    if results is not None:
        parts += _metrics(config, results, list(tables))
    parts += _durations(config, results)
    parts += _settings(results, tables)
    write_text_atomic(config.output / "report.md", to_markdown(parts, config.output))
    path = config.output / "report.html"
    write_text_atomic(path, to_html(parts, f"SDA on {title}"))
    return path


def _summary(results: RecommendResult, methods: Sequence[str]) -> list[Part]:
    table = gains_table(results.rows, ["ID only", *methods[:1]])
    if table is None:
        return []
    seeds = len(results.data["config"]["seeds"])
    return [
        Heading("In short"),
        Paragraph(
            "Relative change of NDCG@10 among all items on the test split, averaged over the recommenders "
            f"({seeds} {'seed' if seeds == 1 else 'seeds'} each)."
        ),
        table,
    ]


def _data(config: ReportConfig, catalogue: Catalogue | None, results: RecommendResult | None) -> list[Part]:
    facts: dict[str, object] = {"kind": "synthetic (generated)"} if config.synthetic else {}
    if config.data_note:
        facts["source"] = config.data_note
    if catalogue is not None:
        facts["items in the catalogue"] = f"{len(catalogue):,}"
        facts["items that name a picture"] = f"{sum(item.image is not None for item in catalogue):,}"
        facts.update({f"warning: {name}": f"{count:,}" for name, count in sorted(catalogue.warnings.items())})
    if results is not None:
        data = results.data["dataset"]
        names = ("users", "evaluated_users", "items", "interactions", "training_interactions")
        facts.update({name.replace("_", " "): f"{data[name]:,}" for name in names})
        facts.update({f"test users, {name}": f"{count:,}" for name, count in data["groups"].items() if name != "all"})
        facts.update({f"warning: {name}": f"{count:,}" for name, count in sorted(data["warnings"].items())})
    if not facts:
        return []
    parts: list[Part] = [Heading("The data"), key_value_table(facts, ("", ""))]
    if catalogue is not None and config.contact_sheet:
        parts += _contact_sheet(config, catalogue)
    return parts


def _contact_sheet(config: ReportConfig, catalogue: Catalogue) -> list[Part]:
    from sda_fast.report.figures import draw_contact_sheet

    shown = [item for item in catalogue if item.image is not None and item.image.is_file()]
    if not shown:
        return []
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(shown))[:SHEET_ITEMS])
    pictures = [load_image(shown[position])[0] for position in chosen]
    names = [_name_of(shown[position].attributes, shown[position].item_id) for position in chosen]
    path = config.output / "catalogue.png"
    draw_contact_sheet(path, pictures, names)
    drawn = "generated items" if config.synthetic else "items"
    return [Picture(path, f"{len(chosen)} {drawn} of the catalogue, drawn at random.")]


def _name_of(attributes: dict[str, object], item_id: str) -> str:
    for key in ("title", "name"):
        if label_of(attributes.get(key)):
            return label_of(attributes[key])
    return item_id


def _losses(config: ReportConfig, methods: Sequence[str]) -> list[Part]:
    from sda_fast.report.figures import colours_of, draw_loss_curves

    logs = {name: _read_losses(path) for name, path in config.logs.items()}
    logs = {name: records for name, records in logs.items() if records}
    if not logs:
        return []
    path = config.output / "loss.png"
    draw_loss_curves(path, logs, colours_of([*methods, *logs]))
    caption = "Training loss by step: every logged value (thin) and a running mean (thick). Scales differ by method."
    return [Heading("Fine-tuning"), Picture(path, caption)]


def _read_losses(path: Path) -> list[dict[str, Any]]:
    records = [record for record in read_log(path) if "loss" in record]
    if not records:
        logger.warning("%s holds no losses, its curve is left out", path)
    return records


def _metrics(config: ReportConfig, results: RecommendResult, methods: Sequence[str]) -> list[Part]:
    from sda_fast.report.figures import colours_of, draw_metric_bars

    rows = results.rows
    path = config.output / "metrics.png"
    draw_metric_bars(path, rows, colours_of([*methods, *(row.method for row in rows)]))
    seeds = results.data["config"]["seeds"]
    spread = "No spread is shown for a single seed." if len(seeds) == 1 else "± is the standard deviation over seeds."
    parts: list[Part] = [Heading("Recommendation")]
    if not results.data["complete"]:
        parts.append(Paragraph("The job had not finished when this page was written.", emphasized=True))
    return [
        *parts,
        Paragraph(
            "Leave-one-out: each user's last item is the test item, the last but one chooses the best epoch. Items "
            f"that a user met before are not ranked. Seeds {', '.join(map(str, seeds))}. {spread} "
            "The best of each recommender is in bold."
        ),
        Picture(path, "NDCG@10 by recommender and item vectors; whiskers: standard deviation; dashed: popularity."),
        metrics_table(rows),
        Paragraph(
            "NDCG@10 among all items, by group (number of test users): tail items have fewer than 4 training "
            "interactions, popular ones the others; short users have fewer than 9 items in all, long users the others."
        ),
        groups_table(rows),
    ]


def _durations(config: ReportConfig, results: RecommendResult | None) -> list[Part]:
    seconds: dict[str, float] = {}
    if config.timings is not None and config.timings.is_file():
        seconds.update(json.loads(config.timings.read_text(encoding="utf-8")))
    lines = {name: _duration(value) for name, value in seconds.items()}
    if results is not None:
        of_pair: dict[str, list[float]] = {}
        for run in results.data["runs"]:
            if run["method"] != "baseline":
                of_pair.setdefault(f"train {run['recommender']}, {run['method']} (per seed)", []).append(
                    run["train_seconds"]
                )
        lines.update({name: _duration(float(np.mean(values))) for name, values in of_pair.items()})
    return [Heading("How long it took"), key_value_table(lines, ("part", "duration"))] if lines else []


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _settings(results: RecommendResult | None, tables: dict[str, ItemVectors]) -> list[Part]:
    parts: list[Part] = [Heading("Settings and versions")]
    versions: dict[str, object] = {"sda-fast": __version__}
    if results is not None:
        versions.update(results.data["versions"])
        versions["device of `recommend`"] = results.data["device"]
    parts.append(key_value_table(versions, ("software", "version")))
    for name, table in tables.items():
        facts: dict[str, object] = {"items": len(table), "width of a modality": table.image.shape[1]}
        facts["width for recommenders"] = table.vectors.shape[1]
        facts.update({key: _shorten(value) for key, value in sorted(table.metadata.items())})
        parts += [Paragraph(f"Item vectors {name}:"), key_value_table(facts, ("property", "value"))]
    if results is not None:
        settings = {name: value for name, value in results.data["config"].items() if name not in _PATHS}
        parts += [Paragraph("Recommenders:"), key_value_table(settings, ("setting", "value"))]
    return parts


_PATHS = ("interactions", "output", "items", "vectors", "progress")


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else text[:119] + "…"
