"""Pages whose tables are written from results files: what stands between two marks is replaced, the rest is left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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


def documents_of(paths: Sequence[Path]) -> list[tuple[Record, str | None]]:
    """Results files with the link to the picture beside each, as a page in docs/ writes it; None without one."""
    documents = []
    for path in paths:
        picture = path.with_suffix(".png")
        link = Path("..", *picture.parts[-3:]).as_posix() if picture.exists() else None
        documents.append((json.loads(path.read_text(encoding="utf-8")), link))
    return documents


def is_timed(document: Record) -> bool:
    return any("milliseconds" in record for record in document["records"])


@dataclass(frozen=True)
class TablePage:
    """The results files of one benchmark, the tables that a page in docs/ has of them, and their pictures.

    Attributes:
        prefix: results files are prefix-*.json.
        begin, end: the marks that the tables stand between.
        titles: heading by kind of device, "cuda" and "cpu", in the page's order.
        as_markdown: one document, with the link to its picture or None, as text.
        draw: a document's picture, into the given file.
        has_picture: whether a document has what `draw` needs.
    """

    prefix: str
    begin: str
    end: str
    titles: Mapping[str, str]
    as_markdown: Callable[[Record, str | None], str]
    draw: Callable[[Record, Path], Path]
    has_picture: Callable[[Record], bool] = is_timed

    def text(self, results: Path) -> str:
        """What stands between the marks, from the files in `results` of all devices."""
        documents = documents_of(self.result_files(results))
        parts = []
        for kind, title in self.titles.items():
            found = [self.as_markdown(document, link) for document, link in documents if document["kind"] == kind]
            parts += [f"## {title}", *(found or ["not measured"])]
        return "\n\n".join(parts)

    def result_files(self, results: Path) -> list[Path]:
        return sorted(results.glob(f"{self.prefix}-*.json"))

    def update(self, page: Path, results: Path) -> None:
        """Rewrite the tables of `page` from the files in `results`; a page without the marks is an error."""
        replace_between(page, self.begin, self.end, self.text(results))

    def draw_all(self, results: Path) -> list[Path]:
        """A picture beside every results file that has what it needs."""
        drawn = []
        for path in self.result_files(results):
            document = json.loads(path.read_text(encoding="utf-8"))
            if self.has_picture(document):
                drawn.append(self.draw(document, path.with_suffix(".png")))
        return drawn
