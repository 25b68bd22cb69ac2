"""Tables of measured times: which one is read, what it answers, and that no other device's is ever believed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sda_fast.ops import fold_regimes, measured, repacked
from sda_fast.ops.fold_regimes import Way, evaluation_way, possible_ways, way_by_rule, way_of
from sda_fast.ops.measured import chip_name, document_of, fastest, table_path
from sda_fast.ops.quantized import WeightLayout

CPU = torch.device("cpu")
CHIP = chip_name(CPU)
GPU = torch.device("cuda", 0)
PACKAGED = Path(measured.__file__).with_name("tables")
FOLD, UNFOLD = "fold", "unfold"


@pytest.fixture(autouse=True)
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the user's tables, and no packaged ones."""
    monkeypatch.setenv("SDA_FAST_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(measured, "PACKAGED_TABLES", tmp_path / "packaged")
    measured.forget()
    yield tmp_path / "tuned"
    measured.forget()


def record(M: int, N: int, K: int, r: int = 8, *, dtype: str = "float32", weight: str = "float", **times: float):
    names = {"fold": FOLD, "unfold": UNFOLD, "in_place": "in place", "accumulator": "accumulator"}
    microseconds = {names[name]: time for name, time in times.items()}
    decision = "update of y" if "accumulator" in times else "evaluation"
    kind = {"decision": decision, "dtype": dtype, "weight": weight}
    return {**kind, "M": M, "N": N, "K": K, "r": r, "microseconds": microseconds}


def write(folder: Path, *records: dict, device: str = CHIP, path: Path | None = None) -> Path:
    path = path or table_path(folder, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document_of(device, records, command="a command")))
    measured.forget()
    return path


def ask(M: int, N: int, K: int, possible: tuple[str, ...] = (FOLD, UNFOLD), **options) -> str | None:
    options = {"dtype": torch.float32, "weight": "float"} | options
    return fastest(CPU, "evaluation", possible, rows=M, out_features=N, in_features=K, **options)


def test_the_nearest_layer_then_the_nearest_rows_decide(user_tables: Path) -> None:
    lines = [record(1, 512, 512, fold=2, unfold=1), record(4096, 512, 512, fold=1, unfold=2)]
    write(user_tables, *lines, record(16, 700, 512, fold=1, unfold=2))
    assert [ask(M, 512, 512) for M in (1, 4, 4096, 10**6)] == [UNFOLD, UNFOLD, FOLD, FOLD]
    assert ask(16, 690, 512) == ask(16, 512, 512) == FOLD


def test_few_rows_do_not_answer_for_many(user_tables: Path) -> None:
    few = [record(M, 512, 512, fold=2, unfold=1) for M in (1, 16, 64)]
    write(user_tables, *few, record(8192, 4096, 4096, fold=1, unfold=2))
    assert [ask(M, 512, 512) for M in (64, 256, 257, 8192)] == [UNFOLD, UNFOLD, None, None]
    # A layer like it that was measured with as many rows does.
    write(user_tables, *few, record(8192, 700, 512, fold=1, unfold=2))
    assert [ask(M, 512, 512) for M in (256, 1024, 2048, 8192, 10**6)] == [UNFOLD, None, FOLD, FOLD, FOLD]


def test_other_16_bits_and_4_bits_stand_in_only_where_nothing_else_was_measured(user_tables: Path) -> None:
    line = record(16, 512, 512, dtype="bfloat16", weight="nf4", fold=1, unfold=2)
    write(user_tables, line)
    for dtype in (torch.bfloat16, torch.float16):
        for weight in ("nf4", "fp4"):
            assert ask(16, 512, 512, dtype=dtype, weight=weight) == FOLD
    assert ask(16, 512, 512, weight="nf4") is None and ask(16, 512, 512, dtype=torch.float16) is None
    write(user_tables, line, record(16, 600, 512, dtype="float16", weight="fp4", fold=2, unfold=1))
    assert ask(16, 512, 512, dtype=torch.float16, weight="fp4") == UNFOLD
    assert ask(16, 512, 512, dtype=torch.bfloat16, weight="fp4") == FOLD


def test_layers_dtypes_and_weights_that_were_not_measured_have_no_answer(user_tables: Path) -> None:
    write(user_tables, record(64, 512, 512, fold=1, unfold=2))
    assert ask(64, 512, 512) == ask(64, 1024, 256) == FOLD
    assert ask(64, 1025, 512) is None and ask(64, 512, 255) is None and ask(0, 512, 512) is None
    assert ask(64, 512, 512, dtype=torch.bfloat16) is None and ask(64, 512, 512, weight="nf4") is None


def test_the_rank_decides_between_measurements_of_one_shape(user_tables: Path) -> None:
    lines = [record(512, 512, 512, r, dtype="bfloat16", weight="any", **t) for r, t in (
        (8, {"in_place": 1, "accumulator": 2}), (64, {"in_place": 2, "accumulator": 1}))]  # fmt: skip
    write(user_tables, *lines)
    ways, shape = ("in place", "accumulator"), {"rows": 512, "out_features": 512, "in_features": 512}
    for r, way in ((8, "in place"), (16, "in place"), (128, "accumulator")):
        assert fastest(CPU, "update of y", ways, dtype=torch.bfloat16, weight="any", r=r, **shape) == way


def test_a_way_that_this_process_cannot_go_does_not_count(user_tables: Path) -> None:
    fast = record(4, 512, 512, fold=3, unfold=2)
    fast["microseconds"]["fold by the library"] = 1
    write(user_tables, fast)
    assert ask(4, 512, 512, (FOLD, UNFOLD, "fold by the library")) == "fold by the library"
    assert ask(4, 512, 512) == UNFOLD
    assert ask(4, 512, 512, ("fold by the library", "small product")) is None


def test_a_table_of_another_device_is_never_applied(user_tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = record(4, 512, 512, fold=1, unfold=2)
    write(user_tables, line, device="another chip")
    assert ask(4, 512, 512) is None
    # Even in a file that has this device's name.
    write(user_tables, line, device="another chip", path=table_path(user_tables, CHIP))
    assert ask(4, 512, 512) is None
    assert "is of another chip" in caplog.text


def test_the_users_table_comes_before_the_packaged_one(user_tables: Path, tmp_path: Path) -> None:
    write(tmp_path / "packaged", record(4, 512, 512, fold=1, unfold=2))
    assert ask(4, 512, 512) == FOLD
    write(user_tables, record(4, 512, 512, fold=2, unfold=1))
    assert ask(4, 512, 512) == UNFOLD


def test_the_packaged_table_answers_where_the_users_has_nothing_alike(user_tables: Path, tmp_path: Path) -> None:
    write(tmp_path / "packaged", record(4, 512, 512, fold=1, unfold=2), record(512, 512, 512, fold=1, unfold=2))
    write(user_tables, record(4, 4096, 4096, fold=2, unfold=1), record(4, 512, 512, fold=2, unfold=1))
    assert ask(4, 4096, 4096) == ask(4, 512, 512) == UNFOLD
    assert ask(512, 512, 512) == FOLD
    write(user_tables)
    assert ask(4, 512, 512) == FOLD


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> measured.Table:
    """The packaged table of the H200, as if this were one."""
    monkeypatch.setattr(measured, "PACKAGED_TABLES", PACKAGED)
    monkeypatch.setattr(measured, "chip_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(fold_regimes, "bitsandbytes_multiplies", lambda device, dtype, layout: layout.quant_type != 0)
    measured.forget()
    (table,) = measured.tables_of("NVIDIA H200")
    return table


def on_a_gpu(rows: int, N: int, K: int, use_library: bool, dtype: torch.dtype = torch.bfloat16, kind: int = 1) -> str:
    return way_of(GPU, dtype, rows, WeightLayout(N, K, kind, 64, 256), "triton", use_library, False, None).name


def test_no_measurement_of_few_rows_decides_about_many_on_an_h200(h200: measured.Table) -> None:
    shapes = [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944), (4096, 4096), (14336, 4096), (8192, 8192)]
    for N, K in shapes:
        for rows in (1, 16, 64, 256, 1024, 8192, 30_000):
            for weight in ("nf4", "float"):
                line = h200.nearest(fold_regimes.DECISION, "bfloat16", weight, rows, N, K, 8)
                assert line is None or 1 / 4 <= line.rows / min(rows, 8192) <= 4
        assert on_a_gpu(8192, N, K, use_library=True) == "fold by the library"
    # 115 us unfolded and 134 us folded with 64 rows.
    assert on_a_gpu(64, 18944, 3584, use_library=True) == "unfold"
    assert on_a_gpu(1, 18944, 3584, use_library=False) == "bitsandbytes"


def test_float16_and_fp4_go_the_ways_of_the_measured_kind_on_an_h200(h200: measured.Table) -> None:
    for rows, N, use_library in ((1, 18944, False), (64, 3584, True), (64, 18944, True), (8192, 3584, False)):
        expected = on_a_gpu(rows, N, 3584, use_library)
        assert on_a_gpu(rows, N, 3584, use_library, torch.float16) == expected
        assert on_a_gpu(rows, N, 3584, use_library, kind=2) == expected


@pytest.mark.parametrize("bitsandbytes", [True, False])
@pytest.mark.parametrize("use_library", [True, False])
def test_the_rule_takes_nearly_the_fastest_way_wherever_a_gpu_was_measured(
    use_library: bool, bitsandbytes: bool, h200: measured.Table
) -> None:
    lines = [line for line in h200.measurements if line.decision == fold_regimes.DECISION]
    assert len(lines) == 30
    for line in lines:
        names = [name for name in line.microseconds if use_library or not name.endswith(" by the library")]
        names = [name for name in names if bitsandbytes or name != "bitsandbytes"]
        ways = tuple(Way(name.removesuffix(" by the library"), name.endswith("library")) for name in names)  # type: ignore[arg-type]
        layout = WeightLayout(line.out_features, line.in_features, *((1, 64, 256) if line.weight == "nf4" else ()))
        chosen = way_by_rule(GPU, torch.bfloat16, line.rows, layout, "triton", ways).name
        assert line.microseconds[chosen] <= 1.01 * min(line.microseconds[name] for name in names), (line, chosen)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 99}', '{"format": 1, "device": "x", "records": [{"microseconds": {"fold": 1}}]}']
)
def test_a_broken_file_is_passed_over(user_tables: Path, tmp_path: Path, text: str, caplog) -> None:
    write(tmp_path / "packaged", record(4, 512, 512, fold=1, unfold=2))
    write(user_tables).write_text(text)
    assert ask(4, 512, 512) == FOLD
    assert "is not used" in caplog.text


def test_times_and_sizes_are_checked(user_tables: Path) -> None:
    for broken in (record(4, 512, 512, fold=-1, unfold=1), record(0, 512, 512, fold=1, unfold=1)):
        with pytest.raises(ValueError, match="must be positive"):
            measured.read_table(write(user_tables, broken))


def test_evaluation_asks_the_table_and_falls_back_to_the_rule(user_tables: Path) -> None:
    layout, x = WeightLayout(512, 512), torch.zeros(4, 512)
    assert evaluation_way(x, layout, "torch", False) == Way("unfold")
    write(user_tables, record(4, 512, 512, fold=1, unfold=2))
    assert evaluation_way(x, layout, "torch", False) == Way("fold")
    # What was measured is what backend="auto" runs, here PyTorch.
    assert evaluation_way(x, layout, "triton", False) == Way("unfold")
    assert evaluation_way(x, WeightLayout(512, 512, 1, 64), "torch", False) == Way("unfold")


def test_a_table_from_before_bitsandbytes_product_does_not_speak_against_it(user_tables: Path, monkeypatch) -> None:
    monkeypatch.setattr(repacked, "product_exists", lambda: True)
    layout = WeightLayout(512, 512, 1, 64)

    def ways(*rows: int) -> list[str]:
        x = [torch.zeros(M, 512, dtype=torch.bfloat16) for M in rows]
        return [evaluation_way(part, layout, "torch", False, may_repack=True).what for part in x]

    of_weight = {"dtype": "bfloat16", "weight": "nf4"}
    assert ways(0, 1, 16, 17, 4000) == ["unfold", "bitsandbytes", "bitsandbytes", "unfold", "fold"]
    write(user_tables, *(record(M, 512, 512, fold=1, unfold=2, **of_weight) for M in (1, 64)))
    assert ways(1, 16, 17, 64) == ["bitsandbytes", "bitsandbytes", "fold", "fold"]
    newer = [record(M, 512, 512, fold=2, unfold=3, **of_weight) for M in (1, 4, 32)]
    for line, time in zip(newer, (1, 9, 1), strict=True):
        line["microseconds"]["bitsandbytes"] = time
    write(user_tables, *newer)
    assert ways(1, 4, 32) == ["bitsandbytes", "fold", "bitsandbytes"]
    # Only a layer can keep the copy.
    assert evaluation_way(torch.zeros(1, 512, dtype=torch.bfloat16), layout, "torch", False).what == "fold"


def test_only_the_very_layer_counts_where_that_is_asked_for(user_tables: Path) -> None:
    write(user_tables, record(4, 512, 512, fold=1, unfold=2))
    assert ask(9, 512, 512, same_layer=True) == ask(9, 512, 500) == FOLD
    assert ask(9, 512, 500, same_layer=True) is None
    assert ask(9, 512, 512, must_have="fold") == FOLD and ask(9, 512, 512, must_have="another") is None


def test_possible_ways_depend_on_rows_weight_and_library() -> None:
    packed, few, many = WeightLayout(64, 64, 1, 64), torch.zeros(64, 64).half(), torch.zeros(65, 64).half()
    plain = {Way("fold"), Way("unfold")}
    assert set(possible_ways(few, WeightLayout(64, 64), "triton", True)) == plain
    assert set(possible_ways(few, packed, "torch", False)) == plain
    assert set(possible_ways(few, packed, "triton", False)) == plain | {Way("small product")}
    library = {Way("fold", by_library=True)}
    assert set(possible_ways(many, packed, "triton", True)) == plain | library
    both = {Way("small product"), Way("small product", by_library=True)}
    assert set(possible_ways(few, packed, "triton", True)) == plain | library | both
    assert set(possible_ways(few.float(), packed, "triton", True)) == plain | {Way("small product")}


def test_the_users_folder_follows_the_platform_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDA_FAST_TUNED", "")
    assert measured.user_folder() is None
    monkeypatch.delenv("SDA_FAST_TUNED")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert measured.user_folder() == Path("/somewhere/sda-fast/tuned")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert measured.user_folder() == Path("/home/one/.cache/sda-fast/tuned")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert measured.user_folder() == Path("/home/one/Library/Caches/sda-fast/tuned")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert measured.user_folder() == Path("/local/sda-fast/tuned")


def test_importing_the_library_reads_no_table_and_asks_no_device(tmp_path: Path) -> None:
    script = """
import torch
def refuse(*arguments): raise AssertionError("a device was asked for")
torch.cuda.is_available = torch.cuda.get_device_name = torch.cuda.device_count = refuse
import sda_fast
from sda_fast.ops import fold_regimes, measured, regimes
assert not measured.tables_of.cache_info().currsize and not measured.chip_name.cache_info().currsize
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
