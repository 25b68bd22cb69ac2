"""The benchmark of the contrastive losses on tiny batches: what it checks, measures, keeps, writes and refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sda_fast.bench_command import BenchConfig, bench_folder, run_bench
from sda_fast.timing import CLEARED_BYTES


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of bench/, which is no package."""
    sys.path.insert(0, str(bench_folder()))
    names = ("cmsa_bench", "cmsa_cases", "cmsa_counts", "cmsa_run", "cmsa_tables")
    return SimpleNamespace(**{name.removeprefix("cmsa_"): importlib.import_module(name) for name in names})


def config(folder: Path, *methods: str, **options: object) -> BenchConfig:
    options = {"items": (16, 40), "dimensions": (8,), "seconds": 0.01, "picture": False, **options}
    return BenchConfig("cmsa", device="cpu", methods=methods, output=folder, invocation="a command", **options)


def test_every_method_is_right_on_a_small_batch(bench: SimpleNamespace) -> None:
    for loss, methods in bench.cases.METHODS.items():
        for name, method in methods.items():
            if name != "torch.compile":
                error = bench.run.error_on_a_small_batch(loss, method.make(), 70, 12, torch.float32, "cpu")
                assert error <= bench.run.ALLOWED_ERROR[torch.float32], (loss, name)


def test_a_run_writes_results_picture_and_page_and_a_second_one_adds_to_them(bench, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.tables.BEGIN}\nold\n{bench.tables.END}\nafter\n")
    path = bench.bench.results_file(tmp_path / "results", "cmsa", torch.device("cpu"))
    shown = run_bench(config(tmp_path / "results", "ours", items=(16,), picture=True, page=page))
    first = json.loads(path.read_text())["records"]
    assert [(r["loss"], r["B"]) for r in first] == [("CMSA", 16), ("InfoNCE", 16)]
    for record in first:
        low, middle, high = record["milliseconds"]
        assert 0 < low <= middle <= high and record["peak_bytes"] >= 0 and record["command"] == "a command"
        assert record["floor_milliseconds"] > 0 and record["to_floor"] > 0 and "to_plain" not in record
    assert "CMSA, D = 8, float32" in shown and path.with_suffix(".png").stat().st_size > 1000
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| 16 | ours |" in text
    run_bench(config(tmp_path / "results", "as in open_clip", items=(16,), limit=0.0))
    both = json.loads(path.read_text())["records"]
    assert both[: len(first)] == first and both[-1]["reason"] == "not measured: the time allowed for the run was over"


def test_a_run_goes_on_where_the_last_one_stopped_unless_it_is_to_begin_anew(bench, tmp_path, monkeypatch) -> None:
    path = bench.bench.results_file(tmp_path, "cmsa", torch.device("cpu"))
    measured = []

    def figures(case, method, *_):
        measured.append((case.loss, case.B))
        return {"milliseconds": [1.0, 1.0, 1.0], "to_floor": 1.0, "peak_bytes": 1, "error": 0.0}

    monkeypatch.setattr(bench.bench, "measured", figures)
    monkeypatch.setattr(bench.tables, "as_text", lambda document: "")
    for options in ({"items": (16,)}, {}, {"seconds": 0.02}, {"seconds": 0.02, "anew": True}):
        run_bench(config(tmp_path, "ours", **options))
    small, large = [("CMSA", 16), ("InfoNCE", 16)], [("CMSA", 40), ("InfoNCE", 40)]
    every = [("CMSA", 16), ("CMSA", 40), ("InfoNCE", 16), ("InfoNCE", 40)]
    assert measured == small + large + every + every
    assert len(json.loads(path.read_text())["records"]) == 4


def test_too_much_memory_or_time_is_not_started(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.cases.Case("CMSA", 1000, 8, torch.float32)
    cpu = torch.device("cpu")
    monkeypatch.setattr(bench.bench, "free_memory", lambda device: 2e7)
    assert bench.bench.reason_not_to_start(case, "ours", cpu, []) == ""
    reason = bench.bench.reason_not_to_start(case, "plain PyTorch", cpu, [])
    assert reason == "not measured: would take about 0.036 GB, the limit here is 0.01 GB"
    smaller = {"loss": "CMSA", "method": "ours", "B": 100, "D": 8, "milliseconds": [1.0, 4000.0, 5000.0]}
    reason = bench.bench.reason_not_to_start(case, "ours", cpu, [smaller])
    assert reason == "not measured: one step would take about 400 s, the limit is 300 s"


def test_a_wrong_answer_has_no_time(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = bench.run.measure("CMSA", lambda: lambda x, y, t: 2 * (x * y).sum() * t, 16, 8, torch.float32, "cpu", 0.01)
    assert wrong["reason"].startswith("not timed: its error is") and "seconds" not in wrong
    case = bench.cases.Case("CMSA", 16, 8, torch.float32)
    other = {"loss": "CMSA", "method": "ours", "B": 16, "D": 8, "digest": [1.0, 2.0, 3.0]}
    assert bench.bench.disagreement(case, [1.0, 2.0, 3.0], [other]) == ""
    assert "its loss is nan where ours has 1" in bench.bench.disagreement(case, [float("nan"), 2.0, 3.0], [other])


def test_unknown_methods_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no method fast; there are ours, plain PyTorch"):
        run_bench(config(tmp_path, "fast"))
    with pytest.raises(ValueError, match="items must be at least 2"):
        run_bench(config(tmp_path, items=(1,)))


def test_peaks_measured_on_a_gpu_are_those_counted_of_the_same_code(bench) -> None:
    document = json.loads((bench_folder() / "results" / "cmsa-nvidia-h200.json").read_text())
    ours = [record for record in document["records"] if "expected_bytes" in record]
    assert len(ours) == 3 and all(record["clearing_bytes"] == CLEARED_BYTES for record in ours)
    for record in ours:
        assert bench.tables.step_bytes(record) == pytest.approx(record["expected_bytes"], rel=1e-4)


def test_the_clearing_buffer_is_in_no_peak_of_a_table(bench) -> None:
    plain, ours = (
        {"loss": "CMSA", "method": method, "B": 64, "D": 8, "dtype": "float32", "command": "c", "error": 0.0,
         "milliseconds": [1.0, 1.0, 1.0], "to_floor": 1.0, "peak_bytes": peak, "clearing_bytes": 100,
         "memory_to_plain": 0.9, "code": "abc"}
        for method, peak in (("plain PyTorch", 300), ("ours", 200))
    )  # fmt: skip
    ours["expected_bytes"] = 2_000_000
    document = {"device": "a card", "kind": "cuda", "versions": {}, "timer": "events", "percentiles": [20, 50, 80]}
    text = bench.tables.as_markdown(document | {"records": [plain, ours]}, None)
    assert "| 64 | ours | 1 | 1 | 1 | 1.00 | - | 0.0001 | 0.5 | 0e+00 | 2 |" in text
    assert "Measured of commit abc" in text and "taken off the measured peaks" in text


def test_counts_are_those_of_the_code_and_stand_in_the_page(bench) -> None:
    counts = bench.counts
    document = json.loads(counts.RESULTS.read_text())
    card = counts.card_named(counts.CARD)
    # How many operations PyTorch makes of its own functions differs from version to version.
    same_torch = document["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    theirs = set() if same_torch else {"other operations"}

    def without(record, names):
        launches = {name: count for name, count in record["launches"].items() if name not in names}
        return {**record, "launches": launches}

    for record in document["records"]:
        if record["B"] in (1024, 8192):
            found = counts.counted(record["loss"], record["B"], record["D"], card)
            assert without(found, theirs) == without(record, theirs)
    large = {one["loss"]: one for one in document["records"] if one["B"] == 65536}
    assert all(one["extra_bytes"] < 2**30 for one in large.values())
    assert large["CMSA"]["operations"] < 16.5 and large["CMSA by halves"]["operations"] < 14.5
    assert counts.table(document) in counts.PAGE.read_text()
