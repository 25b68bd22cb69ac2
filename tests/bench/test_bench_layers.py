"""The benchmark of one adapted layer on a tiny case: what it checks, measures, writes and refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sda_fast import bench_command, timing
from sda_fast.bench_command import MODULES, OPTIONS, BenchConfig, bench_folder, run_bench
from sda_fast.cli import main

PLAIN = "concatenated PyTorch"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of bench/, which is no package."""
    sys.path.insert(0, str(bench_folder()))
    names = ("baselines.moda_layers", "cases", "check_layers", "measure", "layers", "tables")
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


@pytest.fixture
def tiny(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same with a table of one small case with dropout."""
    monkeypatch.setitem(bench.cases.LAYERS, "small", (64, 48))
    monkeypatch.setattr(bench.cases, "CPU_QUICK", [bench.cases.case("small", 24, 0.1, experts=4, r=16)])
    return bench


def config(folder: Path, *methods: str, **options: object) -> BenchConfig:
    return BenchConfig(device="cpu", methods=methods, seconds=0.01, output=folder, invocation="a command", **options)


def page_with_marks(folder: Path, tables: ModuleType) -> Path:
    page = folder / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    return page


def test_a_run_writes_results_picture_and_page(tiny: SimpleNamespace, tmp_path: Path) -> None:
    page = page_with_marks(tmp_path, tiny.tables)
    methods = ("frozen layer", "MoDA", "PEFT LoRA", PLAIN, "loop over experts")
    shown = run_bench(config(tmp_path / "results", *methods, page=page))
    path = tiny.layers.results_file(tmp_path / "results", "moda", CPU)
    document = json.loads(path.read_text())
    assert document["kind"] == "cpu" and document["command"] == "a command"
    assert document["versions"]["torch"] == version("torch") and document["device"]
    assert {record["mode"] for record in document["records"]} == {"forward", "forward + backward"}
    for record in document["records"]:
        low, middle, high = record["milliseconds"]
        assert 0 < low <= middle <= high and record["rounds"] >= 5
        assert record["error"] < 4 * torch.finfo(torch.bfloat16).eps and record["peak_bytes"] >= 0
    timed = {(record["mode"], record["method"]): record for record in document["records"]}
    assert set(timed) == {(mode, name) for mode in ("forward", "forward + backward") for name in methods}
    assert timed["forward", "frozen layer"]["to_frozen"] == timed["forward", "PEFT LoRA"]["to_peft"] == 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "One adapted layer on a GPU\n\nnot measured" in text and text.count("| MoDA |") == 2
    assert f"(../results/{path.stem}.png)" not in text and f"{path.stem}.png)" in text
    assert "small 64->48, M=24, E=4, r=16, dropout 0.1, bfloat16" in shown and "summary: forward + backward" in shown
    assert run_bench(config(tmp_path / "results", measure=False, page=page)).count(path.stem) == 2
    assert page.read_text() == text


def test_every_processor_has_a_file_of_its_own_and_the_page_shows_them_one_after_the_other(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_with_marks(tmp_path, tiny.tables)
    for name in ("One Processor, 2 cores", "Other (R) 7, 8 cores"):
        monkeypatch.setattr(tiny.layers, "device_name", lambda device, name=name: name)
        run_bench(config(tmp_path / "results", "frozen layer", "MoDA", picture=False, page=page))
    names = [path.name for path in tiny.tables.PAGE.result_files(tmp_path / "results")]
    assert names == ["moda-one-processor-2-cores.json", "moda-other-r-7-8-cores.json"]
    on_a_cpu = page.read_text().split("## One adapted layer on a CPU")[1]
    assert on_a_cpu.index("### One Processor, 2 cores") < on_a_cpu.index("### Other (R) 7, 8 cores")
    assert page.read_text().count("| MoDA |") == 4


def test_a_second_run_goes_on_where_the_first_ran_out_of_time(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [*tiny.cases.CPU_QUICK, tiny.cases.case("small", 8, 0.1, experts=4, r=16)]
    path = tiny.layers.results_file(tmp_path, "moda", CPU)
    measured: list[str] = []
    measure_case = tiny.layers.measure_case

    def counted(case: object, *arguments: object, **options: object) -> object:
        measured.append(str(case))
        return measure_case(case, *arguments, **options)

    def run(**options: object) -> list[dict]:
        measured.clear()
        run_bench(config(tmp_path, "frozen layer", "MoDA", picture=False, **options))
        return json.loads(path.read_text())["records"]

    monkeypatch.setattr(tiny.layers, "measure_case", counted)
    first = run()
    assert measured == [str(both[0])]
    monkeypatch.setattr(tiny.cases, "CPU_QUICK", both)
    stopped = run(limit=0.0)
    assert not measured and stopped[:-1] == first and stopped[-1]["reason"] == tiny.layers.OUT_OF_TIME
    second = run()
    assert measured == [str(both[1])] and second[: len(first)] == first and len(second) == 2 * len(first)
    run(anew=True)
    assert measured == [str(case) for case in both]
    run(compile_cases=0)
    assert measured == [str(case) for case in both], "under other settings nothing is kept"


def test_what_every_method_keeps_for_backward(tiny: SimpleNamespace) -> None:
    records = tiny.layers.measure_case(tiny.cases.CPU_QUICK[0], ("frozen layer", "MoDA", "loop over experts"), 0.01)
    kept = {record["method"]: record.get("bytes_kept_per_x") for record in records if "bytes_kept_per_x" in record}
    x_bytes, h_bytes, mask_bytes, seed_and_gates = 24 * 64 * 2, 24 * 16 * 4, 24 * 8, 64
    assert kept["frozen layer"] == 0
    assert 1 <= kept["MoDA"] <= (x_bytes + h_bytes + mask_bytes + seed_and_gates) / x_bytes
    assert kept["loop over experts"] > 4 * kept["MoDA"]


@pytest.mark.parametrize("quantity", ["output", "gradient"])
def test_a_wrong_answer_has_no_speed(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, quantity: str) -> None:
    class Wrong(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y * 1.02 if quantity == "output" else y + 0.02 * (y - y.detach())

    methods = tiny.moda_layers.METHODS
    right = methods["PEFT LoRA"]

    def build(settings: object, base_layer: torch.nn.Module) -> object:
        made = methods[PLAIN].build(settings, base_layer)
        return dataclasses.replace(made, layer=Wrong(made.layer))

    monkeypatch.setitem(methods, "PEFT LoRA", dataclasses.replace(right, build=build))
    records = tiny.layers.measure_case(tiny.cases.CPU_QUICK[0], ("frozen layer", "PEFT LoRA"), 0.01)
    (refused,) = [record for record in records if record["method"] == "PEFT LoRA"]
    assert refused["reason"].startswith("not timed: the error of its ") and "milliseconds" not in refused


def test_the_check_of_dropout_sees_another_mask(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.cases.CPU_QUICK[0]
    x, dy = tiny.layers.inputs_of(case)
    checker = tiny.check_layers.Checker(case, case.settings.base_layer(), x, dy)
    assert not checker.judge("MoDA").fault
    mask = tiny.check_layers.keep_mask
    monkeypatch.setattr(tiny.check_layers, "keep_mask", lambda *sizes: mask(*sizes).roll(1, 0))
    assert "dA" in checker.judge("MoDA").fault


def test_a_baseline_that_breaks_is_reported(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(settings: object, base_layer: object) -> object:
        raise TypeError("no such argument\nand a long trace")

    methods = tiny.moda_layers.METHODS
    monkeypatch.setitem(methods, "PEFT LoRA", dataclasses.replace(methods["PEFT LoRA"], build=build))
    records = tiny.layers.measure_case(tiny.cases.CPU_QUICK[0], ("frozen layer", "PEFT LoRA"), 0.01)
    assert [record["reason"] for record in records if "reason" in record] == ["failed: TypeError: no such argument"]
    monkeypatch.setitem(methods, "MoDA", dataclasses.replace(methods["MoDA"], build=build))
    with pytest.raises(TypeError, match="no such argument"):
        tiny.layers.measure_case(tiny.cases.CPU_QUICK[0], ("MoDA",), 0.01)


def test_a_case_after_the_limit_is_named_as_not_measured(tiny: SimpleNamespace, tmp_path: Path) -> None:
    shown = run_bench(config(tmp_path, picture=False, limit=0.0))
    assert "small 64->48, M=24, E=4, r=16, dropout 0.1, bfloat16: not measured, out of time" in shown


def test_the_results_name_the_command_line(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "--device", "cpu", "--limit", "0", "--no-picture", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["/somewhere/sda-fast", *words])
    assert main(words) == 0
    document = json.loads(tiny.layers.results_file(tmp_path, "moda", CPU).read_text())
    assert document["command"] == " ".join(["sda-fast", *words])


def test_methods_that_cannot_run_say_why(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reasons = bench.layers.reasons_for_all(bench.cases.CPU_QUICK, ("MoDA", "Unsloth LoRA", "concatenated, compiled"))
    assert "no C++ compiler" in reasons["concatenated, compiled"] and "unsloth" in reasons["Unsloth LoRA"]
    assert reasons["PEFT LoRA"] == "not asked for" and "MoDA" not in reasons
    with pytest.raises(ValueError, match="'MoDa'"):
        bench.layers.reasons_for_all(bench.cases.CPU_QUICK, ("MoDa",))


def test_the_tables_cover_what_they_promise(bench: SimpleNamespace) -> None:
    full = bench.cases.cases("cuda", quick=False)
    of = {(entry.settings.in_features, entry.settings.out_features) for entry in full}
    assert {(3584, 3584), (3584, 18944), (18944, 3584), (3584, 512)} <= of
    assert {1, 32768} <= {entry.rows for entry in full} and {0.0, 0.1} == {e.settings.dropout for e in full}
    assert {1, 4, 8} == {e.settings.num_experts for e in full} and {8, 16, 64} == {e.settings.r for e in full}
    assert {e.settings.base for e in full} == {"nf4"} and len(set(full)) == len(full)
    assert {e.settings.base for e in bench.cases.cases("cuda", quick=True, four_bit=False)} == {"float"}
    assert set(bench.cases.cases("cuda", quick=True)) <= set(full)
    assert all(entry.layer == "k" for entry in bench.cases.cases("cpu", quick=False, layers=("k",)))
    with pytest.raises(ValueError, match="got v"):
        bench.cases.cases("cpu", quick=True, layers=("q", "v"))


def test_percentiles_and_ratios() -> None:
    assert [timing.percentile([3.0, 1.0, 2.0], p) for p in (0, 50, 75, 100)] == [1, 2, 2.5, 3]
    assert timing.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == 2


def test_a_page_without_marks_is_refused_and_left_alone(bench: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    with pytest.raises(ValueError, match="must have the lines"):
        bench.tables.PAGE.update(page, tmp_path)
    assert page.read_text() == "mine"


def test_without_a_checkout_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "site-packages" / "sda_fast" / "bench_command.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "get a checkout of sda-fast" in capsys.readouterr().err


def test_the_steps_of_the_gpu_script_fit_the_time_it_promises() -> None:
    script = (bench_folder() / "gpu.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"step (\w+) (\d+) ", script)}
    assert len(limits) == 9 and "at most 8 minutes, 10 where the CUDA" in script
    starting = 5
    assert sum(limits.values()) + starting <= 600 and sum(limits.values()) - limits["library"] + starting <= 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "32x64"], "--shapes means nothing with --what layer, only with --tune"),
        (["--what", "nf4", "--layers", "q"], "--layers means nothing with --what nf4, only with --what layer"),
        (["--what", "nf4", "--methods", "MoDA"], "only with --what layer, --what cmsa, --what finetune"),
        (["--what", "cached", "--dimensions", "8"], "--dimensions means nothing with --what cached"),
        (["--what", "finetune", "--no-quick"], "--quick means nothing with --what finetune"),
        (["--what", "cmsa", "--no-plan"], "--plan means nothing with --what cmsa"),
        (["--steps", "3"], "--steps means nothing with --what layer, only with --what finetune"),
        (["--tune", "--what", "nf4"], "--what means nothing with --tune"),
        (["--tune", "--compile-cases", "1"], "--compile-cases means nothing with --tune"),
        (["--tune", "--page", "docs/nf4.md"], "--page means nothing with --tune"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words: list[str], message: str, capsys) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_every_job_of_the_benchmarks_has_its_options() -> None:
    assert set(OPTIONS) == {"--tune", *(f"--what {what}" for what in MODULES)}
    known = {option.name for option in dataclasses.fields(BenchConfig)}
    assert all(known >= set(names) for names in OPTIONS.values())


def test_a_missing_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
