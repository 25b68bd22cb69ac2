"""Copy a finished run's figures to docs/results: `python docs/publish_run.py RUN NAME --command "sda-fast run ..."`.

RUN is the output folder of `sda-fast run` or `sda-fast demo`. Data and pictures of items stay where they are, unless
`--synthetic` says that they are generated. Afterwards `python docs/update_tables.py` writes README's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from sda_fast.atomic import write_json_atomic
from sda_fast.ops.measured import chip_name

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("metrics.png", "loss.png", "measures.json")
OF_GENERATED_DATA = ("catalogue.png", "similarity.png", "report.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument("name", help="folder under docs/results")
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--note", default="", help="what else was different on the device, for example its load")
    parser.add_argument("--drop", nargs="*", default=[], metavar="PREFIX", help="beginnings of paths to leave out")
    parser.add_argument("--synthetic", action="store_true", help="the data are generated: copy their pictures too")
    options = parser.parse_args()

    folder = ROOT / "docs" / "results" / options.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in FIGURES + (OF_GENERATED_DATA if options.synthetic else ()):
        shutil.copyfile(options.run / "report" / name, folder / name)
    text = (options.run / "recommend" / "results.json").read_text(encoding="utf-8")
    for prefix in options.drop:
        text = text.replace(prefix, "")
    results = json.loads(text)
    write_json_atomic(folder / "results.json", results)
    threads = results["device"].rsplit(", ", 1)[-1]
    versions = {"Python": "python", **{name: name for name in ("torch", "transformers", "cornac")}}
    made_with = {
        "device": f"{chip_name(torch.device('cpu'))}, {os.cpu_count()} cores, {threads}"
        + (f", {options.note}" if options.note else ""),
        "versions": ", ".join(f"{label} {results['versions'][key]}" for label, key in versions.items()),
        "command": options.command,
        "seconds": json.loads((options.run / "timings.json").read_text(encoding="utf-8")),
    }
    write_json_atomic(folder / "made_with.json", made_with)


if __name__ == "__main__":
    main()
