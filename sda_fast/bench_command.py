"""`sda-fast bench`: one adapted layer beside the frozen layer and other ways, measured on the device at hand.

The benchmark is in the repository's folder `bench/`, which no wheel has.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sda_fast.arguments import setting


@dataclass
class BenchConfig:
    """What `sda-fast bench` measures and where its results go."""

    quick: bool = setting(True, "the short table of cases; --no-quick measures the whole one")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to measure; auto takes a GPU if there is one")
    layers: tuple[str, ...] = setting((), "only these layers: q, up, down, k (of Qwen2.5-VL-7B), medium or small")
    methods: tuple[str, ...] = setting((), 'only these methods, for example MoDA "frozen layer" "PEFT LoRA"')
    seconds: float = setting(4.0, "how long each case is timed per pass")
    compile_cases: int | None = setting(
        None, "compile the baseline under torch.compile for so many cases (default: all)"
    )
    limit: float = setting(3600.0, "start no further case after so many seconds")
    measure: bool = setting(True, "--no-measure only draws and writes tables from the results files there are")
    output: Path | None = setting(None, "folder of the results files (default: bench/results of the checkout)")
    picture: bool = setting(True, "draw a picture beside the results file (needs matplotlib)")
    page: Path | None = setting(None, "rewrite the tables of this page, docs/performance.md, from the results files")
    invocation: str = field(default="", metadata={"hidden": True})

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.limit < 0:
            raise ValueError(f"seconds must be positive and limit not negative, got {self.seconds} and {self.limit}")


def bench_folder() -> Path:
    """The repository's folder `bench/`: beside the package in an editable install, else in the working directory.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    places = [Path(__file__).resolve().parents[1] / "bench", Path.cwd() / "bench"]
    for place in places:
        if (place / "layers.py").is_file():
            return place
    raise FileNotFoundError(
        "the benchmarks are in the repository, not in the installed package: get a checkout of sda-fast and run "
        f"`sda-fast bench` from its root (looked for layers.py in {places[0]} and {places[1]})"
    )


def run_bench(config: BenchConfig) -> str:
    """Measure case by case, write the results file, picture and page; returns the table and what was written."""
    folder = bench_folder()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    output = config.output or folder / "results"
    invocation = config.invocation or shlex.join(["sda-fast", *sys.argv[1:]])
    config = dataclasses.replace(config, output=output, invocation=invocation)
    lines = []
    if config.measure:
        lines.append(importlib.import_module("layers").run(config))
    tables = importlib.import_module("tables")
    written = tables.result_files(output)
    if config.picture:
        written += tables.draw_all(output)
    if config.page:
        tables.update_page(config.page, output)
        written.append(config.page)
    return "\n".join([*lines, "", "results: " + ", ".join(map(str, written))])
