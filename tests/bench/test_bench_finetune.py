"""The fine-tuning benchmark with the small model: what it measures, plans and writes, and how it reads a trace."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from sda_fast.bench_command import BenchConfig, bench_folder, run_bench

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of bench/, which is no package."""
    sys.path.insert(0, str(bench_folder()))
    names = ("bench", "kernels", "methods", "model", "plan", "run", "tables")
    return SimpleNamespace(**{name: importlib.import_module(f"finetune_{name}") for name in names})


@pytest.fixture(scope="module")
def document(bench, tmp_path_factory) -> dict:
    """The results file of two steps of each method, our own with a plan."""
    folder = tmp_path_factory.mktemp("finetune")
    page = folder / "page.md"
    page.write_text(f"before\n{bench.tables.BEGIN}\nold\n{bench.tables.END}\nafter\n")
    methods = ("MoDA", "MoDA, chunks of 4", "PEFT LoRA", "loop over experts", "no adapter")
    config = BenchConfig("finetune", device="cpu", items=(4,), steps=2, methods=methods, output=folder, page=page)
    shown = run_bench(dataclasses.replace(config, picture=False, invocation="a command"))
    written = json.loads(bench.bench.results_file(folder, "finetune", CPU).read_text())
    return {**written, "shown": shown, "page": page.read_text()}


def test_every_method_makes_its_steps_with_finite_losses(document) -> None:
    records = {record["method"]: record for record in document["records"]}
    assert list(records) == ["MoDA", "PEFT LoRA", "loop over experts", "no adapter", "MoDA, chunks of 4"]
    for record in records.values():
        assert record["steps"] == 2 and record["milliseconds"][0] > 0, record.get("reason")
        assert len(record["losses"]) == 3 and all(map(math.isfinite, record["losses"]))
        assert 0 < record["tokens"] <= record["slots"] and record["items_per_second"] > 0
    # All start as the frozen model, and the first step's dropout meets a B of zero.
    first = {record["losses"][0] for record in records.values()}
    assert max(first) - min(first) < 1e-4
    assert records["MoDA"]["losses"][1] < records["MoDA"]["losses"][0] + 1
    assert records["MoDA"]["time_to_moda"] == 1


def test_our_own_variants_are_planned_and_the_tables_written(document) -> None:
    for record in document["records"]:
        assert ("planned" in record) == record["method"].startswith("MoDA")
    plan = document["records"][0]["planned"]
    assert plan["peak_bytes"] == sum(plan["parts"].values()) > plan["parts"]["weights"] > 0
    assert "old" not in document["page"] and "| PEFT LoRA | 2 |" in document["page"]
    assert "On a GPU, the 7B model\n\nnot measured" in document["page"]
    assert "loop over experts" in document["shown"]


def test_the_picture_shows_step_time_and_peak(bench, document, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert bench.tables.draw(document, tmp_path / "picture.png").stat().st_size > 1000


def test_on_a_gpu_the_deviation_from_the_plan_and_the_kernels_are_shown(bench, document) -> None:
    record = {**document["records"][0], "peak_bytes": 8 << 30, "reserved_bytes": 9 << 30}
    record["planned"] = {**record["planned"], "deviation": -0.021, "peak_bytes": 7.9 * 2**30}
    record["kernels"] = {
        "milliseconds": 800, "count": 5, "by_group": {"products": 600, "adapter": 200},
        "longest": [{"name": "sm90_gemm", "group": "products", "milliseconds": 600, "count": 4}],
    }  # fmt: skip
    on_gpu = {**document, "kind": "cuda", "records": [record, {"method": "PEFT LoRA", "reason": "not measured"}]}
    text, page = bench.tables.as_text(on_gpu), bench.tables.as_markdown(on_gpu, None)
    assert "MoDA: planned 7.90 GiB, measured 8.00 GiB, -2.1%" in text
    assert "adapter 25.0%" in text and "PEFT LoRA: not measured" in text
    assert "| `sm90_gemm` | products | 4 | 600.0 |" in page and "| 7.90 | 8.00 | -2.1% |" in page


def test_a_method_that_fails_has_a_reason_and_the_others_go_on(bench, tmp_path, monkeypatch) -> None:
    def broken(lvlm, config) -> None:
        raise RuntimeError("no such layer\nmore")

    table = (bench.methods.Variant("broken", broken), bench.methods.Variant("no adapter", bench.methods.no_adapter))
    monkeypatch.setattr(bench.bench, "VARIANTS", table)
    config = BenchConfig("finetune", device="cpu", items=(2,), steps=1, output=tmp_path, plan=False)
    shown = bench.bench.run(config)
    failed, other = json.loads(bench.bench.results_file(tmp_path, "finetune", CPU).read_text())["records"]
    assert failed["reason"] == "failed: RuntimeError: no such layer" and "broken: failed" in shown
    assert other["steps"] == 1


def test_unknown_methods_are_an_error(bench) -> None:
    config = BenchConfig("finetune", methods=("MoDa",))
    with pytest.raises(ValueError, match="got 'MoDa'"):
        bench.bench.chosen(config, torch.device("cpu"))


def test_all_methods_share_the_frozen_weights_and_leave_them_alone(bench, tmp_path) -> None:
    cpu = torch.device("cpu")
    catalogue = bench.model.catalogue_in(tmp_path / "catalogue", cpu)
    processor = bench.model.processor_for(catalogue, cpu)
    lvlm = bench.model.random_lvlm(bench.model.config_for(processor, cpu), processor, cpu)
    before = {name: tensor.clone() for name, tensor in lvlm.model.state_dict().items() if torch.is_tensor(tensor)}
    own = {tensor.data_ptr() for tensor in lvlm.model.parameters()}
    config = bench.plan.finetune_config(bench.plan.settings(2))
    world = bench.run.World(lvlm, catalogue, config, tmp_path)
    counts = {}
    for variant in bench.methods.VARIANTS[:4]:
        steps = bench.run.Steps(world, variant, 0)
        model = steps.state.lvlm.model
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert {parameter.data_ptr() for parameter in frozen} == own
        counts[variant.name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with bench.run.training_mode(steps.state.lvlm, gradient_checkpointing=True):
            steps()
        steps.prefetcher.close()
    after = lvlm.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    layers = 14
    gates = layers * (8 + 2) * 64
    assert counts["MoDA"] == counts["loop over experts"] == counts["PEFT LoRA"] + gates
    assert counts["no adapter"] == 0


def test_kernels_are_shared_out_by_name_and_by_the_operation_that_launched_them(bench) -> None:
    def event(cat, name, ts, dur, tid=1, correlation=None):
        arguments = {} if correlation is None else {"args": {"correlation": correlation}}
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, **arguments}

    launches = {1: 12, 2: 14, 3: 32, 4: 60, 5: 70}
    events = [
        event("cpu_op", "sda_fast::moda_group", 10, 30),
        event("cpu_op", "sda_fast::moda_group", 11, 4),
        event("user_annotation", bench.kernels.DECODING, 30, 5),
        *(event("cuda_runtime", "cudaLaunchKernel", ts, 1, 1, number) for number, ts in launches.items()),
        event("kernel", "reduce_kernel", 100, 1000, 7, 1),
        event("kernel", "sm90_gemm", 1100, 5000, 7, 2),
        event("kernel", "index_kernel", 6100, 500, 7, 3),
        event("kernel", "elementwise", 6600, 2500, 7, 4),
        event("kernel", "project_kernel", 9100, 1000, 7, 5),
    ]
    found = bench.kernels.summary(events)
    assert found["milliseconds"] == 10 and found["count"] == 5 and found["adapter_share"] == 0.2
    assert found["by_group"] == {"products": 5, "other": 2.5, "adapter": 2, "decoding of 4-bit weights": 0.5}
    assert found["longest"][0] == {"name": "sm90_gemm", "group": "products", "milliseconds": 5, "count": 1}
    assert bench.kernels.summary([])["reason"] == "the profiler saw no kernels"


def test_the_plan_is_of_the_measured_batch_or_none(bench, document, tmp_path) -> None:
    record = {**document["records"][0], "peak_shapes": {"image": [4, 1], "text": [4, 1]}}
    record.pop("planned")
    with pytest.raises(ValueError, match="the measured batch had chunks of"):
        bench.plan.add_plans({**document, "records": [record]}, tmp_path / "file.json")


def test_the_page_holds_the_tables_of_the_results_files(bench) -> None:
    page = bench_folder().parent / "docs" / "finetune.md"
    assert bench.tables.PAGE.text(bench_folder() / "results") in page.read_text(encoding="utf-8")
