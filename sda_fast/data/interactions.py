"""The interaction log: a table of user, item, timestamp read whole into arrays."""

from __future__ import annotations

import gzip
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from sda_fast.atomic import write_bytes_atomic
from sda_fast.data.errors import DataError, log_warnings
from sda_fast.data.items import Catalogue, check_id
from sda_fast.data.lines import read_lines, split_fields

logger = logging.getLogger(__name__)

USER_COLUMNS = ("user_id", "user")
ITEM_COLUMNS = ("item_id", "item")
TIMESTAMP_COLUMNS = ("timestamp", "time")
_DELIMITERS = ("\t", ",", ";")


@dataclass
class Interactions:
    """n interactions in file order.

    Attributes:
        user_ids: user names in order of first appearance.
        item_ids: item names; the catalogue's order where a catalogue was given, else order of first appearance.
        users: int32 [n], positions in `user_ids`.
        items: int32 [n], positions in `item_ids`.
        timestamps: float64 [n]; only their order within a user matters.
        warnings: counted by name (docs/inputs.md).
    """

    user_ids: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    warnings: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.users)


def read_interactions(
    path: str | Path,
    catalogue: Catalogue | None = None,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
) -> Interactions:
    """Read a table with a header, separated by tabs, commas or semicolons (seen from the header), plain or gzipped.

    Columns beside user, item and timestamp (a rating, say) are ignored. Timestamps are numbers or ISO 8601 dates (UTC
    where no zone is given).

    Args:
        catalogue: where given, item positions are the catalogue's, and rows with other items are left out and counted
            as unknown_item.
        user_column, item_column, timestamp_column: header names; default user_id or user, item_id or item, timestamp
            or time.

    Raises:
        DataError: with file and line; a missing column, a row with another number of fields than the header, an empty
            id, an unreadable timestamp, a damaged file, or no usable row at all.
    """
    path = Path(path)
    lines = read_lines(path)
    _, header = next(lines, (0, ""))
    if not header.strip():
        raise DataError("expected a header line with user_id, item_id, timestamp, got an empty line", path, 1)
    delimiter = max(_DELIMITERS, key=header.count)
    columns = [name.strip() for name in split_fields(header, delimiter, path, 1)]
    user_at = _column(columns, user_column, USER_COLUMNS, path)
    item_at = _column(columns, item_column, ITEM_COLUMNS, path)
    time_at = _column(columns, timestamp_column, TIMESTAMP_COLUMNS, path)

    warnings: Counter[str] = Counter()
    users, items, times, rows_lines = _read_rows(
        lines, delimiter, len(columns), (user_at, item_at, time_at), path, warnings
    )
    if not users:
        raise DataError("holds a header and no interactions", path)
    timestamps = _parse_timestamps(times, rows_lines, path)
    user_ids, user_positions = _number_ids(users, "user", rows_lines, path)
    item_ids, item_positions = _number_ids(items, "item", rows_lines, path)
    if catalogue is not None:
        to_catalogue = np.array([catalogue.index.get(name, -1) for name in item_ids], dtype=np.int32)
        item_positions = to_catalogue[item_positions]
        known = item_positions >= 0
        if not known.any():
            raise DataError(
                f"none of the {len(item_ids)} items is in the catalogue of {len(catalogue)}; "
                f"the first here is {item_ids[0]!r}, there {catalogue[0].item_id!r}",
                path,
            )
        if not known.all():
            warnings["unknown_item"] = int((~known).sum())
            seen, user_positions = np.unique(user_positions[known], return_inverse=True)
            user_ids = [user_ids[position] for position in seen]
            user_positions = user_positions.astype(np.int32)
            item_positions, timestamps = item_positions[known], timestamps[known]
        item_ids = catalogue.item_ids
    log_warnings(logger, str(path), warnings)
    return Interactions(user_ids, item_ids, user_positions, item_positions, timestamps, warnings)


def write_interactions(interactions: Interactions, path: str | Path) -> None:
    """Write user_id, item_id, timestamp as tab-separated text (gzipped if `path` ends in .gz), atomically."""
    path = Path(path)
    whole = bool((interactions.timestamps == np.floor(interactions.timestamps)).all())
    rows = ["user_id\titem_id\ttimestamp\n"]
    for user, item, timestamp in zip(
        interactions.users.tolist(), interactions.items.tolist(), interactions.timestamps.tolist(), strict=True
    ):
        time = int(timestamp) if whole else repr(timestamp)
        rows.append(f"{interactions.user_ids[user]}\t{interactions.item_ids[item]}\t{time}\n")
    content = "".join(rows).encode("utf-8")
    write_bytes_atomic(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def select_rows(interactions: Interactions, keep: np.ndarray) -> Interactions:
    """The rows where `keep` (bool [n]) is true; users and items without any row left lose their position."""
    seen_users, users = np.unique(interactions.users[keep], return_inverse=True)
    seen_items, items = np.unique(interactions.items[keep], return_inverse=True)
    return Interactions(
        [interactions.user_ids[position] for position in seen_users],
        [interactions.item_ids[position] for position in seen_items],
        users.astype(np.int32),
        items.astype(np.int32),
        interactions.timestamps[keep],
        interactions.warnings.copy(),
    )


def k_core(interactions: Interactions, k: int) -> Interactions:
    """The largest subset in which every user and every item has at least k rows; 0 or 1 keeps everything.

    A (user, item) pair that occurs again counts once.
    """
    keys = interactions.users.astype(np.int64) * len(interactions.item_ids) + interactions.items
    _, first, pair = np.unique(keys, return_index=True, return_inverse=True)
    users, items = interactions.users[first], interactions.items[first]
    kept = np.ones(len(first), dtype=bool)
    while True:
        user_counts = np.bincount(users[kept], minlength=len(interactions.user_ids))
        item_counts = np.bincount(items[kept], minlength=len(interactions.item_ids))
        remaining = kept & (user_counts[users] >= k) & (item_counts[items] >= k)
        if (remaining == kept).all():
            return select_rows(interactions, kept[pair])
        kept = remaining


def _column(columns: list[str], wanted: str | None, usual: tuple[str, ...], path: Path) -> int:
    names = usual if wanted is None else (wanted,)
    found = [position for name in names for position, column in enumerate(columns) if column == name]
    if not found:
        raise DataError(f"expected a column named {' or '.join(names)}, the header has {columns}", path, 1)
    if len(found) > 1:
        raise DataError(f"more than one column could be {names[0]}: the header has {columns}", path, 1)
    return found[0]


def _read_rows(
    lines: Iterable[tuple[int, str]],
    delimiter: str,
    width: int,
    columns: tuple[int, int, int],
    path: Path,
    warnings: Counter[str],
) -> tuple[list[str], list[str], list[str], list[int]]:
    user_at, item_at, time_at = columns
    users: list[str] = []
    items: list[str] = []
    times: list[str] = []
    rows_lines: list[int] = []
    for line_number, line in lines:
        if not line.strip():
            warnings["blank_line"] += 1
            continue
        fields = split_fields(line, delimiter, path, line_number)
        if len(fields) != width:
            raise DataError(f"expected {width} fields as in the header, got {len(fields)}", path, line_number)
        users.append(fields[user_at])
        items.append(fields[item_at])
        times.append(fields[time_at])
        rows_lines.append(line_number)
    return users, items, times, rows_lines


def _number_ids(names: list[str], what: str, rows_lines: list[int], path: Path) -> tuple[list[str], np.ndarray]:
    index: dict[str, int] = {}
    positions = np.fromiter((index.setdefault(name, len(index)) for name in names), dtype=np.int32, count=len(names))
    for position, name in enumerate(index):
        if not name.strip() or not name.isprintable():
            check_id(name.strip() and name, f"the {what} id", path, rows_lines[int(np.argmax(positions == position))])
    return list(index), positions


def _parse_timestamps(texts: list[str], rows_lines: list[int], path: Path) -> np.ndarray:
    try:
        timestamps = np.array([float(text) for text in texts], dtype=np.float64)
    except ValueError:
        timestamps = np.array([_parse_timestamp(text) for text in texts], dtype=np.float64)
    if not np.isfinite(timestamps).all():
        row = int(np.flatnonzero(~np.isfinite(timestamps))[0])
        raise DataError(f"cannot read the timestamp {texts[row]!r}: no number, no ISO 8601 date", path, rows_lines[row])
    return timestamps


def _parse_timestamp(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
