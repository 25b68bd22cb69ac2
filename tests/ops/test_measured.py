"""Tables of measured times: which one is read, what it answers, and that no other device's is ever believed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sda_fast.ops import measured, repacked
from sda_fast.ops.fold_regimes import Way, evaluation_way, possible_ways
from sda_fast.ops.measured import chip_name, document_of, fastest, table_path
from sda_fast.ops.quantized import WeightLayout

CPU = torch.device("cpu")
CHIP = chip_name(CPU)
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
    assert [ask(M, 512, 512) for M in (1, 60, 70, 4096, 10**6)] == [UNFOLD, UNFOLD, FOLD, FOLD, FOLD]
    assert ask(1, 690, 512) == FOLD


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
assert not measured.table_of.cache_info().currsize and not measured.chip_name.cache_info().currsize
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
