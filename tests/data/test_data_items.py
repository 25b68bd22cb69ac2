import gzip
import json
import logging
from pathlib import Path

import pytest

from sda_fast.data import WARNING_MEANINGS, Catalogue, DataError, Item, read_items, write_items


def write(folder, *lines, name="items.jsonl"):
    path = folder / name
    raw = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


def item_line(item_id="a", **fields):
    return json.dumps({"item_id": item_id, "title": "A title", "image": None, **fields})


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_items_keep_order_attributes_and_image_paths(tmp_path, name):
    (tmp_path / "pic").mkdir()
    (tmp_path / "pic" / "b.png").write_bytes(b"x")
    path = write(tmp_path, item_line(7, size=[1, {"deep": None}]), item_line("b", image="pic/b.png"), name=name)
    catalogue = read_items(path)
    assert catalogue.item_ids == ["7", "b"]
    assert catalogue.index == {"7": 0, "b": 1}
    assert catalogue[0].attributes == {"title": "A title", "size": [1, {"deep": None}]}
    assert catalogue[0].image is None
    assert catalogue[1].image == tmp_path / "pic" / "b.png"
    assert dict(catalogue.warnings) == {"missing_image": 1}


def test_image_folder_can_be_another(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"x")
    catalogue = read_items(write(tmp_path, item_line(image="a.png")), tmp_path / "elsewhere")
    assert catalogue[0].image == tmp_path / "elsewhere" / "a.png"
    assert not catalogue.warnings


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        ([item_line(), ""], "blank_line"),
        ([item_line(), item_line()], "duplicate_item"),
        ([item_line(title="  ", tags=[], year=None)], "empty_text"),
        (['{"item_id": "a", "title": "x"}'], "missing_image"),
        ([item_line(image="")], "missing_image"),
        ([item_line(image="no/such.jpg")], "image_not_found"),
        ([item_line(image="x" * 5000)], "image_not_found"),
        (['{"item_id": "a", "title": "x", "price": NaN}'], "nan_value"),
        (['{"item_id": "a", "title": "cut \\ud83d"}'], "invalid_unicode"),
    ],
)
def test_faults_with_a_meaning_are_counted_and_logged(tmp_path, caplog, lines, warning):
    with caplog.at_level(logging.WARNING):
        catalogue = read_items(write(tmp_path, *lines))
    assert len(catalogue) == 1
    assert catalogue.warnings[warning] == 1
    assert f"{warning} x 1. {WARNING_MEANINGS[warning]}" in caplog.text


def test_nan_becomes_null_and_half_surrogates_become_the_replacement_character(tmp_path):
    line = '{"item_id": "a", "price": NaN, "x": [-Infinity], "t": "a\\ud83d", "whole": "\\ud83d\\ude00"}'
    attributes = read_items(write(tmp_path, line))[0].attributes
    assert attributes == {"price": None, "x": [None], "t": "a\ufffd", "whole": "😀"}


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ([item_line(), '{"item_id": "b", '], 2, "broken JSON"),
        ([item_line(), "[1]"], 2, "expected a JSON object, got list"),
        ([item_line(), "[" * 100_000], 2, "broken JSON"),
        (['{"title": "x"}'], 1, "item_id is missing"),
        ([item_line(None)], 1, "must be a string or an integer, got null"),
        ([item_line(True)], 1, "must be a string or an integer, got true"),
        ([item_line(1.5)], 1, "must be a string or an integer, got 1.5"),
        ([item_line("")], 1, "item_id is empty"),
        ([item_line("a\nb")], 1, "control character"),
        ([item_line(), item_line(title="Another")], 2, "other content than in line 1"),
        ([item_line(1), item_line("1", title="Another")], 2, "other content than in line 1"),
        ([item_line(image=3)], 1, "image must be a path or null, got 3"),
        ([item_line(image="/etc/passwd")], 1, "must be relative"),
        (['{"item_id": "a", "title": "x", "title": "y"}'], 1, "'title' appears twice"),
        ([item_line(), item_line("b"), b'{"item_id": "c", "title": "caf\xe9"}\n'], 3, "not UTF-8: byte 0xe9"),
        ([], None, "holds no items"),
        ([""], None, "holds no items"),
    ],
)
def test_other_faults_are_errors_with_file_and_line(tmp_path, lines, line, message):
    path = write(tmp_path, *lines)
    with pytest.raises(DataError, match=message) as caught:
        read_items(path)
    assert (caught.value.path, caught.value.line) == (path, line)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_truncated_gzip_names_the_line_where_it_ends(tmp_path):
    lines = [item_line(str(number), title=f"t{number * 7919 % 10007}") for number in range(5000)]
    path = write(tmp_path, *lines, name="items.jsonl.gz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="gzip data ends early") as caught:
        read_items(path)
    assert caught.value.line is not None and 1 < caught.value.line < 5000


@pytest.mark.parametrize("content", [b"", b"item_id", b"\x1f"])
def test_a_gz_name_without_gzip_content_is_an_error(tmp_path, content):
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not gzip"):
        read_items(path)


def test_damaged_gzip_is_an_error(tmp_path):
    path = write(tmp_path, *[item_line(str(number)) for number in range(2000)], name="items.jsonl.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(DataError, match="gzip"):
        read_items(path)


def test_missing_file_and_folder_are_errors(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_items(tmp_path / "items.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_items(tmp_path)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + item_line().encode() + b"\r\n" + item_line("b").encode() + b"\r\n")
    assert read_items(path).item_ids == ["a", "b"]


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_written_items_read_back_equal(tmp_path, name):
    image = tmp_path / "images" / "ü.png"
    image.parent.mkdir()
    image.write_bytes(b"x")
    items = [Item("a", {"title": "naïve ☕", "n": 1}, image), Item("b b", {"title": "t"}, None)]
    write_items(Catalogue(items), tmp_path / "sub" / name)
    back = read_items(tmp_path / "sub" / name)
    assert [item.item_id for item in back] == ["a", "b b"]
    assert [item.attributes for item in back] == [item.attributes for item in items]
    assert back[0].image is not None and back[0].image.resolve() == image.resolve()
    assert back[1].image is None


def test_catalogue_refuses_repeated_ids():
    with pytest.raises(ValueError, match="'a' is not"):
        Catalogue([Item("a", {}), Item("a", {})])


def test_the_documented_table_lists_every_warning():
    text = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")
    for name, meaning in WARNING_MEANINGS.items():
        assert f"| `{name}` | {meaning} |" in text
