"""Lets benchmarks import `baselines`, which is no part of the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what a figure has to name, the processor and the versions, and not which machine it was."""
    import torch

    cpu = machine_info.get("cpu", {})
    kept = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "python": machine_info.get("python_version"),
        "torch": torch.__version__,
        "command": "python -m pytest " + " ".join(config.invocation_params.args),
    }
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep the figures; leave out the checkout's state and settings that say nothing about them."""
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {name: benchmark["stats"][name] for name in ("min", "median", "mean", "stddev", "rounds")}
        benchmark.pop("options", None)
        benchmark.pop("fullname", None)
