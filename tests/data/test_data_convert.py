import json

import pytest

from sda_fast.data import read_items
from sda_fast.data.convert import ConvertConfig, GenerateConfig, convert, generate
from sda_fast.data.download import DownloadResult


def amazon_files(folder):
    metadata = [{"parent_asin": f"P{n}", "title": f"t{n}", "images": []} for n in range(3)]
    reviews = [
        {"user_id": f"U{u}", "parent_asin": f"P{n}", "timestamp": 1000 * n, "rating": 5.0}
        for u in range(2)
        for n in range(3)
    ]
    for name, rows in (("meta.jsonl", metadata), ("reviews.jsonl", reviews)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "meta.jsonl", folder / "reviews.jsonl"


def test_convert_amazon_from_a_configuration(tmp_path):
    metadata, reviews = amazon_files(tmp_path)
    config = ConvertConfig("amazon", tmp_path / "out", metadata, reviews=reviews, k=2, download=False)
    assert read_items(convert(config)).item_ids == ["P0", "P1", "P2"]
    assert (tmp_path / "out" / "interactions.tsv").read_text().count("\n") == 7


def test_the_downloads_settings_reach_the_download(tmp_path, monkeypatch):
    metadata, reviews = amazon_files(tmp_path)
    seen = {}
    nothing = DownloadResult()
    monkeypatch.setattr("sda_fast.data.amazon.download_images", lambda *_, **options: seen.update(options) or nothing)
    convert(ConvertConfig("amazon", tmp_path / "out", metadata, reviews=reviews, k=2, workers=3, retries=9))
    assert seen == {"workers": 3, "retries": 9}


def test_amazon_needs_reviews(tmp_path):
    with pytest.raises(ValueError, match="needs a reviews file"):
        convert(ConvertConfig("amazon", tmp_path / "out", tmp_path / "meta.jsonl"))


def test_convert_movielens_from_a_configuration(tmp_path):
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,A (2000),Drama\n2,B (2001),Drama\n")
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,1\n1,2,4,2\n2,1,3,3\n2,2,3,4\n")
    (tmp_path / "posters").mkdir()
    (tmp_path / "posters" / "2.jpg").write_bytes(b"x")
    config = ConvertConfig("movielens", tmp_path / "out", tmp_path, images=tmp_path / "posters", k=2)
    catalogue = read_items(convert(config))
    assert [item.image is not None for item in catalogue] == [False, True]


def test_generate_from_a_configuration(tmp_path):
    items = generate(GenerateConfig(tmp_path / "out", num_items=60, num_users=5, image_side=32))
    assert len(read_items(items)) == 60
