"""README's figures are those of the results files, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from sda_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_are_those_of_the_results_files() -> None:
    assert subprocess.run([sys.executable, ROOT / "docs" / "update_tables.py", "--check"]).returncode == 0


def test_every_named_command_and_linked_file_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"sda-fast (\w+)", text)) - {"COMMAND"}
    assert named <= set(COMMANDS), named - set(COMMANDS)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"bash (\S+\.sh)", text):
        assert (ROOT / script).is_file(), script
