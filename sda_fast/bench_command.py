"""`sda-fast bench`: benchmarks on the device at hand, and with --tune the table that chooses among our own ways there.

The benchmarks are in the repository's folder `bench/`, which no wheel has; tuning is in the package.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from sda_fast.arguments import setting

# By what is measured: the module in bench/ that measures, and the one that writes its tables.
MODULES = {
    "layer": ("layers", "tables"),
    "nf4": ("nf4_run", "nf4_tables"),
    "cmsa": ("cmsa_bench", "cmsa_tables"),
    "cached": ("cached_bench", "cached_tables"),
    "finetune": ("finetune_bench", "finetune_tables"),
}

# The options that not every job reads, by who reads them.
OPTIONS = {
    "--what layer": ("what", "quick", "layers", "methods", "compile_cases", "measure", "page"),
    "--what nf4": ("what", "quick", "measure", "page"),
    "--what cmsa": ("what", "quick", "methods", "items", "dimensions", "measure", "page"),
    "--what cached": ("what", "quick", "items", "measure", "page"),
    "--what finetune": ("what", "methods", "items", "steps", "plan", "measure", "page"),
    "--tune": ("quick", "shapes"),
}

SECONDS = {"layer": 4.0, "nf4": 2.0, "cmsa": 2.0, "cached": 2.0, "finetune": 15.0}


@dataclass
class BenchConfig:
    """What `sda-fast bench` measures and where its results go."""

    what: Literal["layer", "nf4", "cmsa", "cached", "finetune"] = setting(
        "layer", "layer: one adapted layer in training and evaluation; nf4: 4-bit decode and products, a decoder layer "
        "in evaluation, embedding a catalogue; cmsa: the contrastive losses; cached: the contrastive step in chunks; "
        "finetune: steps of fine-tuning a 7B model (CPU: a small one) beside PEFT, the expert loop and the planner"
    )  # fmt: skip
    tune: bool = setting(
        False,
        "measure the ways of computing a layer instead, on a GPU also into how many parts the small 4-bit product cuts "
        "K, and write the table that chooses among them here",
    )
    quick: bool = setting(True, "the short table of cases; --no-quick measures the whole one")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to measure; auto takes a GPU if there is one")
    layers: tuple[str, ...] = setting((), "layer: only these, q, up, down, k (of Qwen2.5-VL-7B), medium or small")
    methods: tuple[str, ...] = setting(
        (), 'layer, cmsa, finetune: only these methods, for example MoDA "frozen layer" "PEFT LoRA"'
    )
    items: tuple[int, ...] = setting((), "cmsa, cached: only these batch sizes; finetune: the one")
    steps: int | None = setting(None, "finetune: steps of the main run (default: 50, on a CPU 4)")
    dimensions: tuple[int, ...] = setting((), "cmsa: only vectors of these lengths")
    shapes: tuple[str, ...] = setting((), "with --tune: only these layers, outputs x inputs, such as 3584x18944")
    seconds: float | None = setting(
        None,
        "how long each case is timed per pass (default: 4; nf4, cmsa, cached 2; --tune 0.5); finetune: the longest "
        "that a method's steps take, three times that for the main run (default: 15)",
    )
    compile_cases: int | None = setting(
        None, "layer: compile the baseline under torch.compile for so many cases (default: all)"
    )
    plan: bool = setting(
        True,
        "finetune: run the planner too, a minute for each line; bench/finetune_plan.py does it later, without a GPU",
    )
    limit: float = setting(3600.0, "start no further case after so many seconds")
    anew: bool = setting(
        False,
        "layer, cmsa: measure again the cases that the results file has from the same device, versions and seconds "
        "(layer: also methods and compile cases); otherwise a run goes on where the last one stopped",
    )
    measure: bool = setting(True, "--no-measure only draws and writes tables from the results files there are")
    output: Path | None = setting(
        None, "folder of the results files (default: bench/results of the checkout; --tune: the user's cache folder)"
    )
    picture: bool = setting(True, "draw a picture beside the results file (needs matplotlib)")
    page: Path | None = setting(
        None,
        "rewrite the tables of this page, docs/performance.md, nf4.md, cmsa.md or finetune.md, from the results files",
    )
    invocation: str = field(default="run_bench(BenchConfig(...))", metadata={"hidden": True})

    def __post_init__(self) -> None:
        self.check_options()
        if self.seconds is None:
            self.seconds = 0.5 if self.tune else SECONDS[self.what]
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.seconds <= 0 or self.limit < 0:
            raise ValueError(f"seconds must be positive and limit not negative, got {self.seconds} and {self.limit}")

    def check_options(self) -> None:
        """Refuse what would be ignored.

        Raises:
            ValueError: an option was given that this job does not read.
        """
        job = "--tune" if self.tune else f"--what {self.what}"
        for option in dataclasses.fields(self):
            readers = [reader for reader, names in OPTIONS.items() if option.name in names]
            if readers and job not in readers and getattr(self, option.name) != option.default:
                name = option.name.replace("_", "-")
                raise ValueError(f"--{name} means nothing with {job}, only with {', '.join(readers)}")


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
    """Tune, or measure case by case and write the results file, picture and page; returns what is to be shown."""
    if config.tune:
        from sda_fast import tune

        return tune.run(config, torch.device(chosen_device(config.device)))
    folder = bench_folder()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    output = config.output or folder / "results"
    config = dataclasses.replace(config, output=output)
    lines = []
    if config.measure:
        lines.append(importlib.import_module(MODULES[config.what][0]).run(config))
    page = importlib.import_module(MODULES[config.what][1]).PAGE
    written = page.result_files(output)
    if config.picture:
        written += page.draw_all(output)
    if config.page:
        page.update(config.page, output)
        written.append(config.page)
    return "\n".join([*lines, "", "results: " + ", ".join(map(str, written))])


def chosen_device(name: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        ValueError: "cuda" was asked for and is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU and a CUDA build of torch; neither device nor driver was found")
    return name
