"""Sequences as padded batches: windows for training, histories for prediction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BATCHES_PER_BUCKET = 16


def training_windows(offsets: np.ndarray, length: int, overlap: int, rng: np.random.Generator) -> np.ndarray:
    """Cut every user's items into windows of at most `length` items; the cuts of long histories are drawn anew.

    Args:
        offsets: [U + 1] int64; user u owns items offsets[u] ... offsets[u + 1] - 1.
        length: most items of a window.
        overlap: items that neighbouring windows share (1 where the first item of a window is input only).

    Returns:
        [W, 2] int64 first and past-the-last item of every window; users with fewer than 2 items have none.
    """
    starts, ends = offsets[:-1], offsets[1:]
    short = (ends - starts >= 2) & (ends - starts <= length)
    windows = [np.stack([starts[short], ends[short]], axis=1)]
    stride = length - overlap
    for user in np.flatnonzero(ends - starts > length):
        cuts = np.arange(starts[user] + rng.integers(1, stride + 1), ends[user] - overlap, stride)
        edges = np.concatenate([starts[user : user + 1], cuts, ends[user : user + 1] - overlap])
        windows.append(np.stack([edges[:-1], edges[1:] + overlap], axis=1))
    result = np.concatenate(windows)
    return result[result[:, 1] - result[:, 0] >= 2]


def window_batches(windows: np.ndarray, batch_positions: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield [B, 2] groups of windows of similar length whose padded size is about `batch_positions`, in random order.

    At least one window per batch.
    """
    if not len(windows):
        return
    windows = windows[rng.permutation(len(windows))]
    lengths = windows[:, 1] - windows[:, 0]
    bucket = max(1, round(BATCHES_PER_BUCKET * batch_positions / max(1.0, float(lengths.mean()))))
    batches: list[np.ndarray] = []
    for first in range(0, len(windows), bucket):
        part = windows[first : first + bucket]
        part = part[np.argsort(part[:, 1] - part[:, 0], kind="stable")]
        sizes = part[:, 1] - part[:, 0]
        begin = 0
        for index in range(len(part)):
            if sizes[index] * (index + 1 - begin) > batch_positions and index > begin:
                batches.append(part[begin:index])
                begin = index
        batches.append(part[begin:])
    for index in rng.permutation(len(batches)):
        yield batches[index]


def pad_windows(items: np.ndarray, windows: np.ndarray, padding: int) -> np.ndarray:
    """Rows of items[start:end], padded on the left: [B, longest] int64."""
    lengths = windows[:, 1] - windows[:, 0]
    longest = int(lengths.max(initial=1))
    position = windows[:, 1:] - longest + np.arange(longest)
    inside = position >= windows[:, :1]
    return np.where(inside, items[np.where(inside, position, 0)], padding).astype(np.int64)


def pad_histories(
    items: np.ndarray, offsets: np.ndarray, users: np.ndarray, max_length: int, padding: int, last: np.ndarray | None
) -> np.ndarray:
    """The most recent `max_length` items of each user, padded on the left.

    Args:
        items, offsets: training items of all users, flat.
        users: [B] which users.
        last: [B] an item that follows the training items (the validation item), or None.

    Returns:
        [B, at most max_length] int64.
    """
    room = max_length - (last is not None)
    ends = offsets[users + 1]
    rows = pad_windows(items, np.stack([np.maximum(offsets[users], ends - room), ends], axis=1), padding)
    return rows if last is None else np.concatenate([rows, last[:, None].astype(np.int64)], axis=1)
