"""The frozen tower in small groups, parked in main memory, and its outputs on disk."""

import dataclasses
import logging

import pytest
import torch

from sda_fast.jobs.features import Tower, cached_tower_features
from sda_fast.lvlm import feature_store
from sda_fast.lvlm.collate import ImageOptions, collate_images, collate_shown
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.feature_store import FeatureStore
from sda_fast.lvlm.load import load_lvlm
from sda_fast.lvlm.tower import GROUP_VALUES, ParkedTower, picture_groups, tower_features
from sda_fast.lvlm.tower_cache import TowerCache

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]
families = pytest.mark.parametrize("model_type", MODEL_TYPES)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@families
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_groups_give_the_features_of_the_whole_batch_to_rounding(loaded, items, model_type, group_size):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    whole = tower_features(lvlm, batch, group_size=len(items))
    grouped = tower_features(lvlm, batch, group_size=group_size)
    for one, other in zip(grouped, whole, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


@families
def test_alone_a_picture_s_features_do_not_depend_on_the_batch_at_all(loaded, items, model_type):
    lvlm = loaded(model_type)
    in_batch = tower_features(lvlm, collate_images(lvlm, items), group_size=1)
    reversed_batch = tower_features(lvlm, collate_images(lvlm, items[::-1]), group_size=1)
    assert_same(in_batch, reversed_batch[::-1])


@families
def test_chosen_places_are_those_of_the_batch(loaded, items, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    everything = tower_features(lvlm, batch, group_size=1)
    assert_same(tower_features(lvlm, batch, [3, 1], group_size=1), [everything[3], everything[1]])


def test_groups_hold_at_most_so_many_pixel_values_but_never_no_picture(loaded, items, monkeypatch):
    lvlm = loaded("qwen2_5_vl")
    batch = collate_images(lvlm, items)
    values = [int(grid.prod()) * batch["pixel_values"].shape[1] for grid in batch["image_grid_thw"]]
    assert sum(values) < GROUP_VALUES
    assert picture_groups(lvlm, batch, range(5)) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr("sda_fast.lvlm.tower.GROUP_VALUES", values[0] + values[1])
    for group in picture_groups(lvlm, batch, range(5)):
        assert len(group) == 1 or sum(values[place] for place in group) <= values[0] + values[1]
    monkeypatch.setattr("sda_fast.lvlm.tower.GROUP_VALUES", 1)
    assert picture_groups(lvlm, batch, range(5)) == [[0], [1], [2], [3], [4]]


@families
def test_a_sequence_depends_on_the_picture_s_size_alone(loaded, items, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    shown = collate_shown(lvlm, [tuple(size) for size in batch["shown_sizes"].tolist()])
    expected = {name for name in batch if not name.startswith("pixel_")} - {"is_noise"}
    assert set(shown) == expected
    for name in expected:
        torch.testing.assert_close(shown[name], batch[name], rtol=0, atol=0)


@families
def test_kept_features_give_the_same_vectors_bit_for_bit(loaded, items, tmp_path, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    fresh = tower_features(lvlm, batch, group_size=1)
    cached_tower_features(lvlm, items[:3], tmp_path)
    kept = cached_tower_features(lvlm, items, tmp_path)
    again = cached_tower_features(lvlm, items, tmp_path)
    assert_same(kept, fresh)
    assert_same(again, fresh)
    with torch.no_grad():
        vectors = [encode(lvlm, batch, "image", image_features=one) for one in (fresh, again)]
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=0)


def test_deepstack_features_are_kept_too(loaded, items, tmp_path):
    (features,) = cached_tower_features(loaded("qwen3_vl"), items[:1], tmp_path)
    assert sorted(features) == ["deepstack_0", "deepstack_1", "features"]


def test_a_known_picture_is_neither_decoded_nor_shown_to_the_tower(loaded, items, tmp_path, monkeypatch):
    lvlm = loaded("qwen2_5_vl")
    first = cached_tower_features(lvlm, items, tmp_path)
    monkeypatch.setattr("sda_fast.lvlm.collate.load_image", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr("sda_fast.jobs.features.run_tower", lambda *_: pytest.fail("the tower ran"))
    assert_same(cached_tower_features(lvlm, items, tmp_path), first)


def test_a_picture_is_known_by_its_content_and_a_missing_one_by_its_noise(loaded, items, tmp_path):
    lvlm = loaded("qwen2_5_vl")
    cache = TowerCache(lvlm, tmp_path / "cache")
    copy = tmp_path / "copy.png"
    copy.write_bytes(items[0].image.read_bytes())
    assert cache.picture(dataclasses.replace(items[1], image=copy)) == cache.picture(items[0])
    copy.write_bytes(items[1].image.read_bytes())
    assert cache.picture(dataclasses.replace(items[0], image=copy)) == cache.picture(items[1])
    bare, other = items[4], dataclasses.replace(items[4], item_id="other")
    assert cache.picture(bare) != cache.picture(other)
    seeded = TowerCache(lvlm, tmp_path / "cache", ImageOptions(noise_seed=1))
    assert seeded.picture(bare) != cache.picture(bare) and seeded.picture(items[0]) == cache.picture(items[0])
    assert cache.picture(dataclasses.replace(items[0], image=tmp_path / "nowhere.png")) is None


def test_other_weights_sizes_or_dtypes_are_kept_apart(family_folder, loaded, items, tmp_path):
    lvlm = loaded("qwen2_5_vl")
    cached_tower_features(lvlm, items, tmp_path)
    same = TowerCache(loaded("qwen2_5_vl", "nf4"), tmp_path)
    assert len(same.store) == len(items)
    other_sizes = TowerCache(lvlm, tmp_path, ImageOptions(max_pixels=56 * 56))
    assert len(other_sizes.store) == 0
    changed = load_lvlm(family_folder("qwen2_5_vl"), quantization="none", dtype=torch.bfloat16, device="cpu")
    half = TowerCache(changed, tmp_path)
    next(iter(changed.family.tower_tensors(changed.model).values())).data += 1
    moved = TowerCache(changed, tmp_path)
    folders = {cache.store.folder for cache in (same, other_sizes, half, moved)}
    assert len(folders) == 4 and all((folder / "about.json").is_file() for folder in folders)


def test_a_trainable_tower_is_refused_by_name(family_folder, tmp_path):
    lvlm = load_lvlm(family_folder("gemma3"), quantization="none", dtype=torch.float32, device="cpu")
    lvlm.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"cannot be kept: multi_modal_projector\..*trainable"):
        TowerCache(lvlm, tmp_path)


@families
def test_the_tower_is_everything_beside_the_decoder(loaded, model_type):
    lvlm = loaded(model_type)
    tower = lvlm.family.tower_tensors(lvlm.model)
    parameters = {name for name, _ in lvlm.model.named_parameters()} & set(tower)
    assert parameters and not any("language_model" in name for name in parameters)
    beside = {name for name, _ in lvlm.model.named_parameters() if "language_model" not in name}
    assert parameters == beside


@families
def test_a_parked_tower_gives_the_same_features_and_leaves_nothing_behind(family_folder, loaded, items, model_type):
    lvlm = load_lvlm(family_folder(model_type), quantization="none", dtype=torch.float32, device="cpu")
    batch = collate_images(lvlm, items)
    before = {name: tensor.clone() for name, tensor in lvlm.model.state_dict().items()}
    expected = tower_features(loaded(model_type), batch)
    parked = ParkedTower(lvlm)
    visits = []
    for tensor in lvlm.family.tower_tensors(lvlm.model).values():
        visits.append((tensor, tensor.data_ptr()))
    with parked.on_device():
        assert_same(tower_features(lvlm, batch), expected)
    assert all(tensor.data_ptr() == place for tensor, place in visits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lvlm.model.state_dict().items())
    assert lvlm.device == lvlm.language_model.norm.weight.device


def test_out_of_memory_in_the_tower_halves_the_group_and_says_so(loaded, items, monkeypatch, caplog):
    from sda_fast.jobs import features as features_job
    from sda_fast.jobs.batches import BatchMaker
    from sda_fast.lvlm.prompts import PromptConfig

    lvlm = loaded("qwen2_5_vl")
    run_tower = features_job.run_tower

    def small_card(lvlm, batch, group):
        if len(group) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_tower(lvlm, batch, group)

    monkeypatch.setattr(features_job, "run_tower", small_card)
    chunk = BatchMaker(lvlm, PromptConfig(), ImageOptions()).image_chunk(items)
    tower = Tower(lvlm)
    with caplog.at_level(logging.WARNING):
        tower.complete([chunk])
    assert tower.group_size == 2 and "2 pictures at a time" in caplog.text
    assert_same(chunk.image_features, tower_features(lvlm, collate_images(lvlm, items), group_size=2))


@pytest.fixture
def filled(tmp_path):
    """A store with four pictures in two shards."""
    store = FeatureStore(tmp_path, "key")
    for number in range(4):
        store.add(f"p{number}", {"features": torch.full((2, 3), number, dtype=torch.bfloat16)})
        if number % 2:
            store.flush()
    return store


def test_the_store_is_read_back_by_another_process_with_dtype_and_shape(filled):
    again = FeatureStore(filled.folder, "key")
    assert len(again) == 4 and "p3" in again and "p4" not in again
    found = again.get("p3")["features"]
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3) and bool((found == 3).all())
    assert again.get("p4") is None
    assert again.counts == {"found": 1, "missing": 1}


def test_what_was_not_flushed_is_all_that_a_kill_loses(filled):
    filled.add("p4", {"features": torch.zeros(1)})
    assert filled.get("p4") is not None
    assert len(FeatureStore(filled.folder, "key")) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "deleted"])
def test_a_damaged_shard_is_deleted_with_a_counted_warning_and_the_others_stay(filled, caplog, damage):
    store = FeatureStore(filled.folder, "key")
    shard = store._shard_of["p0"]
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[:-5])
    elif damage == "changed":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "emptied":
        shard.write_bytes(b"")
    else:
        shard.unlink()
    with caplog.at_level(logging.WARNING):
        assert store.get("p0") is None or damage == "changed"
        assert store.get("p1") is None
    assert "2 pictures will be computed again" in caplog.text
    assert store.counts["damaged_shards"] == 1 and not shard.exists()
    assert store.get("p2") is not None and len(store) == 2
    store.add("p0", {"features": torch.ones(1)})
    store.flush()
    assert FeatureStore(filled.folder, "key").get("p0") is not None


def test_a_shard_of_another_key_or_that_cannot_be_opened_is_not_entered(filled, caplog):
    (filled.folder / "shard-x.safetensors").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        assert len(FeatureStore(filled.folder, "key")) == 4
        assert len(FeatureStore(filled.folder, "other")) == 0
    assert "shard-x" in caplog.text and "another model" in caplog.text


@pytest.mark.parametrize("reason", ["disk", "bound", "error"])
def test_a_full_disk_loses_nothing_that_is_there_and_says_so_once(filled, monkeypatch, caplog, reason):
    if reason == "disk":
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage)
    store = FeatureStore(filled.folder, "key", most_bytes=1 if reason == "bound" else None)
    if reason == "error":

        def full(path, *_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(feature_store, "write_safetensors_atomic", full)
    with caplog.at_level(logging.WARNING):
        for number in range(4, 7):
            store.add(f"p{number}", {"features": torch.zeros(1)})
            store.flush()
    assert caplog.text.count("cannot add to the tower cache") == 1
    assert store.counts["not_kept"] == 3 and store.counts["added"] == 0
    assert store.get("p0") is not None and store.get("p4") is None
    assert len(FeatureStore(filled.folder, "key")) == 4


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 100)
    store = FeatureStore(tmp_path, "key")
    for number in range(5):
        store.add(f"p{number}", {"features": torch.zeros(15)})
    assert len(list(tmp_path.glob("shard-*"))) == 2 and len(FeatureStore(tmp_path, "key")) == 4


@families
def test_groups_in_bf16_are_as_near_the_truth_as_pictures_alone(family_folder, items, model_type):
    folder = family_folder(model_type)
    half = load_lvlm(folder, quantization="none", dtype=torch.bfloat16, device="cpu", progress=False)
    batch = collate_images(half, items)
    exact = load_lvlm(folder, quantization="none", dtype=torch.bfloat16, device="cpu", progress=False)
    exact.model.double()
    truth = tower_features(exact, batch, group_size=1)

    def error(group_size):
        found = tower_features(half, batch, group_size=group_size)
        squares = [(a[k].double() - b[k].double()).square().sum() for a, b in zip(found, truth, strict=True) for k in a]
        return float(torch.stack(squares).sum().sqrt())

    norm = float(torch.stack([one[k].double().square().sum() for one in truth for k in one]).sum().sqrt())
    alone, together = error(1), error(len(items))
    assert alone < 0.05 * norm
    assert together < 1.1 * alone + 1e-6 * norm
