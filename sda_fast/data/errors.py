"""Faults in input files: an error that says where, and warnings that are counted under fixed names."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

WARNING_MEANINGS: dict[str, str] = {
    "blank_line": "An empty line; skipped.",
    "duplicate_item": "An item line repeated with identical content; the first is kept.",
    "empty_text": "No attribute of the item holds any text; the item stays, its text sequence holds the template only.",
    "missing_image": "`image` is null, empty or absent; the item stays, a noise picture stands for its image.",
    "image_not_found": "`image` names a file that is not there; the item stays, a noise picture stands for its image.",
    "broken_image": "The image cannot be decoded to its end; a noise picture stands for it.",
    "oversized_image": "The image claims more pixels than the limit; it is not decoded, a noise picture stands for it.",
    "nan_value": "A bare NaN or Infinity (not JSON) in an attribute; read as null.",
    "invalid_unicode": "An escaped half of a surrogate pair in a string; read as U+FFFD.",
    "unknown_item": "An interaction with an item that the catalogue lacks; the row is left out.",
    "repeated_interaction": "A (user, item) pair seen again; only its earliest occurrence is used in the split.",
    "few_interactions": "A user with fewer than 3 different items; used for training, never evaluated.",
}


class DataError(ValueError):
    """A fault in an input file that cannot be given a meaning.

    Attributes:
        path: the file.
        line: line number counted from 1, or None where the fault is the whole file's.
    """

    def __init__(self, message: str, path: str | Path, line: int | None = None) -> None:
        self.path = Path(path)
        self.line = line
        where = f"{self.path}:{line}" if line is not None else str(self.path)
        super().__init__(f"{where}: {message}")


def log_warnings(logger: logging.Logger, source: str, warnings: Counter[str]) -> None:
    """Log one line per warning name with its count and meaning; `source` says what was read."""
    for name, count in sorted(warnings.items()):
        logger.warning("%s: %s x %d. %s", source, name, count, WARNING_MEANINGS[name])
