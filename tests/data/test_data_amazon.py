"""Small files in the three published forms, written here, and a picture server on this machine."""

import gzip
import io
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from sda_fast.data import DataError, read_interactions, read_items
from sda_fast.data.amazon import convert_amazon, detect_version
from sda_fast.data.download import download_images, file_stem, find_images


def picture(side=16, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, format=form)
    return buffer.getvalue()


class PictureHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        requests = self.server.requests
        requests[self.path] += 1
        name = self.path.rsplit("/", 1)[-1]
        if name.startswith("busy") and requests[self.path] <= 2:
            return self.answer(503, b"", {"Retry-After": "0"})
        if name.startswith("always-busy"):
            return self.answer(503, b"")
        if name.startswith("missing"):
            return self.answer(404, b"gone")
        if name.startswith("page"):
            return self.answer(200, b"<html>not a picture</html>")
        if name.startswith("dot"):
            return self.answer(200, picture(1, "GIF"))
        if name.startswith("moved"):
            return self.answer(302, b"", {"Location": "/ok.jpg"})
        if name.startswith("local"):
            return self.answer(302, b"", {"Location": "file:///etc/hostname"})
        if name.startswith("cut") and requests[self.path] == 1:
            content = picture(64)
            return self.answer(200, content[:50], {"Content-Length": str(len(content))})
        return self.answer(200, picture(form="PNG" if name.endswith("png") else "JPEG"))

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureHandler) as http_server:
        http_server.requests = Counter()
        http_server.url = f"http://127.0.0.1:{http_server.server_address[1]}"
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http_server
        http_server.shutdown()
        thread.join()


def write_lines(path, lines):
    text = "".join(line if line.endswith("\n") else line + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# Five products, four users; P4 is bought once, PX has no metadata.
PURCHASES = [
    ("U1", "P0"),
    ("U1", "P1"),
    ("U1", "P2"),
    ("U2", "P0"),
    ("U2", "P1"),
    ("U2", "P2"),
    ("U3", "P0"),
    ("U3", "P1"),
]
PURCHASES += [("U3", "P2"), ("U4", "P4"), ("U1", "PX"), ("U2", "PX"), ("U3", "PX")]


def reviews_2014(path):
    lines = [
        json.dumps(
            {
                "reviewerID": user,
                "asin": item,
                "reviewerName": "x",
                "helpful": [0, 1],
                "reviewText": "Good.\nReally",
                "overall": 5.0 if number else 1.0,
                "summary": "s",
                "unixReviewTime": 1_300_000_000 + number,
                "reviewTime": "03 13, 2011",
            }
        )
        for number, (user, item) in enumerate(PURCHASES)
    ]
    return write_lines(path, lines)


def metadata_2014(path, url):
    rows = [
        {
            "asin": f"P{n}",
            "title": f'It\'s &amp; "thing" {n}',
            "price": 3.17 + n,
            "imUrl": f"{url}/{'missing' if n == 1 else 'ok'}{n}.jpg",
            "related": {"also_bought": ["X"]},
            "salesRank": {"Toys & Games": 211836},
            "brand": "Coxlures",
            "categories": [["Sports & Outdoors", "Dance"], ["Other"]],
        }
        for n in range(5)
    ]
    del rows[2]["imUrl"], rows[2]["brand"]
    return write_lines(path, [repr(row) for row in rows])


def reviews_2018(path):
    lines = [
        json.dumps(
            {
                "overall": 4.0,
                "verified": True,
                "reviewTime": "01 1, 2018",
                "reviewerID": user,
                "asin": item,
                "style": {"Size:": " Large"},
                "reviewText": "ok",
                "unixReviewTime": 1_500_000_000 + number,
            }
        )
        for number, (user, item) in enumerate(PURCHASES)
    ]
    return write_lines(path, lines)


def metadata_2018(path, url):
    rows = [
        {
            "category": ["Clothing", "Women"],
            "tech1": "",
            "description": ["<b>Soft</b> &lt;br&gt;shirt.", "", "5 < 6 &amp; 7 > 6"],
            "title": f"<style>.a {{}}</style>Shirt {n}<script>var getTime = 1;</script>",
            "also_buy": [],
            "brand": "",
            "feature": ["Cotton<br>", "Washable"],
            "rank": "1 in X",
            "main_cat": "Fashion",
            "price": "$1,024.95" if n else "$1.00 - $2.00",
            "asin": f"P{n}",
            "imageURL": [f"{url}/small{n}.jpg"],
            "imageURLHighRes": [f"{url}/missing{n}.jpg" if n == 0 else f"{url}/high{n}.jpg"],
        }
        for n in range(5)
    ]
    return write_lines(path, [json.dumps(row) for row in [*rows, rows[0]]])


def reviews_2023(path):
    lines = [
        json.dumps(
            {
                "rating": 5.0,
                "title": "t",
                "text": "x",
                "images": [],
                "asin": f"{item}-VARIANT",
                "parent_asin": item,
                "user_id": user,
                "timestamp": 1_588_687_728_923 + number,
                "helpful_vote": 0,
                "verified_purchase": True,
            }
        )
        for number, (user, item) in enumerate(PURCHASES)
    ]
    return write_lines(path, lines)


def metadata_2023(path, url):
    rows = [
        {
            "main_category": "All Beauty",
            "title": f"Lotion {n}",
            "average_rating": 4.8,
            "rating_number": 10,
            "features": ["Mild"],
            "description": [],
            "price": 9.5 if n else None,
            "images": [
                {"thumb": f"{url}/t{n}.png", "large": f"{url}/side{n}.png", "variant": "PT01", "hi_res": None},
                {"thumb": f"{url}/t{n}.png", "large": f"{url}/main{n}.png", "variant": "MAIN", "hi_res": None},
            ],
            "videos": [],
            "store": "Howard",
            "categories": ["Beauty", "Skin"],
            "details": {"Brand": "Real Brand"} if n else {},
            "parent_asin": f"P{n}",
            "bought_together": None,
        }
        for n in range(5)
    ]
    return write_lines(path, [json.dumps(row) for row in rows])


FORMS = {
    "2014": (metadata_2014, "meta_X.json.gz", reviews_2014, "reviews_X.json.gz"),
    "2018": (metadata_2018, "meta_X.json.gz", reviews_2018, "X_5.json.gz"),
    "2023": (metadata_2023, "meta_X.jsonl.gz", reviews_2023, "X.jsonl.gz"),
}


def published(folder, version, url="http://127.0.0.1:9"):
    make_metadata, metadata_name, make_reviews, reviews_name = FORMS[version]
    return make_metadata(folder / metadata_name, url), make_reviews(folder / reviews_name)


@pytest.mark.parametrize("version", FORMS)
def test_each_version_becomes_a_catalogue_and_a_log(tmp_path, server, version):
    metadata, reviews = published(tmp_path, version, server.url)
    assert detect_version(metadata) == version
    result = convert_amazon(metadata, reviews, tmp_path / "out", k=3, retries=0)
    catalogue = read_items(result.items)
    log = read_interactions(result.interactions, catalogue)
    assert catalogue.item_ids == ["P0", "P1", "P2"]
    assert (len(log), sorted(log.user_ids)) == (9, ["U1", "U2", "U3"])
    named = [(log.user_ids[user], log.item_ids[item]) for user, item in zip(log.users, log.items, strict=True)]
    assert named == PURCHASES[:9]
    first = {"2014": 1_300_000_000, "2018": 1_500_000_000, "2023": 1_588_687_728.923}[version]
    step = 0.001 if version == "2023" else 1
    assert np.allclose(log.timestamps, first + step * np.arange(9), rtol=0, atol=1e-5)
    counts = result.counts
    assert counts["reviews"] == 13
    assert counts["reviews_without_metadata"] == 3 and counts["reviews_outside_core"] == 1
    assert (counts["items"], counts["users"], counts["interactions"]) == (3, 3, 9)
    assert counts["metadata_repeated"] == (1 if version == "2018" else 0)
    assert counts["pictures"] == {"2014": 1, "2018": 3, "2023": 3}[version]
    assert catalogue.warnings == ({"missing_image": 2} if version == "2014" else {})


def attributes(tmp_path, version):
    metadata, reviews = published(tmp_path, version)
    return read_items(convert_amazon(metadata, reviews, tmp_path / "out", k=3, images="none").items)


def test_attributes_2014(tmp_path):
    items = attributes(tmp_path, "2014")
    assert items[1].attributes == {
        "title": 'It\'s & "thing" 1',
        "brand": "Coxlures",
        "categories": ["Sports & Outdoors", "Dance"],
        "price": 4.17,
        "features": [],
        "description": None,
    }
    assert items[2].attributes["brand"] is None


def test_halves_of_emoji_are_joined_or_replaced(tmp_path):
    metadata, reviews = published(tmp_path, "2014")
    rows = [f"{{'asin': 'P{n}', 'imUrl': '', 'title': 'a \\ud83d\\ude00 b \\ud83d'}}" for n in range(3)]
    write_lines(metadata, rows)
    items = read_items(convert_amazon(metadata, reviews, tmp_path / "out", k=3, images="none").items)
    assert items[0].attributes["title"] == "a 😀 b \ufffd"


def test_attributes_2018_lose_html_and_code(tmp_path):
    items = attributes(tmp_path, "2018")
    assert items[1].attributes == {
        "title": "Shirt 1",
        "brand": None,
        "categories": ["Clothing", "Women"],
        "price": 1024.95,
        "features": ["Cotton", "Washable"],
        "description": "Soft shirt. 5 < 6 & 7 > 6",
    }
    assert items[0].attributes["price"] is None


def test_attributes_2023(tmp_path):
    items = attributes(tmp_path, "2023")
    assert items[1].attributes == {
        "title": "Lotion 1",
        "brand": "Real Brand",
        "categories": ["Beauty", "Skin"],
        "price": 9.5,
        "features": ["Mild"],
        "description": None,
    }
    assert (items[0].attributes["brand"], items[0].attributes["price"]) == ("Howard", None)


def test_the_main_picture_and_the_large_one_are_asked_for(tmp_path, server):
    convert_amazon(*published(tmp_path, "2023", server.url), tmp_path / "out", k=3)
    assert server.requests == {f"/main{n}.png": 1 for n in range(3)}
    server.requests.clear()
    (tmp_path / "b").mkdir()
    convert_amazon(*published(tmp_path / "b", "2018", server.url), tmp_path / "b" / "out", k=3)
    assert server.requests == {"/missing0.jpg": 1, "/small0.jpg": 1, "/high1.jpg": 1, "/high2.jpg": 1}


@pytest.mark.parametrize(
    "fields", [{"imageURL": "{}/one.jpg"}, {"image": ["{}/one.jpg", "{}/two.jpg"]}], ids=["as sampled", "first release"]
)
def test_the_other_ways_to_write_2018_metadata_are_read(tmp_path, server, fields):
    _, reviews = published(tmp_path, "2018")
    row = {"also_view": [], "title": "x", "categories": [["Sports", "Dance"]]}
    row |= json.loads(json.dumps(fields).replace("{}", server.url))
    metadata = write_lines(tmp_path / "meta.json", [json.dumps(row | {"asin": f"P{n}"}) for n in range(3)])
    result = convert_amazon(metadata, reviews, tmp_path / "out", k=3)
    assert result.counts["pictures"] == 3 and server.requests == {"/one.jpg": 3}
    assert read_items(result.items)[0].attributes["categories"] == ["Sports", "Dance"]


def test_pictures_from_a_folder_are_referred_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "P0.JPG").write_bytes(picture())
    (tmp_path / "mine" / "P2.png").write_bytes(picture(form="PNG"))
    (tmp_path / "mine" / "P1.txt").write_text("no picture")
    result = convert_amazon(*published(tmp_path, "2014"), tmp_path / "out", k=3, images=tmp_path / "mine")
    catalogue = read_items(result.items)
    assert [item.image and item.image.name for item in catalogue] == ["P0.JPG", None, "P2.png"]
    assert catalogue.warnings == {"missing_image": 1}


def test_ratings_and_core_can_be_chosen(tmp_path):
    files = published(tmp_path, "2014")
    result = convert_amazon(*files, tmp_path / "a", k=0, images="none", min_rating=4)
    assert result.counts["reviews_below_min_rating"] == 1
    assert result.counts["interactions"] == 13 - 1 - 3
    with pytest.raises(ValueError, match="nothing is left of 13 reviews after the 9-core"):
        convert_amazon(*files, tmp_path / "b", k=9, images="none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': 'P0', 'imUrl': ", "neither JSON nor a Python literal"),
        ("{'asin': __import__('os').getcwd(), 'imUrl': ''}", "neither JSON nor a Python literal"),
        ("['asin']", "expected an object, got list"),
        ("{'imUrl': 'x'}", "without asin"),
    ],
)
def test_faulty_metadata_is_an_error_with_its_line(tmp_path, line, message):
    metadata, reviews = published(tmp_path, "2014")
    text = gzip.decompress(metadata.read_bytes()).decode()
    write_lines(metadata, [*text.splitlines()[:3], line])
    with pytest.raises(DataError, match=message) as caught:
        convert_amazon(metadata, reviews, tmp_path / "out", k=3, images="none")
    assert (caught.value.path, caught.value.line) == (metadata, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reviewerID": None}, "without reviewerID"),
        ({"unixReviewTime": "?"}, "cannot read unixReviewTime"),
        ({"asin": 3.5}, "must be a string or an integer, got 3.5"),
    ],
)
def test_faulty_reviews_are_errors_with_their_line(tmp_path, change, message):
    metadata, reviews = published(tmp_path, "2014")
    rows = [json.loads(line) for line in gzip.decompress(reviews.read_bytes()).splitlines()]
    rows[4] |= change
    write_lines(reviews, [json.dumps(row) for row in rows])
    with pytest.raises(DataError, match=message) as caught:
        convert_amazon(metadata, reviews, tmp_path / "out", k=3, images="none")
    assert (caught.value.path, caught.value.line) == (reviews, 5)


def test_an_unknown_form_asks_for_the_version(tmp_path):
    metadata = write_lines(tmp_path / "m.json", ['{"asin": "P0", "title": "x"}'])
    with pytest.raises(DataError, match="give version="):
        detect_version(metadata)


def test_downloads_are_retried_checked_and_their_failures_listed(tmp_path, server):
    names = {
        "plain": ["ok.jpg"],
        "busy": ["busy.png"],
        "cut": ["cut.jpg"],
        "moved": ["moved.jpg"],
        "second": ["missing.jpg", "ok2.jpg"],
        "odd/../id": ["ok3.jpg"],
        "gone": ["missing.jpg"],
        "page": ["page.jpg"],
        "dot": ["dot.gif"],
        "local": ["local.jpg"],
        "overloaded": ["always-busy.jpg"],
        "none": [],
    }
    addresses = {item: [f"{server.url}/{name}" for name in paths] for item, paths in names.items()}
    addresses["file"] = ["file:///etc/hostname"]
    addresses["closed"] = ["http://127.0.0.1:1/x.jpg"]
    result = download_images(addresses, tmp_path, retries=2, first_wait=0.01, workers=4)
    assert set(result.images) == {"plain", "busy", "cut", "moved", "second", "odd/../id"}
    assert result.images["busy"] == tmp_path / "busy.png"
    assert result.images["odd/../id"].parent == tmp_path
    assert server.requests["/busy.png"] == 3 and server.requests["/cut.jpg"] == 2
    assert server.requests["/missing.jpg"] == 2 and server.requests["/always-busy.jpg"] == 3
    failures = result.failures
    assert set(failures) == {"gone", "page", "dot", "local", "overloaded", "file", "closed"}
    assert "status 404" in failures["gone"] and "not a picture" in failures["page"]
    assert "1 x 1" in failures["dot"] and "not an http" in failures["file"]
    assert "status 503, after 3 attempts" in failures["overloaded"]
    listed = (tmp_path / "failed.tsv").read_text().splitlines()
    assert len(listed) == 8 and listed[0] == "item_id\treason"
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_fetches_only_what_is_missing(tmp_path, server):
    addresses = {f"I{n}": [f"{server.url}/ok{n}.jpg"] for n in range(6)}
    download_images(dict(list(addresses.items())[:4]), tmp_path)
    (tmp_path / ".I5.jpg.123.tmp").write_bytes(b"left by a killed run")
    server.requests.clear()
    result = download_images(addresses, tmp_path)
    assert set(server.requests) == {"/ok4.jpg", "/ok5.jpg"}
    assert set(result.images) == set(addresses)


def test_names_of_files_are_safe_and_different():
    ids = ["a", "A.b", "..", "x/y", "ü", "a%2Eb", "a.b", "con tab\t"]
    stems = [file_stem(name) for name in ids]
    assert len(set(stems)) == len(ids)
    assert not any(letter in stem for stem in stems for letter in "/\\.\t ")


def test_find_images_matches_whole_names(tmp_path):
    for name in ("P1.jpg", "P10.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images(tmp_path, ["P1", "P10", "P", "notes"])
    assert {item: path.name for item, path in found.items()} == {"P1": "P1.jpg", "P10": "P10.png"}
