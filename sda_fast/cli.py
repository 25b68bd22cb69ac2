"""The program `sda-fast`: one command per job, each a configuration from options and one function call."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sda_fast import __version__
from sda_fast.arguments import add_config_arguments, config_from_arguments


@dataclass(frozen=True)
class Command:
    """A command's one-line summary and where its configuration dataclass and function live."""

    summary: str
    module: str
    config: str
    function: str


COMMANDS = {
    "demo": Command(
        "everything on a generated catalogue: model, fine-tuning, vectors, recommendation, report",
        "sda_fast.demo",
        "DemoConfig",
        "run_demo",
    ),
    "finetune": Command(
        "fine-tune a vision-language model on a catalogue (CMSA + MoDA)",
        "sda_fast.train",
        "FinetuneConfig",
        "finetune",
    ),
    "plan": Command(
        "say what a fine-tuning step will need in memory and time, without a GPU and without the weights",
        "sda_fast.plan",
        "PlanConfig",
        "plan",
    ),
    "embed": Command("turn a whole catalogue into one table of item vectors", "sda_fast.embed", "EmbedConfig", "embed"),
    "recommend": Command(
        "train and evaluate recommenders on item vectors", "sda_fast.recommend", "RecommendConfig", "recommend"
    ),
    "report": Command(
        "write one page with tables and pictures from the other jobs' results",
        "sda_fast.report",
        "ReportConfig",
        "write_report",
    ),
    "export": Command(
        "write a stock LoRA, or a merged model, per modality", "sda_fast.export", "ExportConfig", "export"
    ),
    "run": Command(
        "all of it on your own catalogue: fine-tune, embed, recommend, report",
        "sda_fast.pipeline",
        "PipelineConfig",
        "run_pipeline",
    ),
    "tiny": Command(
        "build the small Qwen2.5-VL model that runs anywhere", "sda_fast.lvlm.tiny", "TinyConfig", "build_tiny"
    ),
    "kernels": Command(
        "compile every kernel for three GPU generations and check registers, spills, shared memory",
        "sda_fast.kernels.gate",
        "GateConfig",
        "run_gate",
    ),
    "bench": Command(
        "time one adapted layer beside the frozen layer, PEFT's LoRA and a loop over experts",
        "sda_fast.bench_command",
        "BenchConfig",
        "run_bench",
    ),
    "generate": Command("write a synthetic catalogue", "sda_fast.data.convert", "GenerateConfig", "generate"),
    "convert": Command(
        "turn Amazon or MovieLens files into a catalogue", "sda_fast.data.convert", "ConvertConfig", "convert"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sda-fast`; returns the exit status (0 done, 2 an error that the message explains, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="sda-fast",
        description="SDA (CMSA + MoDA, arXiv 2512.06883) for multimodal recommendation: fast kernels, small memory.",
    )
    parser.add_argument("--version", action="version", version=f"sda-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="show warnings only")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in words if word in COMMANDS), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == wanted:
            add_config_arguments(subparser, getattr(importlib.import_module(command.module), command.config))
    arguments = parser.parse_args(words)
    # torchrun and accelerate launch number the processes that they start
    first_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first_process and not arguments.quiet else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    command = COMMANDS[arguments.command]
    module = importlib.import_module(command.module)
    try:
        config = config_from_arguments(getattr(module, command.config), arguments)
        if hasattr(config, "invocation"):
            config = dataclasses.replace(config, invocation=shlex.join(["sda-fast", *words]))
        result = getattr(module, command.function)(config)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept and a second start continues from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if arguments.debug:
            raise
        print(f"sda-fast {arguments.command}: {error}", file=sys.stderr)
        return 2
    if result is not None and first_process:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
