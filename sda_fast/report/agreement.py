"""The part of the report that looks at the vectors themselves: do an item's image and text vector agree?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sda_fast.atomic import write_json_atomic
from sda_fast.data.items import Catalogue
from sda_fast.data.vectors import ItemVectors
from sda_fast.report.config import ReportConfig
from sda_fast.report.measures import (
    centred_cosine,
    cosine,
    effective_rank,
    grouping_attribute,
    label_of,
    ordered_sample,
    retrieval_accuracy,
    soft_targets,
)
from sda_fast.report.page import Heading, Paragraph, Part, Picture
from sda_fast.report.tables import Table

CUTOFFS = (1, 10)
TARGET_BATCH = 32
TARGET_TEMPERATURE = 3.0
"""Batch and temperature of the published training, for which the targets are shown."""


@dataclass(frozen=True)
class VectorMeasures:
    """Figures of one table of item vectors; retrieval shares are by direction and cutoff."""

    retrieval: dict[str, float]
    effective_rank_image: float
    effective_rank_text: float
    mean_norm_image: float
    mean_norm_text: float
    target_on_own_item: float
    target_on_fullest_item: float


def agreement(config: ReportConfig, catalogue: Catalogue | None, tables: Mapping[str, ItemVectors]) -> list[Part]:
    """Heat maps, retrieval, and the spread of the vectors, of the items that all tables have; writes measures.json."""
    from sda_fast.report.figures import draw_similarity_maps

    tables = {name: table for name, table in tables.items() if table.image.shape[1] == table.text.shape[1]}
    if not tables:
        return []
    shared = set.intersection(*(set(table.item_ids) for table in tables.values()))
    ids = [name for name in next(iter(tables.values())).item_ids if name in shared]
    if len(ids) < 2:
        return []
    attribute = config.order_by or (grouping_attribute(catalogue) if catalogue is not None else None)
    labels = [""] * len(ids)
    if catalogue is not None and attribute:
        known = {item.item_id: label_of(item.attributes.get(attribute)) for item in catalogue}
        labels = [known.get(name, "") for name in ids]
    sample = ordered_sample(labels, config.heatmap_items, config.seed)
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(ids))[: config.retrieval_items])
    similarities, measures = {}, {}
    for name, table in tables.items():
        image, text = table.image[table.rows(ids)], table.text[table.rows(ids)]
        similarities[name] = centred_cosine(image, text, sample)
        measures[name] = measure_vectors(image, text, drawn, config.seed)
    write_json_atomic(
        config.output / "measures.json",
        {
            "items": len(ids),
            "retrieval_items": len(drawn),
            "targets": {"batch_size": min(TARGET_BATCH, len(ids)), "temperature": TARGET_TEMPERATURE},
            "vectors": {name: vars(values) for name, values in measures.items()},
        },
    )
    path = config.output / "similarity.png"
    draw_similarity_maps(path, similarities, [labels[position] for position in sample])
    ordered = f", ordered by {attribute}" if attribute else ""
    return [
        Heading("Do image and text of an item agree?"),
        Picture(
            path,
            f"Similarity of the images (rows) and texts (columns) of {len(sample)} items{ordered}. "
            "An item's own pair is on the diagonal.",
        ),
        Paragraph(
            f"Retrieval among {len(drawn):,} items: how often an item's own counterpart is the nearest by cosine, or "
            "among the ten nearest. Centred: each modality's mean is taken away first, which mends an untuned model's "
            f"common offset. Chance is {1 / len(drawn):.4f} and {min(1.0, 10 / len(drawn)):.4f}."
        ),
        _retrieval_table(measures),
        Paragraph(
            "The spread of the vectors. Effective rank: how many directions carry the variance, 1 if all items lie on "
            f"a line. Targets: what CMSA's soft targets give an item itself, and the share of all target mass that the "
            f"most sought item of a batch attracts, in batches of {min(TARGET_BATCH, len(ids))} at temperature "
            f"{TARGET_TEMPERATURE:g}; a share near 1 means that all items are pulled towards one."
        ),
        _spread_table(measures),
    ]


def measure_vectors(image: np.ndarray, text: np.ndarray, drawn: np.ndarray, seed: int) -> VectorMeasures:
    """Measure the vectors [n, D] of n items; retrieval is among the rows `drawn`, targets are of random batches."""
    plain, centred = cosine(image[drawn], text[drawn]), centred_cosine(image, text, drawn)
    directions = {"image→text": plain, "text→image": plain.T, "image→text, centred": centred}
    own, fullest = _target_shares(image, text, seed)
    return VectorMeasures(
        retrieval={
            f"{direction}, top {cutoff}": retrieval_accuracy(matrix, cutoff)
            for direction, matrix in directions.items()
            for cutoff in CUTOFFS
        },
        effective_rank_image=effective_rank(image),
        effective_rank_text=effective_rank(text),
        mean_norm_image=float(np.linalg.norm(image, axis=1).mean()),
        mean_norm_text=float(np.linalg.norm(text, axis=1).mean()),
        target_on_own_item=own,
        target_on_fullest_item=fullest,
    )


def _target_shares(image: np.ndarray, text: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean over random batches of the targets' diagonal, and of the largest column's share of all mass."""
    order = np.random.default_rng(seed).permutation(len(image))
    size = min(TARGET_BATCH, len(order))
    own, fullest = [], []
    for start in range(0, len(order) - size + 1, size):
        batch = order[start : start + size]
        targets = soft_targets(image[batch], text[batch], TARGET_TEMPERATURE)
        own.append(np.diagonal(targets).mean())
        fullest.append(np.max(targets.mean(0)))
    return float(np.mean(own)), float(np.mean(fullest))


def _retrieval_table(measures: Mapping[str, VectorMeasures]) -> Table:
    columns = list(next(iter(measures.values())).retrieval)
    table = Table(["Item vectors", *columns], [], set())
    for name, values in measures.items():
        table.rows.append([name, *(f"{values.retrieval[column]:.3f}" for column in columns)])
    for column in range(1, len(columns) + 1):
        best = max(row[column] for row in table.rows)
        table.bold |= {(row, column) for row, cells in enumerate(table.rows) if cells[column] == best}
    return table


def _spread_table(measures: Mapping[str, VectorMeasures]) -> Table:
    header = [
        "Item vectors",
        "effective rank, image",
        "effective rank, text",
        "mean norm, image",
        "mean norm, text",
        "target on the item itself",
        "target on the most sought item",
    ]
    rows = [
        [
            name,
            *(f"{value:.1f}" for value in (m.effective_rank_image, m.effective_rank_text)),
            *(f"{value:.2f}" for value in (m.mean_norm_image, m.mean_norm_text)),
            *(f"{value:.3f}" for value in (m.target_on_own_item, m.target_on_fullest_item)),
        ]
        for name, m in measures.items()
    ]
    return Table(header, rows, set())
