import numpy as np
import pytest

from sda_fast.data import DataError, read_interactions, read_items
from sda_fast.data.movielens import convert_movielens, split_title

MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Animation
2,"Matrix, The (1999)",Action
10,"Tricky ""quoted"" film, A",(no genres listed)
4,Rare (2000),Drama
"""
RATINGS = ["userId,movieId,rating,timestamp"]
RATINGS += [f"{user},{film},{3.5 + 0.5 * (user % 2)},{100 * user + film}" for user in (1, 2, 3) for film in (1, 2, 10)]
RATINGS += ["1,4,5.0,999", "1,77,5.0,1000"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "movies.csv").write_text(MOVIES)
    (tmp_path / "ratings.csv").write_text("\n".join(RATINGS) + "\n")
    (tmp_path / "posters").mkdir()
    for film in (1, 10):
        (tmp_path / "posters" / f"{film}.jpg").write_bytes(b"x")
    return tmp_path


def test_films_and_ratings_become_a_catalogue_and_a_log(folder):
    result = convert_movielens(folder, folder / "out", posters=folder / "posters", k=2)
    catalogue = read_items(result.items)
    log = read_interactions(result.interactions, catalogue)
    assert [(item.item_id, item.attributes) for item in catalogue] == [
        ("1", {"title": "Toy Story", "year": 1995, "genres": ["Adventure", "Animation"]}),
        ("2", {"title": "The Matrix", "year": 1999, "genres": ["Action"]}),
        ("10", {"title": 'A Tricky "quoted" film', "year": None, "genres": []}),
    ]
    assert catalogue.warnings == {"missing_image": 1}
    assert len(log) == 9 and not log.warnings
    assert np.array_equal(log.timestamps, [101, 102, 110, 201, 202, 210, 301, 302, 310])
    assert result.counts == {
        "ratings": 11,
        "below_min_rating": 0,
        "unknown_film_or_no_poster": 1,
        "outside_core": 1,
        "interactions": 9,
        "items": 3,
        "users": 3,
        "pictures": 2,
    }


def test_posters_and_stars_can_be_required(folder):
    result = convert_movielens(folder, folder / "out", posters=folder / "posters", only_with_poster=True, k=0)
    assert read_items(result.items).item_ids == ["1", "10"]
    result = convert_movielens(folder, folder / "out", k=0, min_rating=4)
    assert result.counts["below_min_rating"] == 3 and result.counts["interactions"] == 7
    with pytest.raises(ValueError, match="nothing is left of 11 ratings"):
        convert_movielens(folder, folder / "out", k=50)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story (1995)", ("Toy Story", 1995)),
        ("Matrix, The (1999)", ("The Matrix", 1999)),
        ("Misérables, Les (1995)", ("Les Misérables", 1995)),
        ("2001: A Space Odyssey (1968) ", ("2001: A Space Odyssey", 1968)),
        ("No year", ("No year", None)),
    ],
)
def test_titles_are_split(title, expected):
    assert split_title(title) == expected


@pytest.mark.parametrize(
    ("movies", "line", "message"),
    [
        ("", None, "is empty"),
        ("movieId,name\n1,x\n", 1, "expected the columns"),
        (MOVIES + "5,too,many,fields\n", 6, "got 4"),
        (MOVIES + "1,Again,Drama\n", 6, "movieId 1 again"),
    ],
)
def test_faults_are_errors_with_file_and_line(folder, movies, line, message):
    (folder / "movies.csv").write_text(movies)
    with pytest.raises(DataError, match=message) as caught:
        convert_movielens(folder, folder / "out")
    assert caught.value.line == line
