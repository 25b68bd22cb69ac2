"""The two real sets lie beside the project, not in it; without them these tests are skipped."""

from pathlib import Path

import numpy as np
import pytest

from sda_fast.data import leave_one_out, load_image, read_interactions, read_items

SHARED = Path(__file__).parents[3] / "shared" / "data"


def folder(name):
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"the data set {name} is not beside this checkout (shared/data/{name})")
    return path


def test_movielens_with_posters_is_read_whole():
    path = folder("movielens-small-posters")
    catalogue = read_items(path / "items.jsonl")
    log = read_interactions(path / "interactions.tsv", catalogue)
    split = leave_one_out(log)
    assert len(catalogue) == 3429 and not catalogue.warnings
    assert (len(log), len(log.user_ids)) == (89_635, 671) and not log.warnings
    assert len(split.evaluated_users) == 671 and not split.warnings
    assert len(split.train_items) == 89_635 - 2 * 671
    assert split.sample_negatives().shape == (671, 100)
    for item in catalogue.items[::100]:
        picture, is_noise = load_image(item)
        assert not is_noise and picture.width * picture.height <= 65536


def test_amazon_beauty_text_is_read_whole():
    path = folder("amazon-beauty-text")
    catalogue = read_items(path / "items.jsonl.gz")
    log = read_interactions(path / "interactions.tsv.gz", catalogue)
    split = leave_one_out(log)
    assert len(catalogue) == 12_101 and catalogue.warnings == {"missing_image": 12_101}
    assert (len(log), len(log.user_ids)) == (198_502, 22_363) and not log.warnings
    assert len(split.evaluated_users) == 22_363 and not split.warnings
    # Positions are the timestamps, so the split must follow the file order.
    last = np.flatnonzero(np.append(log.users[1:] != log.users[:-1], True))
    assert np.array_equal(split.test_items[log.users[last]], log.items[last])
    assert split.short_users().mean() == pytest.approx(0.71, abs=0.01)
    assert load_image(catalogue[0])[1]


def test_popularity_on_movielens_is_as_known():
    path = folder("movielens-small-posters")
    split = leave_one_out(read_interactions(path / "interactions.tsv", read_items(path / "items.jsonl")))
    hits = 0
    for user in split.evaluated_users:
        scores = split.item_train_counts.astype(float)
        scores[split.test_history(user)] = -1
        hits += (scores > scores[split.test_items[user]]).sum() < 10
    # Known: .0447 of 671 users, up to how ties of time are broken.
    assert hits / 671 == pytest.approx(0.0447, abs=0.015)
