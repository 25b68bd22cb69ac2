"""The command line: options made from configuration dataclasses, and clear errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import sda_fast
from sda_fast.arguments import add_config_arguments, config_from_arguments
from sda_fast.cli import COMMANDS, main


@dataclass
class EveryKind:
    items: Path = field(metadata={"help": "where from"})
    rate: float = field(default=0.5, metadata={"help": "100% sure"})
    kind: Literal["soft", "hard"] = "soft"
    chunk: int | Literal["auto"] | None = None
    shuffle: bool = True
    seeds: tuple[int, ...] = (0, 1)
    targets: str | list[str] = "all-linear"
    vectors: dict[str, Path] = field(default_factory=dict)


def parse(*words: str) -> EveryKind:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, EveryKind)
    parser.format_help()
    return config_from_arguments(EveryKind, parser.parse_args(list(words)))


def test_options_not_given_keep_the_defaults_of_the_dataclass() -> None:
    assert parse("--items", "a.jsonl") == EveryKind(items=Path("a.jsonl"))


def test_every_kind_of_field_is_read() -> None:
    config = parse(
        *("--items", "a", "--rate", "1e-4", "--kind", "hard", "--chunk", "auto", "--no-shuffle", "--seeds", "3", "4"),
        *("--targets", "q_proj", "k_proj", "--vectors", "SDA=x.safetensors", "zero=y", "--vectors", "more=z"),
    )
    assert config == EveryKind(
        items=Path("a"),
        rate=1e-4,
        kind="hard",
        chunk="auto",
        shuffle=False,
        seeds=(3, 4),
        targets=["q_proj", "k_proj"],
        vectors={"SDA": Path("x.safetensors"), "zero": Path("y"), "more": Path("z")},
    )
    assert parse("--items", "a", "--chunk", "32").chunk == 32


@pytest.mark.parametrize("words", [["--chunk", "many"], ["--vectors", "nopath"], ["--kind", "warm"], ["--rate", "x"]])
def test_a_word_that_cannot_be_read_is_an_error(words: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse("--items", "a", *words)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: sda-fast" in shown and "--" in shown


def test_a_missing_file_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no_items.jsonl"
    status = main(["finetune", "--model", str(tmp_path), "--items", str(missing), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    assert status == 2
    assert "sda-fast finetune:" in shown and "Traceback" not in shown


def test_importing_sda_fast_imports_no_later_stage() -> None:
    code = (
        "import sys, sda_fast, sda_fast.ops, sda_fast.moda, sda_fast.losses\n"
        "names = [getattr(sda_fast, name) for name in sda_fast.__all__]\n"
        "late = {'cornac', 'matplotlib', 'transformers', 'peft', 'bitsandbytes', 'accelerate'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MoDaLinear'"):
        sda_fast.MoDaLinear  # noqa: B018
