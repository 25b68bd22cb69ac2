"""The page contains what it must, says what is synthetic, and stands alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sda_fast.data.items import read_items
from sda_fast.data.vectors import ItemVectors, write_item_vectors
from sda_fast.recommend.ranking import GROUPS, PROTOCOLS
from sda_fast.recommend.results import read_results, summarize
from sda_fast.report import ReportConfig, gains_table, groups_table, metrics_table, write_report
from sda_fast.report.agreement import measure_vectors
from sda_fast.report.measures import (
    centred_cosine,
    cosine,
    effective_rank,
    grouping_attribute,
    ordered_sample,
    retrieval_accuracy,
    soft_targets,
)

NOTHING = "-"
COLOURS = ("red", "green", "blue", "olive", "navy", "plum")
VALUES = {
    ("baseline", "popularity"): 0.03,
    ("ID only", "sasrec"): 0.06,
    ("zero-shot", "sasrec"): 0.08,
    ("SDA", "sasrec"): 0.10,
    ("ID only", "bpr"): 0.04,
    ("zero-shot", "vbpr"): 0.05,
    ("SDA", "vbpr"): 0.045,
}


def results_data(seeds: tuple[int, ...] = (0, 1)) -> dict:
    runs = [
        {
            "method": method,
            "recommender": recommender,
            "seed": seed,
            "train_seconds": 75.0,
            "evaluate_seconds": 1.0,
            "metrics": {
                protocol: {
                    group: {
                        "hit@10": 2 * value,
                        "ndcg@10": value + 0.002 * seed,
                        "users": 0 if group == "tail items" else 40,
                    }
                    for group in GROUPS
                }
                for protocol in PROTOCOLS
            },
        }
        for (method, recommender), value in VALUES.items()
        for seed in (seeds if method != "baseline" else seeds[:1])
    ]
    return {
        "format": 1,
        "complete": True,
        "config": {"seeds": list(seeds), "loss": "ce", "output": "somewhere"},
        "versions": {"python": "3.11.0", "torch": "2.13.0", "cornac": "3.0.1"},
        "device": "CPU, 2 threads",
        "dataset": {
            "name": "tiny shop",
            "users": 42,
            "evaluated_users": 40,
            "items": 60,
            "interactions": 400,
            "training_interactions": 320,
            "groups": dict.fromkeys(GROUPS, 40),
            "warnings": {"few_interactions": 2},
        },
        "seconds": 12.0,
        "runs": runs,
        "table": [row.__dict__ for row in summarize(runs)],
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines, ids = [], []
    for number in range(60):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{number}.png")
        ids.append(f"item{number}")
        entry = {
            "item_id": ids[-1],
            "title": f"A {colour} thing, $ {number}",
            "colour": colour,
            "image": f"images/{number}.png",
        }
        lines.append(json.dumps(entry))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    topics = np.eye(len(COLOURS), 12, dtype=np.float32)[np.arange(60) % len(COLOURS)]
    for name, noise in (("zero-shot", 2.0), ("SDA", 0.3)):
        own = 0.5 * rng.standard_normal((60, 12))
        image = (3 + topics + own + noise * rng.standard_normal((60, 12))).astype(np.float32)
        text = (topics + own + noise * rng.standard_normal((60, 12))).astype(np.float32)
        table = ItemVectors(ids, image, text, np.concatenate([image, text], axis=1), {"model": f"tiny {name}"})
        write_item_vectors(folder / f"{name}.safetensors", table)
    for name in ("LoRA", "SDA"):
        records = [{"step": step, "loss": 4 / step**0.3 + 0.1 * rng.standard_normal()} for step in range(1, 200)]
        text = "\n".join(json.dumps(record) for record in records) + '\n{"step": 200, "lo'
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "timings.json").write_text(json.dumps({"fine-tune SDA": 83.2, "embed SDA": 12.0}))
    (folder / "results.json").write_text(json.dumps(results_data()))
    return folder


def whole_config(inputs: Path, output: Path, **changes) -> ReportConfig:
    settings = {
        "output": output,
        "results": inputs / "results.json",
        "vectors": {name: inputs / f"{name}.safetensors" for name in ("zero-shot", "SDA")},
        "logs": {name: inputs / f"{name}.jsonl" for name in ("LoRA", "SDA")},
        "items": inputs / "items.jsonl",
        "timings": inputs / "timings.json",
        "title": "the tiny shop",
        "synthetic": True,
    }
    return ReportConfig(**{**settings, **changes})


def test_the_page_holds_data_curves_heat_maps_tables_bars_pictures_times_and_versions(inputs, tmp_path) -> None:
    path = write_report(whole_config(inputs, tmp_path))
    assert path == tmp_path / "report.html"
    page, text = path.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in (
        "synthetic",
        "the tiny shop",
        "NDCG@10, all items",
        "Hit@10, 100 negatives",
        "ordered by colour",
        "1 min 23 s",
        "1 min 15 s",
        "cornac",
        "3.0.1",
        "tiny SDA",
        "few_interactions",
        "0.1010 ± 0.0014",
    ):
        assert words in page
        assert words in text
    names = {"catalogue.png", "loss.png", "similarity.png", "metrics.png"}
    assert {picture.name for picture in tmp_path.glob("*.png")} == names
    assert set(re.findall(r"\]\(([a-z]+\.png)\)", text)) == names
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data)[:4] for data in embedded] == [b"\x89PNG"] * 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "somewhere" not in page
    measures = json.loads((tmp_path / "measures.json").read_text(encoding="utf-8"))
    for values in measures["vectors"].values():
        assert f"{values['effective_rank_text']:.1f}" in text


def test_pictures_are_large_enough_to_read(inputs, tmp_path) -> None:
    write_report(whole_config(inputs, tmp_path))
    for picture in tmp_path.glob("*.png"):
        assert min(Image.open(picture).size) > 300


def test_every_section_can_be_left_out(tmp_path) -> None:
    path = write_report(ReportConfig(output=tmp_path, title="nothing"))
    page = path.read_text(encoding="utf-8")
    assert "SDA on nothing" in page
    assert "synthetic" not in page
    assert not list(tmp_path.glob("*.png"))


def test_text_from_the_data_cannot_break_the_page(inputs, tmp_path) -> None:
    config = whole_config(inputs, tmp_path, title="<script>alert(1)</script>", data_note="a | b")
    page = write_report(config).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "a \\| b" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_best_of_each_recommender_is_bold_and_the_spread_is_shown() -> None:
    rows = summarize(results_data()["runs"])
    table = metrics_table(rows)
    lines = {tuple(row[:2]): place for place, row in enumerate(table.rows)}
    column = table.header.index("NDCG@10, all items")
    assert table.rows[0][:2] == ["popularity", NOTHING]
    assert table.rows[0][column] == "0.0300"
    assert table.rows[lines["SASRec", "SDA"]][column] == "0.1010 ± 0.0014"
    bold = {row for row, c in table.bold if c == column}
    assert bold == {lines["SASRec", "SDA"], lines["VBPR", "zero-shot"]}
    assert "| **0.1010 ± 0.0014** |" in table.markdown()
    assert ("VBPR", "none (BPR)") in lines


def test_groups_without_users_have_no_column() -> None:
    header = groups_table(summarize(results_data()["runs"])).header
    assert "all (40)" in header
    assert not any("tail" in name for name in header)


def test_gains_are_relative_and_averaged_over_recommenders() -> None:
    table = gains_table(summarize(results_data((0,))["runs"]), ["ID only", "zero-shot"])
    assert table is not None
    cells = {row[0]: row[1:] for row in table.rows}
    expected = 100 * ((0.10 / 0.06 - 1) + (0.045 / 0.04 - 1)) / 2
    assert cells["SDA"][0] == f"{expected:+.1f} %"
    assert cells["zero-shot"][1] == NOTHING
    assert gains_table([], ["ID only"]) is None


def test_a_file_that_holds_no_results_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1"):
        read_results(tmp_path)


def test_retrieval_by_hand_with_ties_as_half_a_place() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.3, 0.3]])
    assert retrieval_accuracy(similarity, 1) == pytest.approx(1 / 3)
    assert retrieval_accuracy(similarity, 2) == 1.0


def test_centring_removes_a_common_offset_and_plain_cosine_does_not() -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((50, 8))
    text = image + 20 * rng.standard_normal((1, 8))
    assert retrieval_accuracy(centred_cosine(image, text), 1) == 1.0
    assert retrieval_accuracy(cosine(image, text), 1) < 1.0
    rows = np.array([3, 1])
    np.testing.assert_allclose(centred_cosine(image, text, rows), centred_cosine(image, text)[np.ix_(rows, rows)])


def test_effective_rank_counts_the_directions_that_carry_variance() -> None:
    rng = np.random.default_rng(0)
    line = rng.standard_normal((200, 1)) @ rng.standard_normal((1, 16)) + 5
    assert effective_rank(line) == pytest.approx(1)
    corners = np.concatenate([np.eye(4), -np.eye(4)])
    assert effective_rank(corners) == pytest.approx(4)
    assert effective_rank(corners.repeat(5, axis=1)[:3]) <= 2 + 1e-9
    assert effective_rank(np.ones((5, 3))) == 0


def test_soft_targets_are_the_teacher_of_the_loss() -> None:
    image, text = np.random.default_rng(0).standard_normal((2, 6, 4))
    x, y = torch.tensor(image), torch.tensor(text)
    targets = torch.softmax(3.0 * (x @ x.T + y @ y.T) / 2, dim=-1)
    np.testing.assert_allclose(soft_targets(image, text, 3.0), targets.numpy(), rtol=1e-12)


def test_measures_show_vectors_that_all_point_at_one_item() -> None:
    spread = np.random.default_rng(0).standard_normal((64, 8))
    spread *= 5 / np.linalg.norm(spread, axis=1, keepdims=True)
    hub = np.abs(spread)
    hub[::8] *= 10
    drawn = np.arange(64)
    calm, crowded = (measure_vectors(v, v, drawn, seed=0) for v in (spread, hub))
    assert calm.target_on_own_item > 0.9 and calm.target_on_fullest_item < 0.1
    assert crowded.target_on_fullest_item > 0.4
    assert calm.effective_rank_image > 6
    assert calm.retrieval["image→text, top 1"] == 1


def test_the_sample_is_ordered_by_the_clearest_attribute(inputs) -> None:
    catalogue = read_items(inputs / "items.jsonl")
    assert grouping_attribute(catalogue) == "colour"
    labels = [str(item.attributes["colour"]) for item in catalogue]
    chosen = [labels[position] for position in ordered_sample(labels, 20, 0)]
    assert len(chosen) == 20
    assert chosen == sorted(chosen)
    assert set(chosen) == set(COLOURS)
    assert len(ordered_sample([""] * 9, 5, 0)) == 5


def test_the_package_loads_neither_cornac_nor_matplotlib() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sda_fast.recommend, sda_fast.report; print(*(m in sys.modules for m in ('cornac', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
