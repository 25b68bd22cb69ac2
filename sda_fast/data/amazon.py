"""Converter for the public Amazon review data of 2014, 2018 and 2023: metadata and reviews as published.

Sources: jmcauley.ucsd.edu/data/amazon (2014), nijianmo.github.io/amazon (2018), amazon-reviews-2023.github.io (2023).
"""

from __future__ import annotations

import ast
import html
import json
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from sda_fast.data.download import download_images, find_images
from sda_fast.data.errors import DataError
from sda_fast.data.interactions import Interactions, k_core, select_rows, write_interactions
from sda_fast.data.items import Catalogue, Item, check_id, write_items
from sda_fast.data.lines import read_lines

logger = logging.getLogger(__name__)

Version = Literal["2014", "2018", "2023"]
_TELLING_FIELDS: dict[Version, frozenset[str]] = {
    "2023": frozenset({"parent_asin"}),
    "2018": frozenset({"category", "imageURL", "imageURLHighRes", "also_buy", "also_view", "main_cat", "tech1"}),
    "2014": frozenset({"imUrl", "categories", "salesRank", "related"}),
}
_ITEM_FIELD: dict[Version, str] = {"2014": "asin", "2018": "asin", "2023": "parent_asin"}
_REVIEW_FIELDS: dict[Version, tuple[str, str, str, str, float]] = {
    "2014": ("reviewerID", "asin", "unixReviewTime", "overall", 1.0),
    "2018": ("reviewerID", "asin", "unixReviewTime", "overall", 1.0),
    "2023": ("user_id", "parent_asin", "timestamp", "rating", 1000.0),
}
_CODE = re.compile(r"<(script|style)\b.*?(</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")
_PRICE = re.compile(r"\$?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*")


@dataclass(frozen=True)
class ConvertedData:
    """Files written by a converter, and what happened to the rows.

    Attributes:
        items: items.jsonl; its image paths are relative to its folder.
        interactions: interactions.tsv.
        counts: rows read and left out by reason, items, users, pictures found and failed.
    """

    items: Path
    interactions: Path
    counts: dict[str, int]


def convert_amazon(
    metadata: str | Path,
    reviews: str | Path,
    output: str | Path,
    *,
    version: Version | None = None,
    k: int = 5,
    min_rating: float | None = None,
    images: Literal["download", "none"] | Path = "download",
    workers: int = 8,
    retries: int = 4,
) -> ConvertedData:
    """Turn one category of the Amazon review data into items.jsonl, interactions.tsv and pictures.

    Items are products with metadata; in the 2023 data the parent product stands for its variants. A review is an
    interaction. Reviews of products without metadata are left out, then the k-core is taken; both are counted. Text
    loses its HTML. Run it again after an interruption: pictures already there are not fetched again.

    Args:
        metadata: meta_*.json.gz (2014, lines of Python literals; 2018, JSON) or meta_*.jsonl.gz (2023).
        reviews: reviews_*.json.gz, *_5.json.gz or *.jsonl.gz of the same version.
        output: folder for items.jsonl, interactions.tsv and images/.
        version: which of the three; default by the fields of the metadata.
        k: users and items with fewer interactions are removed until none is left; 0 keeps all.
        min_rating: reviews with fewer stars are left out; default none.
        images: "download", "none", or a folder that holds <item id>.jpg (or .png, .gif, .webp); not copied.
        workers, retries: of the download.

    Raises:
        DataError: with file and line; an unreadable line, a review without user, product or time.
        ValueError: nothing is left after filtering.
    """
    output = Path(output)
    if version is None:
        version = detect_version(metadata)
    interactions, counts = _read_reviews(Path(reviews), version, min_rating)
    enough = np.bincount(interactions.items, minlength=len(interactions.item_ids)) >= k
    wanted = {name for name, keep in zip(interactions.item_ids, enough, strict=True) if keep}
    rows = _read_metadata(Path(metadata), version, wanted, counts)
    described = np.array([name in rows for name in interactions.item_ids], dtype=bool)
    counts["reviews_without_metadata"] = int((enough & ~described)[interactions.items].sum())
    keep = described[interactions.items]
    interactions = k_core(select_rows(interactions, keep), k)
    counts["reviews_outside_core"] = counts["reviews"] - counts["reviews_without_metadata"] - len(interactions)
    counts["reviews_outside_core"] -= counts["reviews_below_min_rating"]
    if not len(interactions):
        raise ValueError(f"nothing is left of {counts['reviews']} reviews after the {k}-core; {dict(counts)}")
    item_ids = sorted(interactions.item_ids)
    pictures = _pictures({name: _addresses(rows[name], version) for name in item_ids}, images, output, workers, retries)
    counts["pictures"] = len(pictures)
    catalogue = Catalogue([Item(name, _attributes(rows[name], version), pictures.get(name)) for name in item_ids])
    counts["items"], counts["users"] = len(catalogue), len(interactions.user_ids)
    counts["interactions"] = len(interactions)
    write_items(catalogue, output / "items.jsonl")
    write_interactions(interactions, output / "interactions.tsv")
    logger.info("Amazon %s: %s", version, dict(counts))
    return ConvertedData(output / "items.jsonl", output / "interactions.tsv", dict(counts))


def detect_version(metadata: str | Path) -> Version:
    """The version whose telling fields the first metadata row with any has.

    Raises:
        DataError: no row has any of them.
    """
    for _, row in _read_rows(Path(metadata)):
        for version, fields in _TELLING_FIELDS.items():
            if fields & row.keys():
                return version
    raise DataError("cannot tell the version of this metadata: give version=", metadata)


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line_number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            try:
                row = ast.literal_eval(line.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise DataError(f"neither JSON nor a Python literal ({error})", path, line_number) from error
        if not isinstance(row, dict):
            raise DataError(f"expected an object, got {type(row).__name__}", path, line_number)
        yield line_number, row


def _read_reviews(path: Path, version: Version, min_rating: float | None) -> tuple[Interactions, Counter[str]]:
    user_field, item_field, time_field, rating_field, per_second = _REVIEW_FIELDS[version]
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    # Arrays of plain numbers: the largest categories have tens of millions of reviews.
    user_column, item_column, time_column = array("i"), array("i"), array("d")
    counts: Counter[str] = Counter(reviews=0, reviews_below_min_rating=0)
    for line_number, row in tqdm(_read_rows(path), desc="reviews", unit="row"):
        counts["reviews"] += 1
        missing = [name for name in (user_field, item_field, time_field) if row.get(name) in (None, "")]
        if missing:
            raise DataError(f"a review of the {version} data without {', '.join(missing)}", path, line_number)
        try:
            time = float(row[time_field]) / per_second
            low = min_rating is not None and float(row[rating_field]) < min_rating
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"cannot read {time_field} or {rating_field} ({error!r})", path, line_number) from error
        if low:
            counts["reviews_below_min_rating"] += 1
            continue
        user = check_id(row[user_field], user_field, path, line_number)
        item = check_id(row[item_field], item_field, path, line_number)
        user_column.append(users.setdefault(user, len(users)))
        item_column.append(items.setdefault(item, len(items)))
        time_column.append(time)
    interactions = Interactions(
        list(users),
        list(items),
        np.array(user_column, dtype=np.int32),
        np.array(item_column, dtype=np.int32),
        np.array(time_column, dtype=np.float64),
    )
    return interactions, counts


def _read_metadata(path: Path, version: Version, wanted: set[str], counts: Counter[str]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    counts.update(metadata_rows=0, metadata_repeated=0)
    for line_number, row in tqdm(_read_rows(path), desc="metadata", unit="row"):
        counts["metadata_rows"] += 1
        if row.get(_ITEM_FIELD[version]) in (None, ""):
            raise DataError(f"metadata of the {version} data without {_ITEM_FIELD[version]}", path, line_number)
        item_id = check_id(row[_ITEM_FIELD[version]], _ITEM_FIELD[version], path, line_number)
        if item_id in rows:
            counts["metadata_repeated"] += 1
        elif item_id in wanted:
            rows[item_id] = row
    return rows


def _attributes(row: dict[str, Any], version: Version) -> dict[str, object]:
    if version == "2014":
        brand, categories, features = row.get("brand"), _first_path(row), None
    elif version == "2018":
        brand, categories, features = row.get("brand"), row.get("category") or _first_path(row), row.get("feature")
    else:
        details = row.get("details")
        named = details.get("Brand") if isinstance(details, dict) else None
        brand, categories, features = named or row.get("store"), row.get("categories"), row.get("features")
    return {
        "title": _clean(row.get("title")),
        "brand": _clean(brand),
        "categories": _clean_list(categories),
        "price": _price(row.get("price")),
        "features": _clean_list(features),
        "description": " ".join(_clean_list(row.get("description"))) or None,
    }


def _first_path(row: dict[str, Any]) -> object:
    paths = row.get("categories") or []
    return paths[0] if isinstance(paths, list) and paths else []


def _addresses(row: dict[str, Any], version: Version) -> list[str]:
    if version == "2014":
        urls = [row.get("imUrl")]
    elif version == "2018":
        # Lists in the files, single addresses in the page's own sample, `image` in the first release.
        found = [row.get(name) or [None] for name in ("imageURLHighRes", "imageURL", "image")]
        urls = [one if isinstance(one, str) else one[0] for one in found]
    else:
        pictures = [picture for picture in row.get("images") or [] if isinstance(picture, dict)]
        pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")
        urls = [pictures[0].get(name) for name in ("large", "hi_res", "thumb")] if pictures else []
    return [url for url in urls if isinstance(url, str) and url]


def _pictures(
    addresses: dict[str, list[str]], images: str | Path, output: Path, workers: int, retries: int
) -> dict[str, Path]:
    if images == "none":
        return {}
    if images == "download":
        return download_images(addresses, output / "images", workers=workers, retries=retries).images
    return find_images(images, list(addresses))


def _clean(value: object) -> str | None:
    if value is None:
        return None
    # Python literals write one emoji as two halves; single halves, which UTF-8 cannot hold, become U+FFFD.
    whole = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = html.unescape(_TAG.sub(" ", _CODE.sub(" ", html.unescape(whole))))
    return " ".join(text.split()) or None


def _clean_list(value: object) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in map(_clean, values) if text is not None]


def _price(value: object) -> float | None:
    match = _PRICE.fullmatch(str(value))
    return None if match is None else float(match[1].replace(",", "") + (match[2] or ""))
