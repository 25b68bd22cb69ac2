import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sda_fast.data import (
    DataError,
    ItemVectors,
    atomic_write,
    read_item_vectors,
    write_bytes_atomic,
    write_item_vectors,
    write_json_atomic,
    write_safetensors_atomic,
    write_text_atomic,
)


def table(count=5, ids=None):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((count, width)).astype(np.float32) for width in (7, 6, 4)]
    return ItemVectors([f"ü{n}" for n in range(count)] if ids is None else ids, *arrays, {"model": "tiny"})


@pytest.mark.parametrize("count", [0, 1, 17])
def test_table_reads_back_equal(tmp_path, count):
    written = table(count)
    write_item_vectors(tmp_path / "sub" / "v.safetensors", written)
    back = read_item_vectors(tmp_path / "sub" / "v.safetensors")
    assert back.item_ids == written.item_ids and back.metadata == {"model": "tiny"}
    for name in ("image", "text", "vectors"):
        assert np.array_equal(getattr(back, name), getattr(written, name))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["v.safetensors"]


def test_views_that_are_not_contiguous_are_written_right(tmp_path):
    written = table(6)
    written.image = np.arange(84, dtype=np.float32).reshape(14, 6).T[:, ::2]
    write_item_vectors(tmp_path / "v.safetensors", written)
    assert np.array_equal(read_item_vectors(tmp_path / "v.safetensors").image, written.image)


def test_rows_finds_items_by_id():
    assert table().rows(["ü3", "ü0"]).tolist() == [3, 0]
    with pytest.raises(KeyError, match="1 of 2 items have no vector, the first is 'x'"):
        table().rows(["ü3", "x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "image", t.image.astype(np.float64)), "image must be float32, got float64"),
        (lambda t: setattr(t, "text", t.text[:3]), r"text must be \[5, D\] for 5 item ids, got \[3, 6\]"),
        (lambda t: setattr(t, "vectors", t.vectors[0]), r"got \[4\]"),
        (lambda t: t.image.__setitem__((2, 1), np.nan), "image is not finite in row 2"),
        (lambda t: t.item_ids.__setitem__(1, "ü0"), "5 rows, 4 different ids"),
        (lambda t: t.item_ids.__setitem__(1, "a\nb"), "newline"),
    ],
)
def test_a_wrong_table_is_not_written(tmp_path, change, message):
    wrong = table()
    change(wrong)
    with pytest.raises(ValueError, match=message):
        write_item_vectors(tmp_path / "v.safetensors", wrong)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_an_error_with_its_path(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(DataError, match="no such file"):
        read_item_vectors(path)
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a readable safetensors file"):
            read_item_vectors(path)
    write_item_vectors(path, table())
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        read_item_vectors(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({**tensors, "image": tensors["image"][:2]}, path)
    with pytest.raises(DataError, match=r"image must be \[5, D\]"):
        read_item_vectors(path)
    save_file({**tensors, "item_ids": np.frombuffer(b"\xff\xfe", dtype=np.uint8)}, path)
    with pytest.raises(DataError, match="item_ids is not UTF-8"):
        read_item_vectors(path)
    save_file({name: tensors[name] for name in ("image", "vectors")}, path)
    with pytest.raises(DataError, match=r"lacks \['item_ids', 'text'\]"):
        read_item_vectors(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new, half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_killed_write_leaves_the_old_file(tmp_path, durable):
    write_text_atomic(tmp_path / "a.txt", "old")
    code = (
        "import os, signal, sys; from sda_fast.data import atomic_write\n"
        f"with atomic_write(sys.argv[1], durable={durable}) as t:\n"
        "    t.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert (tmp_path / "a.txt").read_text() == "old"


def test_atomic_writers_write_what_they_are_given(tmp_path):
    write_bytes_atomic(tmp_path / "b", b"\x00\xff")
    write_text_atomic(tmp_path / "t", "ü\r\n")
    write_json_atomic(tmp_path / "j", {"ü": [1, None]})
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t").read_bytes() == "ü\r\n".encode()
    assert (tmp_path / "j").read_text(encoding="utf-8") == '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "j", float("nan"))
    for kind in (torch.arange(6.0).reshape(2, 3).T, np.arange(6.0).reshape(2, 3).T):
        write_safetensors_atomic(tmp_path / "s", {"x": kind}, {"a": "b"})
        assert np.array_equal(load_file(tmp_path / "s")["x"], np.asarray(kind))


def test_new_files_have_the_usual_permissions(tmp_path):
    write_text_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode
