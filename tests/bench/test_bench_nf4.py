"""The benchmark of 4-bit products on tiny layers: what it checks, measures, writes and leaves out."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sda_fast.bench_command import BenchConfig, bench_folder, run_bench
from sda_fast.ops import moda_evaluate
from sda_fast.timing import one_thread_on_a_cpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_on_a_cpu(CPU):
        yield


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    sys.path.insert(0, str(bench_folder()))
    names = ("contest", "nf4_products", "decoder_layer", "catalogue_speed", "nf4_run", "nf4_tables")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def tiny(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same with two small layers, few rows, and no copy of 256 MiB."""
    for name in list(bench.nf4_products.LAYERS):
        monkeypatch.delitem(bench.nf4_products.LAYERS, name)
    monkeypatch.setitem(bench.nf4_products.LAYERS, "q, o", (64, 128))
    monkeypatch.setitem(bench.nf4_products.LAYERS, "k, v", (32, 128))
    monkeypatch.setattr(bench.nf4_products, "ROWS", (1, 16))
    monkeypatch.setattr(bench.nf4_run, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench.nf4_run, "layer_cases", lambda device, quick: [("small", 1, 4)])
    small = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(bench.decoder_layer.SIZES, "small", small)
    return bench


def config(folder: Path, **options: object) -> BenchConfig:
    options = {"device": "cpu", "seconds": 0.001, "output": folder, "invocation": "a command"} | options
    return BenchConfig(what="nf4", **options)  # type: ignore[arg-type]


def test_a_run_writes_results_picture_and_page(tiny: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tiny.nf4_tables.BEGIN}\nstale\n{tiny.nf4_tables.END}\nafter\n")
    shown = run_bench(config(tmp_path / "results", page=page))
    (results,) = (tmp_path / "results").glob("nf4-*.json")
    document = json.loads(results.read_text())
    assert document["versions"]["torch"] == version("torch") and document["command"] == "a command"
    assert document["device"] and document["cuda_library"].startswith("not used: ")
    timed = [record for record in document["records"] if "milliseconds" in record]
    assert {record["part"] for record in timed} == {"decode", "product", "decoder layer", "embedding"}
    for record in timed:
        low, middle, high = record["milliseconds"]
        assert 0 < low <= middle <= high and record["error"] < 2**-6
    products = {record["method"] for record in timed if record["part"] == "product"}
    assert {"16-bit library product", "bitsandbytes", "MoDA, chosen here", "MoDA, fold", "MoDA, unfold"} <= products
    layers = {record["method"] for record in timed if record["part"] == "decoder layer"}
    assert {"frozen, bitsandbytes", "PEFT LoRA", "MoDA, folded", "MoDA, unfolded"} <= layers
    embedding = {record["method"]: record for record in timed if record["part"] == "embedding"}
    assert {"loop over experts, 16-bit", "MoDA, 4-bit", "no adapter, 4-bit"} <= set(embedding)
    for record in embedding.values():
        assert record["items_per_second"] == pytest.approx(1e3 * record["items"] / record["milliseconds"][1], rel=1e-3)
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "## Measured on a GPU\n\nnot measured" in text and "| q, o 128->64, M=16 | MoDA, chosen here |" in text
    assert "in Triton: needs a GPU" in text and "Embedding a catalogue" in shown


def test_a_wrong_answer_has_no_speed(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = moda_evaluate.folded_output
    monkeypatch.setattr(moda_evaluate, "folded_output", lambda *arguments: folded(*arguments) * 1.02)
    records = tiny.nf4_products.measure_product("q, o", 4, CPU, 0.001)
    (refused,) = [record for record in records if record["method"] == "MoDA, fold"]
    assert refused["reason"].startswith("not timed: its error is ") and "milliseconds" not in refused
    assert all("milliseconds" in record for record in records if record["method"] == "MoDA, unfold")
    records = tiny.decoder_layer.measure_layer("small", 1, 4, CPU, 0.001)
    assert {record["method"] for record in records if "not timed" in record.get("reason", "")} == {"MoDA, folded"}


def test_a_loop_that_forgets_an_expert_is_refused(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.catalogue_speed.ExpertLoop.__init__

    def forgetful(self, base_layer, adapter) -> None:
        made(self, base_layer, adapter)
        self.lora_B[0].data.zero_()
        self.lora_B[1].data.mul_(3)

    monkeypatch.setattr(tiny.catalogue_speed.ExpertLoop, "__init__", forgetful)
    records = tiny.catalogue_speed.measure_catalogue(CPU, 0.001, quick=True)
    (loop,) = [record for record in records if record["method"] == "loop over experts, 16-bit"]
    assert loop["reason"].startswith("not timed: its error is ")
    assert sum("milliseconds" in record for record in records) == len(records) - 1


def test_what_is_too_slow_or_too_late_is_named(tiny: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tiny.nf4_products, "CPU_OPERATIONS", 1e5)
    (record,) = tiny.nf4_products.measure_product("q, o", 16, CPU, 0.001)
    assert record["method"] == "all" and record["reason"].startswith("not measured: 3e+05 operations")
    case, truth = {"part": "product", "case": "one"}, torch.ones(1)
    entry = tiny.contest.Contestant(lambda: truth, truth, 1e-6)
    (record,) = tiny.contest.contest(case, {"slow": entry}, CPU, seconds=0.001, longest=0.0)
    assert record["reason"].startswith("not measured: one run takes ")
    shown = run_bench(config(tmp_path, limit=0.0, picture=False))
    (results,) = tmp_path.glob("nf4-*.json")
    document = json.loads(results.read_text())
    assert {record["reason"] for record in document["records"]} == {"not measured, out of time"}
    assert shown.count("not measured, out of time") == len(document["records"])


def test_a_contestant_that_breaks_is_reported(bench: SimpleNamespace) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel\nand a trace")

    truth = torch.ones(2)
    entries = {
        "broken": bench.contest.Contestant(broken, truth, 1.0),
        "nan": bench.contest.Contestant(lambda: truth * float("nan"), truth, 1.0),
        "absent": "not installed",
    }
    records = bench.contest.contest({"part": "product", "case": "one"}, entries, CPU, seconds=0.001)
    reasons = {record["method"]: record["reason"] for record in records}
    assert reasons["broken"] == "failed: RuntimeError: no kernel" and reasons["absent"] == "not installed"
    assert reasons["nan"].startswith("not timed: its error is inf")


def test_the_cases_cover_what_they_promise(bench: SimpleNamespace) -> None:
    full = bench.nf4_products.product_cases(CPU, quick=False)
    assert {rows for _, rows in full} == {1, 4, 16, 64, 256, 1024, 8192}
    assert full == bench.nf4_products.product_cases(torch.device("cuda"), quick=True)
    assert set(bench.nf4_products.product_cases(CPU, quick=True)) < set(full)
    shapes = {(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)}
    assert set(bench.nf4_products.LAYERS.values()) == shapes
    assert {size for size, _, _ in bench.decoder_layer.layer_cases(CPU, quick=False)} == set(bench.decoder_layer.SIZES)


@pytest.mark.parametrize(("module", "page"), [("tables", "performance.md"), ("nf4_tables", "nf4.md")])
def test_the_pages_tables_are_those_of_the_results_files(module: str, page: str, tmp_path: Path, bench) -> None:
    written = bench_folder().parent / "docs" / page
    again = tmp_path / page
    again.write_text(written.read_text(encoding="utf-8"), encoding="utf-8")
    importlib.import_module(module).PAGE.update(again, bench_folder() / "results")
    assert again.read_text(encoding="utf-8") == written.read_text(encoding="utf-8")


def test_the_copies_of_a_model_share_their_tensors_and_not_their_modules(bench: SimpleNamespace) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    lvlm = SimpleNamespace(model=model, processor=None, family=None, name="")
    other = bench.catalogue_speed.sharing_copy(lvlm)
    assert other.model[0] is not model[0] and other.model[0].weight is model[0].weight
