"""The benchmark of the cached step on a tiny batch: what it checks, measures, writes and does not start."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from sda_fast.bench_command import BenchConfig, bench_folder, run_bench

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of bench/, which is no package."""
    sys.path.insert(0, str(bench_folder()))
    names = ("cached_bench", "cached_run", "cached_tables")
    return SimpleNamespace(**{name.removeprefix("cached_"): importlib.import_module(name) for name in names})


def test_a_run_measures_the_small_model_and_writes_results_picture_and_page(bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(bench.bench.CASES, ("cpu", True), ((6,), (0, 2)))
    # in this process: starting one costs more than what it does
    in_process = bench.run.measure
    monkeypatch.setattr(bench.bench, "in_a_process", lambda *arguments: in_process("cpu", *arguments))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.tables.BEGIN}\nold\n{bench.tables.END}\nafter\n")
    shown = run_bench(
        BenchConfig("cached", device="cpu", seconds=0.01, output=tmp_path, invocation="a command", page=page)
    )
    path = bench.bench.results_file(tmp_path, "cached", torch.device("cpu"))
    document = json.loads(path.read_text())
    direct, chunked = document["records"]
    assert (direct["chunk"], chunked["chunk"]) == (0, 2) and direct["tokens"] == chunked["tokens"] > 100
    for record in (direct, chunked):
        assert record["error"] < 1e-5 and record["milliseconds"][0] > 0 and record["model"] == "width 128, 4 layers"
    assert chunked["to_direct"] > 0 and chunked["memory_to_direct"] >= 0
    assert "all (direct)" in shown and path.with_suffix(".png").stat().st_size > 1000
    text = page.read_text()
    assert "old" not in text and "| 6 | 2 |" in text and "## The cached step on a GPU\n\nnot measured" in text


def test_too_much_memory_or_time_is_not_started(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench, "free_memory", lambda device: 4e9)
    cpu = torch.device("cpu")
    records = [{"B": 10, "chunk": chunk, "milliseconds": [1, 2000, 3], "peak_bytes": 3e8} for chunk in (0, 2)]
    reason = bench.bench.reason_not_to_start
    assert reason({"B": 100, "chunk": 2}, records, cpu) == ""
    assert reason({"B": 100, "chunk": 0}, records, cpu).startswith("not measured: would take about 3 GB")
    assert reason({"B": 1000, "chunk": 2}, records, cpu).startswith("not measured: one step would take about 200 s")


def test_chunks_that_change_the_gradients_are_seen(bench) -> None:
    weight = torch.nn.Parameter(torch.ones(3))

    class Batch(SimpleNamespace):
        pass

    def step(batch: Batch) -> None:
        weight.grad = torch.full((3,), 1.0 if batch.chunk_size is None else 1.5)

    replace = bench.run.dataclasses.replace
    try:
        bench.run.dataclasses.replace = lambda batch, chunk_size: Batch(chunk_size=chunk_size)
        assert bench.run.chunking_error(step, Batch(chunk_size=2), [weight]) == pytest.approx(0.5)
    finally:
        bench.run.dataclasses.replace = replace
