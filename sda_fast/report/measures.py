"""How well the image and the text vectors of an item agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sda_fast.data.items import Catalogue

MOST_GROUPS = 8


def centred_cosine(image: np.ndarray, text: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """[n, D], [n, D] -> [n, n] cosine of every image with every text after each modality's mean is taken away.

    With `rows`, only of those items, the means still being those of all.

    The mean is taken away because an untuned model puts all images on one side and all texts on another; that common
    offset would hide which image belongs to which text.
    """
    image, text = image - image.mean(0), text - text.mean(0)
    return cosine(image, text) if rows is None else cosine(image[rows], text[rows])


def cosine(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """[n, D], [n, D] -> [n, n] cosine of every image with every text."""
    return _unit_rows(image) @ _unit_rows(text).T


def retrieval_accuracy(similarity: np.ndarray, cutoff: int) -> float:
    """Share of rows whose own column is among the `cutoff` largest; a tie counts as half a place."""
    own = np.diagonal(similarity)[:, None]
    rank = (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2
    return float((rank < cutoff).mean())


def effective_rank(vectors: np.ndarray) -> float:
    """[n, D] -> participation ratio of the variances along the principal axes, from 1 (a line) to min(n - 1, D)."""
    centred = vectors - vectors.mean(0)
    gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    squares = np.square(gram, dtype=np.float64).sum()
    return float(np.trace(gram, dtype=np.float64) ** 2 / squares) if squares else 0.0


def soft_targets(image: np.ndarray, text: np.ndarray, temperature: float) -> np.ndarray:
    """[B, D], [B, D] -> [B, B]: the targets T of CMSA in its published form, rows sum to one (docs/cmsa.md)."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    scores = temperature / 2 * (image @ image.T + text @ text.T)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def grouping_attribute(catalogue: Catalogue) -> str | None:
    """The attribute with 2 to 40 different values that most items share with others; None if there is none."""
    best, best_score = None, 0.0
    for name in sorted({name for item in catalogue for name in item.attributes}):
        labels = [label_of(item.attributes.get(name)) for item in catalogue]
        known = [label for label in labels if label]
        distinct = len(set(known))
        if 2 <= distinct <= min(40, len(known) / 3):
            score = len(known) / len(labels) - abs(distinct - MOST_GROUPS) / 100
            if score > best_score:
                best, best_score = name, score
    return best


def label_of(value: object) -> str:
    """A short label of an attribute's value: strings as they are, of a list the first entry, else nothing."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else ""


def ordered_sample(labels: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Positions of about `count` items: as many from each of the commonest labels, label after label.

    Without labels, `count` random positions in ascending order.
    """
    rng = np.random.default_rng(seed)
    names = np.array(labels)
    known, sizes = np.unique(names[names != ""], return_counts=True) if len(names) else (np.array([]), np.array([]))
    chosen = known[np.argsort(-sizes, kind="stable")][:MOST_GROUPS]
    if not len(chosen):
        return np.sort(rng.permutation(len(names))[:count])
    parts = []
    for position, name in enumerate(sorted(chosen)):
        share = count // len(chosen) + (position < count % len(chosen))
        parts.append(np.sort(rng.permutation(np.flatnonzero(names == name))[:share]))
    return np.concatenate(parts)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
