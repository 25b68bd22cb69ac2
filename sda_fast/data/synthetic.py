"""A catalogue with a known right answer: items drawn and described, users simulated (docs/synthetic.md).

It is synthetic. It shows that the pieces work together and what can be gained; it says nothing about real shops.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sda_fast.atomic import atomic_write, write_safetensors_atomic, write_text_atomic
from sda_fast.data.items import Catalogue, Item, read_items, write_items
from sda_fast.data.synthetic_model import FACTORS, SHOWN_IN, SyntheticTruth, TasteModel, factor_vectors, simulate
from sda_fast.data.synthetic_pictures import contact_sheet, draw_item
from sda_fast.data.synthetic_texts import write_attributes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntheticPaths:
    """Where `generate_catalogue` wrote what.

    Attributes:
        items: items.jsonl.
        images: folder of PNG pictures; image paths in items.jsonl are relative to the folder of `items`.
        interactions: interactions.tsv with user_id, item_id, timestamp.
        truth: truth.safetensors, an item-vector table (`read_item_vectors`) of the hidden factors.
    """

    items: Path
    images: Path
    interactions: Path
    truth: Path

    @classmethod
    def in_folder(cls, folder: str | Path) -> SyntheticPaths:
        """The paths that `generate_catalogue(folder)` writes to."""
        folder = Path(folder)
        return cls(folder / "items.jsonl", folder / "images", folder / "interactions.tsv", folder / "truth.safetensors")


def generate_catalogue(
    folder: str | Path,
    *,
    num_items: int = 600,
    num_users: int = 1500,
    seed: int = 0,
    image_side: int = 112,
    model: TasteModel | None = None,
) -> SyntheticPaths:
    """Write a synthetic catalogue, its pictures, simulated interactions and the hidden truth.

    The same arguments give the same files (pictures to the pixel for one version of Pillow). The model is in
    `sda_fast.data.synthetic_model` and docs/synthetic.md. truth.safetensors holds, in catalogue order, `image` (codes
    of hue, pattern, category, tone), `text` (material, occasion, category, tone), `vectors` (all six), and beside them
    `factors` int64 [n, 6], `popularity` float64 [n] and `final_utility` float32 [users, n]: the simulation's own scores
    for every user's last interaction, the best that any recommender could rank by.

    Args:
        folder: made where missing; files in it are replaced.
        image_side: width and height of the pictures in pixels.
        model: constants of the simulation.

    Raises:
        ValueError: too few items or users for the simulation.
    """
    folder = Path(folder)
    truth = simulate(num_items, num_users, seed, model)
    paths = SyntheticPaths.in_folder(folder)
    items = []
    for position in range(num_items):
        item_id = f"I{position:05d}"
        factors = {name: int(values[position]) for name, values in truth.factors.items()}
        image = paths.images / f"{item_id}.png"
        with atomic_write(image, durable=False) as temporary:
            draw_item(factors, np.random.default_rng([seed, 20, position]), image_side).save(temporary, format="PNG")
        items.append(Item(item_id, write_attributes(factors, np.random.default_rng([seed, 30, position])), image))
    catalogue = Catalogue(items)
    write_items(catalogue, paths.items)
    _write_interactions(truth, catalogue.item_ids, paths.interactions)
    _write_truth(truth, catalogue.item_ids, paths.truth, seed)
    logger.info("synthetic catalogue: %d items, %d interactions in %s", num_items, len(truth.users), folder)
    return paths


def write_contact_sheet(items: str | Path, path: str | Path, *, num_items: int = 12, seed: int = 0) -> Path:
    """Draw a random sample of a catalogue's items, pictures with title and description, into one PNG.

    Args:
        items: items.jsonl of `generate_catalogue`; items without a picture are passed over.
        path: the PNG to write.
    """
    catalogue = read_items(items)
    shown = [item for item in catalogue if item.image is not None and item.image.is_file()]
    sample = np.sort(np.random.default_rng(seed).permutation(len(shown))[:num_items])
    pictures = []
    for position in sample:
        item = shown[position]
        text = ". ".join(str(item.attributes[name]) for name in ("title", "description") if item.attributes.get(name))
        pictures.append((Path(item.image or ""), text))
    contact_sheet(pictures, Path(path))
    return Path(path)


def _write_interactions(truth: SyntheticTruth, item_ids: list[str], path: Path) -> None:
    rows = [
        f"U{user:05d}\t{item_ids[item]}\t{timestamp}\n"
        for user, item, timestamp in zip(truth.users, truth.items, truth.timestamps, strict=True)
    ]
    write_text_atomic(path, "user_id\titem_id\ttimestamp\n" + "".join(rows))


def _write_truth(truth: SyntheticTruth, item_ids: list[str], path: Path, seed: int) -> None:
    tensors = {
        "image": factor_vectors(truth.factors, SHOWN_IN["image"] + SHOWN_IN["both"]),
        "text": factor_vectors(truth.factors, SHOWN_IN["text"] + SHOWN_IN["both"]),
        "vectors": factor_vectors(truth.factors, tuple(FACTORS)),
        "item_ids": np.frombuffer("\n".join(item_ids).encode("utf-8"), dtype=np.uint8),
        "factors": np.stack([truth.factors[name] for name in FACTORS], axis=1),
        "popularity": truth.popularity,
        "final_utility": truth.final_utility,
    }
    metadata = {"kind": "true factors of a synthetic catalogue", "seed": str(seed), "factors": " ".join(FACTORS)}
    write_safetensors_atomic(path, tensors, metadata)
