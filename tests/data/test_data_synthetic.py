"""What the generated data must be able to show, measured by a recommender that only counts attribute values."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sda_fast.data import leave_one_out, load_image, read_interactions, read_item_vectors, read_items
from sda_fast.data.interactions import Interactions
from sda_fast.data.synthetic import generate_catalogue, write_contact_sheet
from sda_fast.data.synthetic_model import FACTORS, SEQUENCE_FACTORS, SHOWN_IN, TasteModel, simulate, successor
from sda_fast.data.synthetic_texts import CATEGORY_WORDS, MATERIAL_WORDS, OCCASION_WORDS, TONE_WORDS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return generate_catalogue(folder, num_items=80, num_users=60, seed=1)


def truth_factors(paths):
    codes = load_file(paths.truth)["factors"]
    return {name: codes[:, column] for column, name in enumerate(FACTORS)}


def file_digests(paths):
    files = [paths.items, paths.interactions, *sorted(paths.images.iterdir())]
    contents = [file.read_bytes() for file in files] + [tensor.tobytes() for tensor in load_file(paths.truth).values()]
    return [hashlib.sha256(content).hexdigest() for content in contents]


def test_the_same_seed_gives_the_same_files(small, tmp_path):
    again = generate_catalogue(tmp_path / "again", num_items=80, num_users=60, seed=1)
    other = generate_catalogue(tmp_path / "other", num_items=80, num_users=60, seed=2)
    assert file_digests(small) == file_digests(again)
    assert len(set(file_digests(small)) & set(file_digests(other))) == 1, "only the item ids are the same"


def test_its_files_are_read_without_an_unexpected_warning(small):
    catalogue = read_items(small.items)
    log = read_interactions(small.interactions, catalogue)
    truth = read_item_vectors(small.truth)
    assert len(catalogue) == 80 and not catalogue.warnings
    assert len(log.user_ids) == 60 and not log.warnings
    assert truth.item_ids == catalogue.item_ids
    assert truth.vectors.shape == (80, sum(FACTORS.values()))
    split = leave_one_out(log)
    assert len(split.evaluated_users) == 60 and not split.warnings
    pictures = [load_image(item) for item in catalogue]
    assert all(not is_noise and picture.size == (112, 112) for picture, is_noise in pictures)


def test_some_timestamps_tie(small):
    log = read_interactions(small.interactions)
    same_user = log.users[1:] == log.users[:-1]
    ties = (log.timestamps[1:] == log.timestamps[:-1]) & same_user
    assert 0.05 < ties.sum() / same_user.sum() < 0.3
    assert (np.diff(log.timestamps)[same_user] >= 0).all()


def test_texts_never_tell_what_only_the_picture_shows(small):
    text = small.items.read_text(encoding="utf-8").lower()
    for word in ("red", "orange", "yellow", "green", "teal", "blue", "violet", "pink", "stripe", "dotted", "zigzag"):
        assert f" {word}" not in text and f'"{word}' not in text


def test_texts_tell_material_occasion_category_and_tone(small):
    factors = truth_factors(small)
    words = {
        "category": CATEGORY_WORDS,
        "tone": TONE_WORDS,
        "material": MATERIAL_WORDS,
        "occasion": OCCASION_WORDS,
    }
    for position, item in enumerate(read_items(small.items)):
        text = json.dumps(item.attributes)
        for name, values in words.items():
            assert any(word in text for word in values[factors[name][position]]), (item.item_id, name)


def shape_features(item):
    with Image.open(item.image) as image:
        pixels = np.asarray(image.convert("RGB").resize((28, 28)), dtype=np.float64) / 255
    return pixels


def test_pictures_tell_hue_and_tone(small):
    catalogue, factors = read_items(small.items), truth_factors(small)
    features = []
    for item in catalogue:
        pixels = shape_features(item).reshape(-1, 3)
        strength = pixels.max(axis=1) - pixels.min(axis=1)
        colourful = pixels[strength >= np.quantile(strength, 0.9)]
        features.append(colourful.mean(axis=0))
    features = np.array(features)
    distances = ((features[:, None] - features[None]) ** 2).sum(-1) + 10 * np.eye(len(features))
    nearest = distances.argmin(axis=1)
    assert (factors["hue"][nearest] == factors["hue"]).mean() > 0.6
    assert (factors["tone"][nearest] == factors["tone"]).mean() > 0.6


def test_pictures_do_not_tell_what_only_the_text_says():
    small_model = simulate(600, 10, 0)
    table = Counter(zip(small_model.factors["material"].tolist(), small_model.factors["hue"].tolist(), strict=True))
    counts = np.array([table[a, b] for a in range(8) for b in range(8)])
    # Independent factors: chi-squared with 49 degrees of freedom, deviation 9.9.
    assert ((counts - 600 / 64) ** 2 / (600 / 64)).sum() < 49 + 4 * 9.9


def test_contact_sheet_is_one_picture(small, tmp_path):
    path = write_contact_sheet(small.items, tmp_path / "sheet.png", num_items=7)
    with Image.open(path) as sheet:
        assert sheet.size == (6 * 170 + 10, 2 * 254 + 10)
        assert np.asarray(sheet).std() > 10


def test_too_small_simulations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 60 items and 1 user, got 20 items"):
        generate_catalogue(tmp_path, num_items=20)


def test_successors_follow_more_often_than_chance():
    truth = simulate(300, 400, 3)
    same_user = truth.users[1:] == truth.users[:-1]
    for name in SEQUENCE_FACTORS:
        values = truth.factors[name][truth.items]
        follows = (values[1:] == successor(name, values[:-1]))[same_user].mean()
        assert follows > 1.8 / FACTORS[name]


def attribute_scores(truth, split, names, weight=4.0):
    """Naive Bayes over attribute values: popularity, what the user took before, what followed what in training."""
    scores = np.tile(np.log(split.item_train_counts + 0.5), (split.num_users, 1))
    share = (split.item_train_counts + 0.5) / (split.item_train_counts + 0.5).sum()
    starts = np.zeros(len(split.train_items), dtype=bool)
    starts[split.train_offsets[:-1]] = True
    for name in names:
        values, size = truth.factors[name], FACTORS[name]
        prior = np.bincount(values, share, size)
        trained = values[split.train_items]
        transitions = np.ones((size, size))
        np.add.at(transitions, (trained[:-1][~starts[1:]], trained[1:][~starts[1:]]), 1)
        lift = np.log(transitions / transitions.sum(1, keepdims=True) * transitions.sum() / transitions.sum(0))
        for user in range(split.num_users):
            history = values[split.test_history(user)]
            liked = (np.bincount(history, minlength=size) + weight * prior) / (len(history) + weight)
            scores[user] += (np.log(liked / prior) + lift[history[-1]])[values]
    return scores


def hit_at_10(scores, split):
    hits = []
    for user in split.evaluated_users:
        row = scores[user].copy()
        row[split.test_history(user)] = -np.inf
        hits.append((row > row[split.test_items[user]]).sum() < 10)
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def default_size():
    truth = simulate(600, 1500, 0)
    users, items = truth.users.astype(np.int32), truth.items.astype(np.int32)
    names = [f"u{n}" for n in range(1500)], [f"i{n}" for n in range(600)]
    return truth, leave_one_out(Interactions(*names, users, items, truth.timestamps.astype(np.float64)))


def test_histories_are_short_and_many_items_rare(default_size):
    _, split = default_size
    assert split.short_users().mean() > 0.7
    assert (~split.short_users()).mean() > 0.1
    assert 0.15 < split.tail_items().mean() < 0.5
    assert 0.05 < split.tail_items()[split.test_items].mean() < 0.3


def test_true_factors_predict_far_better_than_popularity_and_item_ids(default_size):
    truth, split = default_size
    popularity = hit_at_10(np.tile(split.item_train_counts.astype(float), (1500, 1)), split)
    follows = np.zeros((600, 600))
    for user in range(split.num_users):
        sequence = split.train_sequence(user)
        np.add.at(follows, (sequence[:-1], sequence[1:]), 1)
    last = np.array([split.test_history(user)[-1] for user in range(1500)])
    transitions = hit_at_10(follows[last] + 1e-6 * split.item_train_counts, split)
    every = hit_at_10(attribute_scores(truth, split, tuple(FACTORS)), split)
    best = hit_at_10(truth.final_utility.astype(np.float64), split)
    # Measured: .077, .111, .301, .793; the standard error is about .01.
    assert every > 2.5 * popularity
    assert every > 1.8 * transitions
    assert best > 2 * every


def test_each_kind_of_factor_carries_signal_of_its_own(default_size):
    truth, split = default_size
    popularity = hit_at_10(np.tile(split.item_train_counts.astype(float), (1500, 1)), split)
    every = hit_at_10(attribute_scores(truth, split, tuple(FACTORS)), split)
    for left_out in SHOWN_IN:
        alone = hit_at_10(attribute_scores(truth, split, SHOWN_IN[left_out]), split)
        others = tuple(name for kind, names in SHOWN_IN.items() if kind != left_out for name in names)
        without = hit_at_10(attribute_scores(truth, split, others), split)
        assert alone > popularity + 0.02, left_out
        assert every > without + 0.03, left_out


def test_without_taste_and_order_there_is_nothing_but_popularity():
    flat = TasteModel(taste_strength=0.0, fashion_strength=0.0, sequence_strength=0.0)
    truth = simulate(600, 3000, 0, flat)
    by_popularity = np.argsort(truth.popularity).reshape(10, 60)
    taken = np.bincount(truth.items, minlength=600)[by_popularity].sum(1)
    expected = truth.popularity[by_popularity].sum(1) / truth.popularity.sum() * len(truth.items)
    # About 18,000 draws; taking without return flattens the most popular tenth by a few per cent.
    assert np.abs(taken / expected - 1).max() < 0.12
