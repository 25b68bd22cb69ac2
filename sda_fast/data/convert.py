"""The jobs `convert` (a public data set as published -> items.jsonl, interactions.tsv) and `generate` (synthetic)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sda_fast.arguments import setting
from sda_fast.data.amazon import Version, convert_amazon
from sda_fast.data.movielens import convert_movielens
from sda_fast.data.synthetic import generate_catalogue


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert and how; docs/inputs.md describes the formats."""

    source: Literal["amazon", "movielens"] = field(metadata={"help": "which public data set"})
    output: Path = field(metadata={"help": "folder for items.jsonl, interactions.tsv and, for amazon, images/"})
    metadata: Path = field(
        metadata={
            "help": "amazon: meta_*.json.gz or meta_*.jsonl.gz; movielens: folder with movies.csv and ratings.csv"
        }
    )
    reviews: Path | None = setting(None, "amazon: the reviews file of the same version")
    version: Version | None = setting(None, "amazon: default by the metadata's fields")
    images: Path | None = setting(None, "folder with <item id>.jpg; default: amazon downloads, movielens has none")
    download: bool = setting(True, "amazon: fetch pictures where no folder is given")
    workers: int = setting(8, "amazon: pictures fetched at a time")
    retries: int = setting(4, "amazon: further attempts at a picture whose server is busy or does not answer")
    k: int = setting(5, "users and items with fewer interactions are removed; 0 keeps all")
    min_rating: float | None = setting(None, "leave out interactions with fewer stars")


@dataclass(frozen=True)
class GenerateConfig:
    """Size and seed of a synthetic catalogue (docs/synthetic.md)."""

    output: Path = field(metadata={"help": "folder to write to"})
    num_items: int = setting(600, "number of items")
    num_users: int = setting(1500, "number of users")
    image_side: int = setting(112, "width and height of the pictures in pixels")
    seed: int = setting(0, "everything drawn depends on it")


def convert(config: ConvertConfig) -> Path:
    """Convert and return the path of items.jsonl; interactions.tsv lies beside it.

    Raises:
        ValueError: amazon without reviews, or nothing left after filtering.
        sda_fast.data.DataError: a faulty file, with its line.
    """
    if config.source == "movielens":
        return convert_movielens(
            config.metadata, config.output, posters=config.images, k=config.k, min_rating=config.min_rating
        ).items
    if config.reviews is None:
        raise ValueError("the amazon data needs a reviews file beside the metadata")
    return convert_amazon(
        config.metadata,
        config.reviews,
        config.output,
        version=config.version,
        k=config.k,
        min_rating=config.min_rating,
        images=config.images or ("download" if config.download else "none"),
        workers=config.workers,
        retries=config.retries,
    ).items


def generate(config: GenerateConfig) -> Path:
    """Write a synthetic catalogue and return the path of its items.jsonl.

    Raises:
        ValueError: too few items or users for the simulation.
    """
    return generate_catalogue(
        config.output,
        num_items=config.num_items,
        num_users=config.num_users,
        seed=config.seed,
        image_side=config.image_side,
    ).items
