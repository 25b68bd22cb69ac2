"""`sda-fast bench --tune` on tiny layers: what it measures, checks, writes and refuses, and that the library obeys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from sda_fast import MoDALinear, tune
from sda_fast.bench_command import BenchConfig, run_bench
from sda_fast.cli import main
from sda_fast.ops import fold_regimes, measured, moda_evaluate, repacked, splits
from sda_fast.ops.fold_regimes import Way
from sda_fast.ops.measured import chip_name
from sda_fast.ops.moda_torch import Member
from sda_fast.ops.quantized import WeightLayout, describe_weight

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SDA_FAST_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(measured, "PACKAGED_TABLES", tmp_path / "packaged")
    measured.forget()
    yield tmp_path / "tuned"
    measured.forget()


def config(**options: object) -> BenchConfig:
    options = {"device": "cpu", "seconds": 0.001, "shapes": ("32x64",), "invocation": "a command"} | options
    return BenchConfig(tune=True, **options)  # type: ignore[arg-type]


def bitsandbytes_where_it_multiplies(record: dict) -> set[str]:
    """Its product on a CPU takes bfloat16, and whole groups of 32 rows of a weight in whole blocks."""
    fits = record["N"] % 32 == 0 and record["K"] % 64 == 0
    multiplies = fits and record["weight"] == "nf4" and record["dtype"] == "bfloat16" and repacked.product_exists()
    return {"bitsandbytes"} if multiplies else set()


def test_the_command_writes_a_table_that_the_library_then_reads(user_tables: Path, capsys) -> None:
    words = ["bench", "--tune", "--device", "cpu", "--shapes", "32x64", "16x96", "--seconds", "0.001"]
    assert main(words) == 0
    (path,) = user_tables.iterdir()
    document = json.loads(path.read_text())
    assert document["device"] == chip_name(CPU) and document["versions"]["torch"] == version("torch")
    assert document["date"] and document["timer"] and document["command"].startswith("sda-fast ")
    assert {(r["N"], r["K"]) for r in document["records"]} == {(32, 64), (16, 96)}
    assert {(r["dtype"], r["weight"]) for r in document["records"]} == {
        (dtype, weight) for dtype in ("float32", "bfloat16") for weight in ("float", "nf4")
    }
    for record in document["records"]:
        assert set(record["microseconds"]) == {"fold", "unfold"} | bitsandbytes_where_it_multiplies(record)
    assert f"table: {path}, used from now on" in capsys.readouterr().out
    assert len(measured.tables_of(chip_name(CPU))[0].measurements) == len(document["records"])


@pytest.mark.parametrize("fast", ["fold", "unfold"])
def test_evaluation_goes_the_way_that_was_faster(user_tables: Path, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tune.time_in_turns

    def timed(ways, *arguments, **options):
        assert set(real(ways, *arguments, **options)) == set(ways)
        return {name: [1.0 if name == fast else 2.0] for name in ways}

    monkeypatch.setattr(tune, "time_in_turns", timed)
    run_bench(config())
    called = []
    for name in ("folded_output", "unfolded_output"):
        monkeypatch.setattr(moda_evaluate, name, lambda m, x, *a, n=name: (called.append(n), x.new_zeros(0))[1])
    with torch.no_grad():
        for rows in (1, 300):
            MoDALinear(torch.nn.Linear(64, 32)).eval()(torch.zeros(rows, 64), 1)
    assert called == [f"{fast}ed_output"] * 2


def test_a_wrong_way_has_no_time(user_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = moda_evaluate.folded_output
    monkeypatch.setattr(moda_evaluate, "folded_output", lambda *arguments: folded(*arguments) * 1.02)
    shown = run_bench(config())
    (path,) = user_tables.iterdir()
    for record in json.loads(path.read_text())["records"]:
        assert set(record["microseconds"]) == {"unfold"} | bitsandbytes_where_it_multiplies(record)
        assert record["refused"]["fold"].startswith("its error is ")
    assert measured.fastest(
        CPU, "evaluation", ("fold", "unfold"), dtype=torch.float32, weight="float", rows=1, out_features=32,
        in_features=64,
    ) is None  # fmt: skip
    assert "unfold" in shown


def test_a_way_that_breaks_does_not_end_the_rest(user_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise RuntimeError("no such instruction\nand a trace")

    monkeypatch.setattr(moda_evaluate, "folded_output", broken)
    run_bench(config())
    (path,) = user_tables.iterdir()
    refused = {record["refused"]["fold"] for record in json.loads(path.read_text())["records"]}
    assert refused == {"failed: RuntimeError: no such instruction"}


def test_what_the_time_ran_out_for_is_named_and_nothing_is_written_if_it_was_all(user_tables: Path, caplog) -> None:
    shown = run_bench(config(limit=0.0))
    assert shown.count("not measured, out of time") == len(tune.cases("cpu", quick=True, shapes=[(32, 64)]))
    assert "nothing was measured" in shown and "nothing was measured" in caplog.text
    assert not user_tables.exists()


def test_what_was_measured_before_stays_in_the_table(user_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bench(config())
    (path,) = user_tables.iterdir()
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "date": "2020-01-02"}))
    run_bench(config(limit=0.0))
    assert json.loads(path.read_text()) == {**document, "date": "2020-01-02"}
    run_bench(config(shapes=("16x96",)))
    both = json.loads(path.read_text())
    by_layer = {N: [line for line in both["records"] if line["N"] == N] for N in (32, 16)}
    assert by_layer[32] == [{"date": "2020-01-02", **line} for line in document["records"]]
    assert by_layer[16] and not any("date" in line for line in by_layer[16])
    # What is measured again replaces, what the time runs out for does not.
    measure, times = tune.measure_case, []

    def only_twice(case, *arguments):
        times.append(case)
        return measure(case, *arguments) if len(times) < 3 else tune.not_measured(case, "out of time")

    monkeypatch.setattr(tune, "measure_case", only_twice)
    run_bench(config())
    again = json.loads(path.read_text())["records"]
    assert len(again) == len(both["records"]) and all(line["microseconds"] for line in again)
    assert [line.get("date") for line in again if line["N"] == 32].count("2020-01-02") == len(by_layer[32]) - 2


def test_a_way_that_is_wrong_now_loses_the_time_that_it_had(user_tables: Path, monkeypatch) -> None:
    run_bench(config())
    folded = moda_evaluate.folded_output
    monkeypatch.setattr(moda_evaluate, "folded_output", lambda *arguments: folded(*arguments) * 1.02)
    run_bench(config())
    (path,) = user_tables.iterdir()
    records = json.loads(path.read_text())["records"]
    assert len(records) == len(tune.cases("cpu", quick=True, shapes=[(32, 64)]))
    assert not any("fold" in record["microseconds"] for record in records)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_rows_of_all_layers_are_measured_before_more_rows_of_any(device: str) -> None:
    for quick in (True, False):
        rows = [case.rows for case in tune.cases(device, quick=quick)]
        assert rows == sorted(rows)


def test_an_interrupted_run_leaves_the_old_table(user_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bench(config())
    (path,) = user_tables.iterdir()
    before = path.read_bytes()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measure_case", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench(config())
    assert path.read_bytes() == before and list(user_tables.iterdir()) == [path]


def test_another_folder_can_be_given_and_is_not_used_unless_named(tmp_path: Path, monkeypatch) -> None:
    shown = run_bench(config(output=tmp_path / "elsewhere"))
    assert f"used where SDA_FAST_TUNED={tmp_path / 'elsewhere'}" in shown
    assert not measured.tables_of(chip_name(CPU))
    monkeypatch.setenv("SDA_FAST_TUNED", str(tmp_path / "elsewhere"))
    measured.forget()
    assert len(measured.tables_of(chip_name(CPU))) == 1


def test_mistakes_are_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for word in ("3584", "0x4", "axb", "1x2x3"):
        with pytest.raises(ValueError, match="outputs x inputs"):
            run_bench(config(shapes=(word,)))
    monkeypatch.setenv("SDA_FAST_TUNED", "")
    with pytest.raises(ValueError, match="give --output"):
        run_bench(config())
    if not torch.cuda.is_available():
        assert main(["bench", "--tune", "--device", "cuda"]) == 2
        assert "needs a GPU" in capsys.readouterr().err


def test_the_table_of_a_gpu_covers_all_decisions_and_every_layer() -> None:
    table = tune.cases("cuda", quick=True)
    parts = {"parts of K, Triton", "parts of K, library"}
    assert {case.decision for case in table} == {"evaluation", "update of y", "update of dx"} | parts
    for case in table:
        if case.decision in parts:
            assert case.rows <= 64 and case.weight == "nf4"
            shape = case.rows, case.out_features, case.in_features
            (same,) = (
                other for other in table
                if (other.rows, other.out_features, other.in_features) == shape
                and (other.decision, other.weight) == ("evaluation", "nf4")
            )  # fmt: skip
            assert table.index(case) < table.index(same)
    of = {(case.out_features, case.in_features) for case in table}
    assert of == {(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)}
    assert {1, 64, 8192} <= {case.rows for case in table if case.decision == "evaluation"}
    assert set(table) <= set(tune.cases("cuda", quick=False))
    assert {case.weight for case in tune.cases("cuda", quick=True, four_bit=False)} == {"float", "any"}


def test_the_table_of_a_cpu_has_few_rows_where_bitsandbytes_multiplies_them() -> None:
    for quick in (True, False):
        table = tune.cases("cpu", quick=quick)
        of_rows = {case.rows for case in table if (case.dtype, case.weight) == (torch.bfloat16, "nf4")}
        assert {1, 2, 4, 8, 16, 32, 64} <= of_rows
        assert all(2 * case.rows * case.out_features * case.in_features <= 3e10 for case in table)
        assert len(set(table)) == len(table)


def test_numbers_of_parts_make_different_parts() -> None:
    assert splits.candidates(3584, 128) == (0, 1, 2, 3, 4, 6, 8, 12, 16)
    assert splits.candidates(64, 128) == (0, 1)
    assert splits.candidates(100_000, 128)[1:] == splits.COUNTS
    for count in (0, *splits.COUNTS):
        assert splits.count_of(splits.name_of(count)) == count
    with pytest.raises(ValueError, match="must be 0"), splits.forced_splits(-1):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it in its table")
def test_every_number_of_parts_of_the_small_product_passes_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from sda_fast.kernels import nf4_linear

    made = []
    nf4_linear.prepare_small_product.cache_clear()
    launch = nf4_linear.small_product_launch
    monkeypatch.setattr(nf4_linear, "small_product_launch", lambda *a: (made.append(launch(*a).splits), launch(*a))[1])
    # bfloat16 is not computed rightly by Triton's interpreter.
    case = tune.Case("parts of K, Triton", torch.float16, "nf4", 3, 64, 640)
    record = tune.measure_case(case, CPU, 0.001)
    assert set(record["microseconds"]) == {"by rule", "1", "2", "3"} and "refused" not in record
    assert set(made) == {1, 2, 3}
    library = tune.measure_case(tune.Case("parts of K, library", torch.float16, "nf4", 3, 64, 640), CPU, 0.001)
    assert not library["microseconds"] and library["refused"]["all"].startswith("not measured, no CUDA library: ")


def test_the_small_product_is_timed_with_the_best_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"dtype": "bfloat16", "weight": "nf4", "M": 4, "N": 32, "K": 64, "r": 8}
    best = {"decision": "parts of K, Triton", **shape, "microseconds": {"by rule": 3.0, "2": 2.0, "4": 4.0}}
    other = {**best, "M": 8, "microseconds": {"16": 1.0}}
    case = tune.Case("evaluation", torch.bfloat16, "nf4", 4, 32, 64)
    assert tune.best_splits(case, False, [other, best]) == 2
    assert tune.best_splits(case, True, [other, best]) == tune.best_splits(case, False, []) == 0
    seen = {}
    possible = [Way("small product"), Way("small product", by_library=True)]
    monkeypatch.setattr(tune, "possible_ways", lambda *a, **o: possible)
    monkeypatch.setattr(
        MoDALinear, "forward", lambda self, x, ids: seen.setdefault(fold_regimes._forced.get(), splits._forced.get())
    )
    ways, _ = tune.evaluation_ways(case, CPU, [best])
    for step in ways.values():
        step()
    assert seen == {possible[0]: 2, possible[1]: 0}


def test_a_measured_number_of_parts_reaches_the_small_product(user_tables: Path, monkeypatch) -> None:
    shape = {"dtype": "bfloat16", "weight": "nf4", "M": 4, "N": 32, "K": 64, "r": 8}
    lines = [
        {"decision": "parts of K, Triton", **shape, "microseconds": {"by rule": 3.0, "2": 2.0}},
        {"decision": "parts of K, library", **shape, "microseconds": {"by rule": 1.0, "2": 2.0, "4": 0.5}},
    ]
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(measured, "chip_name", lambda device: "a chip")
    path = measured.table_path(user_tables, "a chip")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(measured.document_of("a chip", lines, command="a command")))
    measured.forget()
    layer, bf16 = WeightLayout(32, 64, 1, 64), torch.bfloat16
    assert splits.measured_splits(gpu, bf16, 4, layer, False) == 2
    assert splits.measured_splits(gpu, bf16, 9, layer, True) == 4
    assert splits.measured_splits(gpu, torch.float16, 4, layer, False) == 2
    # No other layer, width or device.
    assert splits.measured_splits(gpu, bf16, 4, WeightLayout(33, 64, 1, 64), False) == 0
    assert splits.measured_splits(gpu, torch.float32, 4, layer, False) == 0
    assert splits.measured_splits(CPU, bf16, 4, layer, False) == 0
    given = []
    monkeypatch.setattr(moda_evaluate, "splits_of", lambda x, layout, by_library: 7)
    monkeypatch.setattr(
        moda_evaluate.cuda_library, "linear", lambda x, *a: (given.append(a[-1]), x.new_zeros(x.shape[0], 64))[1]
    )
    monkeypatch.setattr("sda_fast.kernels.nf4_linear.small_linear_4bit", lambda x, *a, **o: given.append(o["splits"]))
    case = tune.Case("evaluation", torch.float16, "nf4", 4, 64, 64)
    layer, x, _ = tune.evaluated_layer(case, CPU)
    layout, data, statistics = describe_weight(layer.weight)
    member = Member(layout, data, statistics, None, layer.lora_A, layer.lora_B, layer.gates(0), 1.0, slice(0, 8))
    for by_library in (True, False):
        moda_evaluate.small_output(member, x, torch.zeros(4, 8), by_library)
    assert given == [7, 7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it in its table")
def test_all_updates_of_y_and_dx_pass_their_check() -> None:
    for decision in ("update of y", "update of dx"):
        record = tune.measure_case(tune.Case(decision, torch.float32, "any", 9, 24, 32), CPU, 0.001)
        assert set(record["microseconds"]) == {"before", "in place", "accumulator"}


def test_packaged_tables_are_those_of_the_results_folder() -> None:
    packaged = Path(measured.__file__).with_name("tables")
    results = ROOT / "bench" / "results" / "tuned"
    files = sorted(packaged.glob("*.json"))
    assert files
    for path in files:
        table = measured.read_table(path)
        assert measured.table_path(packaged, table.device) == path and table.measurements
        assert path.read_text() == (results / path.name).read_text()
        document = json.loads(path.read_text())
        assert all(document[name] for name in ("versions", "date", "command", "timer"))
