"""Pages whose tables are written from results files: what stands between two marks is replaced, the rest is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between the marks.

    Raises:
        ValueError: the page has not each mark once.
    """
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once each, for the tables to go between")
    head, rest = old.split(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def documents_of(paths: Sequence[Path]) -> list[tuple[dict[str, Any], str | None]]:
    """Results files with the link to the picture beside each, as a page in docs/ writes it; None without one."""
    documents = []
    for path in paths:
        picture = path.with_suffix(".png")
        link = Path("..", *picture.parts[-3:]).as_posix() if picture.exists() else None
        documents.append((json.loads(path.read_text(encoding="utf-8")), link))
    return documents
