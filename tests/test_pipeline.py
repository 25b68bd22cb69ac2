"""The demo from end to end, in a very small size: everything is there, a second start does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sda_fast.data.vectors import read_item_vectors
from sda_fast.demo import DemoConfig, run_demo
from sda_fast.pipeline import PipelineConfig, StageClock

SMALL = {
    "num_items": 160,
    "num_users": 120,
    "pretrain_steps": 3,
    "steps": 2,
    "batch_size": 8,
    "recommenders": ("sasrec",),
    "recommend_epochs": 1,
    "seeds": (0,),
    "progress": False,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, Path]:
    config = DemoConfig(output=tmp_path_factory.mktemp("demo"), **SMALL)
    return config, run_demo(config)


def test_the_demo_ends_with_a_report_that_shows_every_method(demo: tuple[DemoConfig, Path]) -> None:
    _, report = demo
    text = report.read_text(encoding="utf-8")
    for word in ("synthetic", "random", "popularity", "ID only", "zero-shot", "LoRA + InfoNCE", "SDA", "oracle"):
        assert word in text, word
    assert report.with_suffix(".html").is_file()


def test_fine_tuning_changed_the_vectors_of_every_item(demo: tuple[DemoConfig, Path]) -> None:
    config, _ = demo
    before = read_item_vectors(config.output / "zero-shot" / "vectors.safetensors")
    after = read_item_vectors(config.output / "sda" / "vectors.safetensors")
    assert before.item_ids == after.item_ids and len(after) == SMALL["num_items"]
    assert (abs(before.image - after.image).max(axis=1) > 0).all()
    assert (abs(before.text - after.text).max(axis=1) > 0).all()


def test_a_second_start_keeps_what_is_there(demo: tuple[DemoConfig, Path]) -> None:
    config, report = demo
    kept = [config.output / part for part in ("sda/vectors.safetensors", "sda/adapter/adapter_model.safetensors")]
    before = [path.stat().st_mtime_ns for path in kept]
    assert run_demo(config) == report
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_another_size_in_the_same_folder_is_refused(demo: tuple[DemoConfig, Path]) -> None:
    config, _ = demo
    with pytest.raises(ValueError, match="choose another output folder"):
        run_demo(DemoConfig(output=config.output, **{**SMALL, "num_items": 170}))


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="unknown method 'sad'"):
        PipelineConfig(items=Path("a"), interactions=Path("b"), output=Path("c"), methods=("sad",))


def test_the_stage_clock_adds_up_over_starts(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    path.write_text('{"embed": 2.0}')
    with StageClock(path).measure("embed"):
        pass
    assert json.loads(path.read_text())["embed"] >= 2.0
