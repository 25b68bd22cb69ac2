"""`--preset published` of every job, setting by setting against the table of docs/published.md."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sda_fast import pipeline
from sda_fast.arguments import add_config_arguments, config_from_arguments
from sda_fast.cli import COMMANDS, main
from sda_fast.jobs.train_state import activation_dtype, make_loss, make_optimizer
from sda_fast.lvlm.encode import reduce_buckets
from sda_fast.moda.config import MoDAConfig
from sda_fast.presets import differences_from_preset, log_differences, with_preset
from sda_fast.recommend import RecommendConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "published.md"
REQUIRED = {
    "finetune": ["--model", "m", "--items", "i", "--output", "o"],
    "embed": ["--model", "m", "--items", "i", "--output", "o"],
    "recommend": ["--interactions", "l", "--output", "o"],
    "run": ["--items", "i", "--interactions", "l", "--output", "o"],
}
ROW = re.compile(r"^\| (?P<what>[^|]+) \| [^|]+ \| (?P<job>\w+) \| `(?P<option>--[^`]+)`[^|]*\|$", re.MULTILINE)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]


def parsed(job: str, *words: str) -> Any:
    command = COMMANDS[job]
    config_class = getattr(importlib.import_module(command.module), command.config)
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, config_class)
    return config_from_arguments(config_class, parser.parse_args([*REQUIRED[job], *words]))


def published(job: str, *words: str) -> Any:
    return parsed(job, "--preset", "published", *words)


def field_of(option: str) -> str:
    return option.split()[0].removeprefix("--no-").removeprefix("--").replace("-", "_")


def test_every_line_of_the_table_is_read() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## The settings")[1].split("\n## ")[0]
    assert len(ROWS) == len(re.findall(r"^\| ", table, re.MULTILINE)) - 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['job']} {row['option']}")
def test_every_line_of_the_table_is_what_the_preset_sets(row: dict[str, str]) -> None:
    name = field_of(row["option"])
    by_option = getattr(parsed(row["job"], *shlex.split(row["option"])), name)
    by_preset = published(row["job"])
    # finetune takes its published steps where neither steps nor epochs are given.
    value = by_preset.total_steps(100) if name == "steps" else getattr(by_preset, name)
    assert value == by_option


@pytest.mark.parametrize("job", REQUIRED)
def test_the_table_leaves_out_nothing_that_the_preset_sets(job: str) -> None:
    listed = {field_of(row["option"]) for row in ROWS if row["job"] == job}
    settings = set(type(published(job)).presets["published"])
    if job == "run":
        # What run hands on to the other jobs stands in their lines.
        listed |= {field_of(row["option"]) for row in ROWS}
    implied = {"schedule", "warmup_steps", "id_only"}
    assert settings - implied <= listed, settings - listed


def test_what_the_settings_come_to() -> None:
    config = published("finetune")
    moda = MoDAConfig(r=config.r, num_experts=config.num_experts, lora_alpha=config.lora_alpha)
    assert (moda.scaling, moda.r // moda.num_experts, moda.gate_dim, moda.num_modalities) == (4.0, 1, 64, 2)
    assert moda.modality_names == ("image", "text")
    assert activation_dtype(config.precision, torch.device("cuda")) == torch.bfloat16
    loss = make_loss(config)
    assert float(loss.temperature.detach()) == pytest.approx(3.0) and loss.log_temperature.requires_grad
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(config, [{"params": [weight]}], torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    assert {config.learning_rate_at(step, 4000) for step in (0, 1, 2000, 3999)} == {2e-4}
    assert optimizer.defaults["lr"] == 2e-4 and optimizer.defaults["betas"] == (0.9, 0.999)


def test_the_bucket_means_are_256_of_4_and_512_of_5_for_qwen_and_none_for_llama() -> None:
    config = published("finetune")
    qwen = SimpleNamespace(family=SimpleNamespace(name="Qwen2-VL / Qwen2.5-VL"), hidden_size=3584)
    llama = SimpleNamespace(family=SimpleNamespace(name="Mllama (Llama-3.2-Vision)"), hidden_size=4096)
    assert (config.loss_width(qwen), config.loss_width(llama)) == (768, None)
    vector = torch.arange(3584, dtype=torch.float64)
    first, rest = vector[:1024].view(256, 4).mean(1), vector[1024:].view(512, 5).mean(1)
    assert torch.equal(reduce_buckets(vector, 768), torch.cat([first, rest]))


def test_4_bit_or_16_bit_is_the_users_choice() -> None:
    for job in ("finetune", "embed", "run"):
        assert published(job).quantization == "nf4"
        assert published(job, "--quantization", "none").quantization == "none"


def test_given_options_win_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    config = published("recommend", "--loss", "ce", "--seeds", "3")
    assert (config.loss, config.seeds, config.alignment_over) == ("ce", (3,), "positions")
    assert differences_from_preset(config) == {"loss": ("ce", "bce")}
    with caplog.at_level(logging.INFO):
        log_differences(config)
    assert caplog.messages == ["loss is ce, the preset 'published' has bce"]
    assert published("finetune", "--epochs", "2").total_steps(10) == 20
    assert differences_from_preset(parsed("recommend", "--loss", "ce")) == {}


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="RecommendConfig has no preset 'best', expected one of published"):
        with_preset(RecommendConfig, "best", interactions="l", output="o")


def test_run_hands_the_preset_on_to_every_job_and_its_own_options_win() -> None:
    config = published("run", "--batch-size", "16", "--pca-dim", "256")
    tune = pipeline._finetune_config(config, config.model, "SDA", Path("o"))
    table = pipeline._embed_config(config, config.model, None, Path("o"))
    recommender = pipeline._recommend_config(config, {}, Path("o"))
    assert tune.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    for given, expected, changed in (
        (tune, published("finetune"), {"batch_size": 16, "steps": 4000}),
        (table, published("embed"), {"pca_dim": 256}),
        (recommender, published("recommend"), {}),
    ):
        settings = {name: getattr(expected, name) for name in type(expected).presets["published"]}
        assert {name: getattr(given, name) for name in settings} == settings | changed
        assert given.preset == "published"
    lora = pipeline._finetune_config(config, config.model, "LoRA + InfoNCE", Path("o"))
    assert (lora.adapter, lora.loss, lora.temperature) == ("lora", "infonce", 3.0)


def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.findall(r"^    sda-fast (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["run", "finetune", "embed", "recommend"]
    for line in lines:
        command = COMMANDS[line.split()[0]]
        seen: list[Any] = []
        monkeypatch.setattr(importlib.import_module(command.module), command.function, seen.append)
        assert main(shlex.split(line)) == 0
        assert seen[0].preset == "published"
