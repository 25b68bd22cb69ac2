"""The table of item vectors: one safetensors file, written atomically, checked when read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sda_fast.atomic import write_safetensors_atomic
from sda_fast.data.errors import DataError

_TENSORS = ("image", "text", "vectors")


@dataclass
class ItemVectors:
    """Vectors of a catalogue's items.

    Attributes:
        item_ids: n ids, unique, in table order.
        image: [n, D] float32, pooled vectors of the image sequences.
        text: [n, D'] float32, pooled vectors of the text sequences.
        vectors: [n, d] float32, what a recommender takes.
        metadata: free strings (model, adapter, settings).
    """

    item_ids: list[str]
    image: np.ndarray
    text: np.ndarray
    vectors: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)

    def rows(self, item_ids: list[str]) -> np.ndarray:
        """Positions [len(item_ids)] int64 of the given items in this table.

        Raises:
            KeyError: an item has no vector.
        """
        index = {name: position for position, name in enumerate(self.item_ids)}
        missing = [name for name in item_ids if name not in index]
        if missing:
            raise KeyError(f"{len(missing)} of {len(item_ids)} items have no vector, the first is {missing[0]!r}")
        return np.array([index[name] for name in item_ids], dtype=np.int64)


def write_item_vectors(path: str | Path, table: ItemVectors) -> None:
    """Write tensors image, text, vectors and item_ids (uint8, UTF-8 joined by newline) atomically.

    Raises:
        ValueError: shapes disagree, an array is not float32 or not finite, ids repeat or hold a newline.
    """
    fault = _fault(table)
    if fault is not None:
        raise ValueError(fault)
    tensors = {name: getattr(table, name) for name in _TENSORS}
    tensors["item_ids"] = np.frombuffer("\n".join(table.item_ids).encode("utf-8"), dtype=np.uint8)
    write_safetensors_atomic(path, tensors, table.metadata)


def read_item_vectors(path: str | Path) -> ItemVectors:
    """Read a table written by `write_item_vectors`.

    Raises:
        DataError: no such file, not safetensors, cut off, or not such a table; the message says which.
    """
    if not Path(path).is_file():
        raise DataError("no such file", path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            missing = {*_TENSORS, "item_ids"} - set(file.keys())
            if missing:
                raise DataError(f"not a table of item vectors: lacks {sorted(missing)}", path)
            arrays = {name: file.get_tensor(name) for name in (*_TENSORS, "item_ids")}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataError(f"not a readable safetensors file ({error})", path) from error
    ids = arrays.pop("item_ids")
    if ids.dtype != np.uint8 or ids.ndim != 1:
        raise DataError(f"item_ids must be a flat uint8 tensor, got {ids.dtype} {list(ids.shape)}", path)
    try:
        names = ids.tobytes().decode("utf-8").split("\n") if ids.size else []
    except UnicodeDecodeError as error:
        raise DataError(f"item_ids is not UTF-8 at byte {error.start}", path) from error
    table = ItemVectors(names, arrays["image"], arrays["text"], arrays["vectors"], metadata)
    fault = _fault(table)
    if fault is not None:
        raise DataError(fault, path)
    return table


def _fault(table: ItemVectors) -> str | None:
    count = len(table.item_ids)
    for name in _TENSORS:
        array = getattr(table, name)
        if array.dtype != np.float32:
            return f"{name} must be float32, got {array.dtype}"
        if array.ndim != 2 or array.shape[0] != count:
            return f"{name} must be [{count}, D] for {count} item ids, got {list(array.shape)}"
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            return f"{name} is not finite in row {row} (item {table.item_ids[row]!r})"
    if len(set(table.item_ids)) != count:
        return f"item ids repeat: {count} rows, {len(set(table.item_ids))} different ids"
    if any("\n" in name or not name for name in table.item_ids):
        return "an item id is empty or holds a newline"
    return None
