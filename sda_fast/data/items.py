"""The item catalogue: JSON lines in, items with attributes and image paths out."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sda_fast.atomic import write_bytes_atomic
from sda_fast.data.errors import DataError, log_warnings
from sda_fast.data.lines import read_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One catalogue entry.

    Attributes:
        item_id: never empty, without control characters.
        attributes: the free fields of the line in their order (`item_id` and `image` excluded), JSON values.
        image: path of the picture, which may not exist, or None.
    """

    item_id: str
    attributes: dict[str, object]
    image: Path | None = None


@dataclass
class Catalogue:
    """Items in file order, with `index` from item id to position and `warnings` counted by name (docs/inputs.md)."""

    items: list[Item]
    warnings: Counter[str] = field(default_factory=Counter)
    index: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {item.item_id: position for position, item in enumerate(self.items)}
        if len(self.index) != len(self.items):
            repeated = next(name for name, count in Counter(self.item_ids).items() if count > 1)
            raise ValueError(f"item ids must be unique, {repeated!r} is not")

    @property
    def item_ids(self) -> list[str]:
        return [item.item_id for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Item:
        return self.items[position]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def has_text(value: object) -> bool:
    """Whether a JSON value holds anything that can be written out: a non-blank string, a number, true or false."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(has_text(part) for part in value)
    if isinstance(value, dict):
        return any(has_text(part) for part in value.values())
    return value is not None


def check_id(value: object, what: str, path: str | Path, line: int) -> str:
    """The id as a string.

    Raises:
        DataError: not a string or integer, empty, or with a control character (tables join ids by newlines).
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{what} must be a string or an integer, got {json.dumps(value)}", path, line)
    text = str(value)
    if not text:
        raise DataError(f"{what} is empty", path, line)
    if not text.isprintable() and any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise DataError(f"{what} {text!r} holds a control character", path, line)
    return text


def read_items(path: str | Path, image_folder: str | Path | None = None) -> Catalogue:
    """Read a catalogue from JSON lines, plain or gzipped.

    Each line is an object with `item_id` (string or integer), optionally `image` (path relative to `image_folder`, or
    null) and any other fields. Faults are counted in `Catalogue.warnings` and logged, or raised: docs/inputs.md.

    Args:
        path: items.jsonl or items.jsonl.gz.
        image_folder: where image paths start; default the folder of `path`.

    Raises:
        DataError: with file and line; e.g. a broken line, a missing item_id, one id with two different contents.
    """
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    items: list[Item] = []
    position_and_line: dict[str, tuple[int, int]] = {}
    warnings: Counter[str] = Counter()
    for line_number, line in read_lines(path):
        if not line.strip():
            warnings["blank_line"] += 1
            continue
        row = _parse_line(line, path, line_number, warnings)
        if "item_id" not in row:
            raise DataError(f"item_id is missing; the fields are {sorted(row)}", path, line_number)
        item_id = check_id(row.pop("item_id"), "item_id", path, line_number)
        image = _image_path(row.pop("image", None), folder, path, line_number)
        item = Item(item_id, row, image)
        if item_id in position_and_line:
            position, first_line = position_and_line[item_id]
            if items[position] != item:
                raise DataError(
                    f"item_id {item_id!r} again, with other content than in line {first_line}", path, line_number
                )
            warnings["duplicate_item"] += 1
            continue
        position_and_line[item_id] = (len(items), line_number)
        items.append(item)
        if image is None:
            warnings["missing_image"] += 1
        elif not os.path.isfile(image):
            warnings["image_not_found"] += 1
        if not has_text(item.attributes):
            warnings["empty_text"] += 1
    if not items:
        raise DataError("holds no items", path)
    log_warnings(logger, str(path), warnings)
    return Catalogue(items, warnings)


def write_items(catalogue: Catalogue, path: str | Path) -> None:
    """Write JSON lines (gzipped if `path` ends in .gz) atomically, image paths relative to the folder of `path`."""
    path = Path(path)
    lines = []
    for item in catalogue:
        image = None if item.image is None else Path(os.path.relpath(item.image, path.parent)).as_posix()
        row = {"item_id": item.item_id, **item.attributes, "image": image}
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    content = "".join(lines).encode("utf-8")
    write_bytes_atomic(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _parse_line(line: str, path: Path, line_number: int, warnings: Counter[str]) -> dict[str, Any]:
    def null_for_nan(_: str) -> None:
        warnings["nan_value"] += 1

    def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise DataError(f"field {repeated!r} appears twice", path, line_number)
        return fields

    try:
        row = json.loads(line, parse_constant=null_for_nan, object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} at column {error.colno}", path, line_number) from error
    except RecursionError as error:
        raise DataError("broken JSON: nested too deeply", path, line_number) from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type(row).__name__}", path, line_number)
    if "\\ud" in line or "\\uD" in line:
        row = _replace_surrogates(row, warnings)
    return row


def _replace_surrogates(value: Any, warnings: Counter[str]) -> Any:
    if isinstance(value, str):
        clean = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in value)
        warnings["invalid_unicode"] += clean != value
        return clean
    if isinstance(value, list):
        return [_replace_surrogates(part, warnings) for part in value]
    if isinstance(value, dict):
        return {_replace_surrogates(k, warnings): _replace_surrogates(part, warnings) for k, part in value.items()}
    return value


def _image_path(value: object, folder: Path, path: Path, line_number: int) -> Path | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise DataError(f"image must be a path or null, got {json.dumps(value)}", path, line_number)
    if Path(value).is_absolute() or "\0" in value:
        raise DataError(f"image must be relative to the image folder, got {value!r}", path, line_number)
    return folder / value
