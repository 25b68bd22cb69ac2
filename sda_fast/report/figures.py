"""The report's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sda_fast.atomic import atomic_write
from sda_fast.recommend.results import ResultRow
from sda_fast.report.tables import BASELINE, METRIC_NAMES, RECOMMENDER_NAMES

# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too light for lines.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
NEUTRAL = "#8a929c"
INK = "#1d2127"
RESOLUTION = 160
LOOK: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": "#555e68",
    "ytick.color": INK,
    "figure.facecolor": "white",
    "legend.frameon": False,
}


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """One colour per method, the same in every picture; "ID only" is grey."""
    coloured = [name for name in dict.fromkeys(methods) if name not in ("ID only", BASELINE)]
    colours = {name: PALETTE[position % len(PALETTE)] for position, name in enumerate(coloured)}
    return {**colours, "ID only": NEUTRAL, BASELINE: NEUTRAL}


def draw_loss_curves(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> None:
    """Training loss by step, one panel per method (losses of different kinds do not share a scale).

    The thin line is every logged value, the thick one a running mean over a twentieth of them.
    """
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            1, len(logs), figsize=(max(5.5, 3.6 * len(logs)), 3.2), squeeze=False, layout="constrained"
        )
        for axis, (name, records) in zip(axes[0], logs.items(), strict=True):
            steps = np.array([record["step"] for record in records])
            losses = np.array([np.nan if record["loss"] is None else record["loss"] for record in records])
            window = max(1, len(losses) // 20)
            colour = colours.get(name, PALETTE[0])
            axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            mean = np.convolve(losses, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], mean, color=colour, linewidth=2)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.grid(axis="y", color="#e6e9ed", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.margins(x=0.02)
        axes[0][0].set_ylabel("training loss (nats)")
        _save(figure, path)


def draw_similarity_maps(path: Path, similarities: Mapping[str, np.ndarray], labels: Sequence[str]) -> None:
    """Heat maps image x text with one common scale; lines part the groups of equal `labels`."""
    limit = max(float(np.quantile(np.abs(similarity), 0.995)) for similarity in similarities.values()) or 1.0
    starts = [position for position, label in enumerate(labels) if position == 0 or labels[position - 1] != label]
    middles = [(first + last - 1) / 2 for first, last in zip(starts, [*starts[1:], len(labels)], strict=True)]
    grouped = len(starts) < len(labels)
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            1, len(similarities), figsize=(1.9 + 3.6 * len(similarities), 4.2), squeeze=False, layout="constrained"
        )
        for axis, (name, similarity) in zip(axes[0], similarities.items(), strict=True):
            picture = axis.imshow(similarity, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set_title(name)
            axis.set_xlabel("text of item")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            for start in starts[1:] if grouped else []:
                axis.axhline(start - 0.5, color="white", linewidth=1)
                axis.axvline(start - 0.5, color="white", linewidth=1)
        if grouped:
            axes[0][0].set_yticks(middles, [_shorten(labels[start], 18) for start in starts], fontsize=9)
            axes[0][0].tick_params(axis="y", length=0)
        axes[0][0].set_ylabel("image of item")
        bar = figure.colorbar(picture, ax=axes[0].tolist(), shrink=0.8, pad=0.015, extend="both")
        bar.set_label("cosine, means taken away")
        bar.outline.set_visible(False)  # type: ignore[operator]
        _save(figure, path)


def draw_metric_bars(
    path: Path, rows: Sequence[ResultRow], colours: Mapping[str, str], metric: str = "ndcg@10"
) -> None:
    """A panel per recommender, a bar per method with its standard deviation; a dashed line marks popularity."""
    chosen = [row for row in rows if (row.protocol, row.group, row.metric) == ("full", "all", metric)]
    methods = list(dict.fromkeys(row.method for row in chosen if row.method != BASELINE))
    panels: dict[str, dict[str, ResultRow]] = {}
    for row in chosen:
        if row.method != BASELINE:
            panels.setdefault(RECOMMENDER_NAMES.get(row.recommender, row.recommender), {})[row.method] = row
    popularity = next((row.mean for row in chosen if row.recommender == "popularity"), None)
    if not panels:
        panels = {"baselines": {RECOMMENDER_NAMES[row.recommender]: row for row in chosen}}
        methods, popularity = list(panels["baselines"]), None
    top = max(row.mean + (row.std or 0) for row in chosen)
    with plt.rc_context(LOOK):
        size = (2.0 + 2.5 * len(panels), 1.4 + 0.42 * len(methods))
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis, (name, of_method) in zip(axes[0], panels.items(), strict=True):
            for place, method in enumerate(methods):
                if method not in of_method:
                    continue
                row = of_method[method]
                axis.barh(place, row.mean, height=0.68, color=colours.get(method, NEUTRAL))
                if row.std is not None:
                    axis.errorbar(row.mean, place, xerr=row.std, color=INK, linewidth=1, capsize=2)
                axis.text(row.mean + (row.std or 0) + 0.02 * top, place, f"{row.mean:.3f}", va="center", fontsize=9)
            if popularity is not None:
                axis.axvline(popularity, color=INK, linestyle=(0, (3, 2)), linewidth=1, zorder=0)
            axis.set_title(name)
            axis.set_xlim(0, 1.22 * top)
            axis.xaxis.set_major_locator(MaxNLocator(3, prune="upper"))
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
        axes[0][0].set_yticks(range(len(methods)), methods)
        axes[0][0].invert_yaxis()
        figure.supxlabel(f"{METRIC_NAMES[metric]} among all items", fontsize=11, color="#555e68")
        _save(figure, path)


def draw_contact_sheet(path: Path, pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> None:
    """Pictures of the catalogue in a grid, a line of text under each."""
    lines = -(-len(pictures) // columns)
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            lines, columns, figsize=(1.35 * columns, 1.62 * lines), squeeze=False, layout="constrained"
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
            axis.imshow(np.asarray(picture))
            axis.set_title(_shorten(caption, 20), fontsize=7.5, loc="center", pad=3)
        _save(figure, path)


def _shorten(text: str, length: int) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=RESOLUTION, format="png")
    plt.close(figure)
