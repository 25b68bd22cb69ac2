import gzip

import numpy as np
import pytest

from sda_fast.data import Catalogue, DataError, Item, read_interactions
from sda_fast.data.interactions import Interactions, k_core, write_interactions


def write(folder, text, name="log.tsv"):
    path = folder / name
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


def catalogue(*item_ids):
    return Catalogue([Item(name, {"title": name}) for name in item_ids])


@pytest.mark.parametrize("name", ["log.tsv", "log.csv", "log.tsv.gz"])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_columns_are_found_by_name_in_any_order(tmp_path, name, delimiter):
    rows = [["timestamp", "rating", "item_id", "user_id"], ["5", "4.5", "x", "u"], ["3.5", "1", "y", "v"]]
    path = write(tmp_path, "".join(delimiter.join(row) + "\n" for row in rows), name)
    log = read_interactions(path)
    assert (log.user_ids, log.item_ids) == (["u", "v"], ["x", "y"])
    assert log.users.tolist() == [0, 1] and log.items.tolist() == [0, 1]
    assert log.timestamps.tolist() == [5.0, 3.5]
    assert (log.users.dtype, log.items.dtype, log.timestamps.dtype) == (np.int32, np.int32, np.float64)
    assert not log.warnings


def test_short_and_chosen_column_names(tmp_path):
    assert len(read_interactions(write(tmp_path, "user,item,time\n1,2,3\n"))) == 1
    path = write(tmp_path, "who,what,when\n1,2,3\n")
    log = read_interactions(path, user_column="who", item_column="what", timestamp_column="when")
    assert (log.user_ids, log.item_ids, log.timestamps.tolist()) == (["1"], ["2"], [3.0])


def test_quoted_fields_dates_and_windows_line_ends(tmp_path):
    text = 'user_id,item_id,timestamp\r\n"a, ""b""",x,1970-01-02\r\nc,y,1970-01-01T01:00:00+01:00\r\nd,z,12\r\n'
    log = read_interactions(write(tmp_path, text))
    assert log.user_ids == ['a, "b"', "c", "d"]
    assert log.timestamps.tolist() == [86400.0, 0.0, 12.0]


def test_catalogue_gives_the_positions_and_unknown_items_are_counted(tmp_path):
    path = write(tmp_path, "user_id\titem_id\ttimestamp\nu\tb\t1\nu\tq\t2\nw\tq\t2\nv\ta\t3\n")
    log = read_interactions(path, catalogue("a", "b", "c"))
    assert log.item_ids == ["a", "b", "c"]
    assert log.items.tolist() == [1, 0]
    assert [log.user_ids[user] for user in log.users] == ["u", "v"]
    assert log.user_ids == ["u", "v"]
    assert log.warnings == {"unknown_item": 2}


def test_a_log_of_another_catalogue_is_an_error(tmp_path):
    path = write(tmp_path, "user_id\titem_id\ttimestamp\nu\tb\t1\n")
    with pytest.raises(
        DataError, match="none of the 1 items is in the catalogue of 1; the first here is 'b', there 'a'"
    ):
        read_interactions(path, catalogue("a"))


HEADER = "user_id\titem_id\ttimestamp\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "expected a header"),
        (HEADER, None, "no interactions"),
        ("user_id\titem_id\nu\ti\n", 1, "a column named timestamp or time, the header has"),
        ("1\t2\t3\n", 1, "a column named user_id or user"),
        ("user_id\tuser\titem\ttime\n", 1, "more than one column"),
        (HEADER + "u\ti\t1\nu\ti\n", 3, "expected 3 fields as in the header, got 2"),
        (HEADER + "u\ti\t1\t9\n", 2, "expected 3 fields as in the header, got 4"),
        (HEADER + "u\ti\t1\nu\tj\tyesterday\n", 3, "cannot read the timestamp 'yesterday'"),
        (HEADER + "u\ti\tnan\n", 2, "cannot read the timestamp 'nan'"),
        (HEADER + "u\ti\t\n", 2, "cannot read the timestamp ''"),
        (HEADER + "u\ti\t1\n\ti\t1\n", 3, "the user id is empty"),
        (HEADER + "u\ti\t1\nu\t \t1\n", 3, "the item id is empty"),
        (HEADER.encode() + b"u\ti\t1\n\xff\ti\t2\n", 3, "not UTF-8: byte 0xff"),
        ('user,item,time\n"u,i,1\n', 2, "broken quoting"),
        ('"user,item,time\nu,i,1\n', 1, "broken quoting"),
        ("user,item,time\ru,i,1\r", 1, "a column named timestamp or time"),
        (HEADER + "u\ta\rb\t1\n", 2, "control character"),
    ],
)
def test_faults_are_errors_with_file_and_line(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read_interactions(path)
    assert (caught.value.path, caught.value.line) == (path, line)


def test_truncated_gzip_is_an_error(tmp_path):
    rows = "".join(f"u{number}\ti{number * 7919 % 1009}\t{number}\n" for number in range(5000))
    path = write(tmp_path, HEADER + rows, "log.tsv.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="ends early") as caught:
        read_interactions(path)
    assert caught.value.line is not None and caught.value.line > 1


def test_blank_lines_are_counted(tmp_path):
    log = read_interactions(write(tmp_path, HEADER + "u\ti\t1\n\n\nu\tj\t2\n"))
    assert len(log) == 2
    assert log.warnings == {"blank_line": 2}


@pytest.mark.parametrize("name", ["log.tsv", "log.tsv.gz"])
def test_written_interactions_read_back_equal(tmp_path, name):
    users, items = np.array([0, 0, 1], dtype=np.int32), np.array([1, 0, 1], dtype=np.int32)
    log = Interactions(["u", "v"], ["y", "x"], users, items, np.array([1.5, 1e9, 2.0]))
    write_interactions(log, tmp_path / name)
    back = read_interactions(tmp_path / name, catalogue("y", "x"))
    assert back.user_ids == log.user_ids
    for mine, theirs in ((back.users, users), (back.items, items), (back.timestamps, log.timestamps)):
        assert np.array_equal(mine, theirs)


def random_log(rng, num_rows, num_users, num_items):
    return Interactions(
        [f"u{n}" for n in range(num_users)],
        [f"i{n}" for n in range(num_items)],
        rng.integers(0, num_users, num_rows).astype(np.int32),
        rng.integers(0, num_items, num_rows).astype(np.int32),
        rng.integers(0, 50, num_rows).astype(np.float64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_k_core_equals_repeated_removal(seed):
    log = random_log(np.random.default_rng(seed), 300, 60, 50)
    rows = list(zip(log.users.tolist(), log.items.tolist(), log.timestamps.tolist(), strict=True))
    while True:
        pairs = {(user, item) for user, item, _ in rows}
        bad = [
            row
            for row in rows
            if sum(user == row[0] for user, _ in pairs) < 4 or sum(item == row[1] for _, item in pairs) < 4
        ]
        if not bad:
            break
        rows = [row for row in rows if row not in bad]
    core = k_core(log, 4)
    named = [
        (core.user_ids[user], core.item_ids[item], time)
        for user, item, time in zip(core.users, core.items, core.timestamps, strict=True)
    ]
    assert named == [(f"u{user}", f"i{item}", time) for user, item, time in rows]
    assert len(core.user_ids) == len({user for user, _, _ in rows})


def test_k_core_can_be_empty():
    core = k_core(random_log(np.random.default_rng(0), 20, 20, 20), 10)
    assert len(core) == 0 and core.user_ids == [] and core.item_ids == []
