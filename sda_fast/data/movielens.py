"""Converter for MovieLens in its CSV form (ml-latest-small, ml-latest, ml-25m, ml-32m) with a folder of posters."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from sda_fast.data.amazon import ConvertedData
from sda_fast.data.download import find_images
from sda_fast.data.errors import DataError
from sda_fast.data.interactions import k_core, read_interactions, select_rows, write_interactions
from sda_fast.data.items import Catalogue, Item, write_items
from sda_fast.data.lines import read_lines, split_fields

logger = logging.getLogger(__name__)

_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_ARTICLE = re.compile(r"^(.*), (The|A|An|Les|La|Le|Das|Der|Die|El|Il)$")


def convert_movielens(
    folder: str | Path,
    output: str | Path,
    *,
    posters: str | Path | None = None,
    only_with_poster: bool = False,
    k: int = 5,
    min_rating: float | None = None,
) -> ConvertedData:
    """Turn movies.csv and ratings.csv into items.jsonl (title, year, genres, image) and interactions.tsv.

    Args:
        folder: holds movies.csv and ratings.csv.
        output: folder to write to.
        posters: folder with <movieId>.jpg (or .png, .gif, .webp); the pictures are referred to, not copied.
        only_with_poster: leave out films without a poster, before the k-core.
        k: users and films with fewer ratings are removed until none is left; 0 keeps all.
        min_rating: ratings below are left out; default none.

    Raises:
        DataError: a file is missing or faulty, with its line.
        ValueError: nothing is left after filtering.
    """
    folder, output = Path(folder), Path(output)
    films = _read_films(folder / "movies.csv")
    ratings = read_interactions(folder / "ratings.csv", user_column="userId", item_column="movieId")
    counts = {"ratings": len(ratings)}
    if min_rating is not None:
        ratings = select_rows(ratings, _read_stars(folder / "ratings.csv") >= min_rating)
    pictures = {} if posters is None else find_images(posters, list(films))
    usable = np.array(
        [name in films and (not only_with_poster or name in pictures) for name in ratings.item_ids], dtype=bool
    )
    counts["below_min_rating"] = counts["ratings"] - len(ratings)
    kept = usable[ratings.items]
    counts["unknown_film_or_no_poster"] = int((~kept).sum())
    counts["outside_core"] = int(kept.sum())
    ratings = k_core(select_rows(ratings, kept), k)
    counts["outside_core"] -= len(ratings)
    if not len(ratings):
        raise ValueError(f"nothing is left of {counts['ratings']} ratings after the {k}-core")
    item_ids = sorted(ratings.item_ids, key=lambda name: (len(name), name))
    catalogue = Catalogue([Item(name, films[name], pictures.get(name)) for name in item_ids])
    write_items(catalogue, output / "items.jsonl")
    write_interactions(ratings, output / "interactions.tsv")
    counts |= {"interactions": len(ratings), "items": len(item_ids), "users": len(ratings.user_ids)}
    counts["pictures"] = sum(item.image is not None for item in catalogue)
    logger.info("MovieLens: %s", counts)
    return ConvertedData(output / "items.jsonl", output / "interactions.tsv", counts)


def split_title(title: str) -> tuple[str, int | None]:
    """'Matrix, The (1999)' -> ('The Matrix', 1999)."""
    year = _YEAR.search(title)
    name = _YEAR.sub("", title)
    article = _ARTICLE.match(name)
    return (f"{article[2]} {article[1]}" if article else name), (int(year[1]) if year else None)


def _read_films(path: Path) -> dict[str, dict[str, object]]:
    films: dict[str, dict[str, object]] = {}
    for line_number, row in _read_csv(path, ("movieId", "title", "genres")):
        if row["movieId"] in films:
            raise DataError(f"movieId {row['movieId']} again", path, line_number)
        title, year = split_title(row["title"])
        genres = [] if row["genres"] == "(no genres listed)" else row["genres"].split("|")
        films[row["movieId"]] = {"title": title, "year": year, "genres": genres}
    return films


def _read_stars(path: Path) -> np.ndarray:
    stars = []
    for line_number, row in _read_csv(path, ("rating",)):
        try:
            stars.append(float(row["rating"]))
        except ValueError as error:
            raise DataError(f"cannot read the rating {row['rating']!r}", path, line_number) from error
    return np.array(stars)


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    lines = [(number, line) for number, line in read_lines(path) if line.strip()]
    if not lines:
        raise DataError("is empty", path)
    header = split_fields(lines[0][1], ",", path, lines[0][0])
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(f"expected the columns {list(columns)}, the header has {header}", path, 1)
    rows = []
    for number, line in lines[1:]:
        fields = split_fields(line, ",", path, number)
        if len(fields) != len(header):
            raise DataError(f"expected {len(header)} fields as in the header, got {len(fields)}", path, number)
        rows.append((number, dict(zip(header, fields, strict=True))))
    return rows
