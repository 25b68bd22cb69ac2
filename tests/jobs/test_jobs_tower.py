"""The tower cache in the long jobs: the same results, killed, damaged and full, and with the tower left alone."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from sda_fast import train
from sda_fast.data.vectors import read_item_vectors
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs import features as features_job
from sda_fast.lvlm import feature_store
from sda_fast.train import finetune


@pytest.fixture
def embed_config(small_world, tmp_path):
    def make(name="vectors", **changes):
        settings = {
            "model": str(small_world.model), "items": small_world.items, "output": tmp_path / f"{name}.safetensors",
            "device": "cpu", "max_pixels": 56 * 56, "batch_size": 5, "shard_items": 10, "pca_dim": 8, "progress": False,
        }  # fmt: skip
        return EmbedConfig(**{**settings, **changes})

    return make


@pytest.fixture
def tower_runs(monkeypatch):
    """Counts the pictures that go through the tower."""
    runs = Counter()
    run_tower = features_job.run_tower

    def counted(lvlm, batch, group):
        runs["pictures"] += len(group)
        return run_tower(lvlm, batch, group)

    monkeypatch.setattr(features_job, "run_tower", counted)
    return runs


def adapter_bytes(result):
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def shards(folder):
    return sorted(folder.glob("*/shard-*.safetensors"))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_training_from_the_cache_is_the_same_bit_for_bit(finetune_config, tmp_path, tower_runs, chunk_size, caplog):
    settings = {"steps": 8, "chunk_size": chunk_size}
    plain = finetune(finetune_config(output=tmp_path / "plain", tower_batch=1, **settings))
    assert tower_runs["pictures"] == 8 * 6
    tower_runs.clear()
    cold = finetune(finetune_config(output=tmp_path / "cold", tower_cache=tmp_path / "cache", **settings))
    assert tower_runs["pictures"] == 24
    tower_runs.clear()
    with caplog.at_level(logging.INFO):
        warm = finetune(finetune_config(output=tmp_path / "warm", tower_cache=tmp_path / "cache", **settings))
    assert tower_runs["pictures"] == 0
    # Three items have no picture that can be read, which is seen at the first look only.
    assert "pictures from the tower cache, 0 added" in caplog.text
    assert adapter_bytes(cold) == adapter_bytes(plain) == adapter_bytes(warm)
    assert cold.losses == plain.losses == warm.losses


def test_a_parked_tower_and_groups_train_the_same(finetune_config, tmp_path):
    settings = {"steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    alone = finetune(finetune_config(output=tmp_path / "alone", tower_batch=1, **settings))
    parked = finetune(finetune_config(output=tmp_path / "parked", tower_batch=1, tower_offload=True, **settings))
    grouped = finetune(finetune_config(output=tmp_path / "grouped", **settings))
    assert adapter_bytes(parked) == adapter_bytes(alone)
    assert grouped.losses == pytest.approx(alone.losses, rel=1e-5)


def test_packed_training_is_the_padded_one_without_padding(finetune_config, tmp_path):
    settings = {"steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    padded = finetune(finetune_config(output=tmp_path / "padded", packing="off", **settings))
    packed = finetune(finetune_config(output=tmp_path / "packed", packing="on", **settings))
    assert packed.losses == pytest.approx(padded.losses, rel=1e-4)
    records = [[json.loads(line) for line in run.log.read_text().splitlines()] for run in (padded, packed)]
    assert all(record["padding"] > 0 for record in records[0]) and all(record["padding"] == 0 for record in records[1])
    facts = json.loads((padded.adapter / "training.json").read_text())["training"]
    assert facts["padding"] == pytest.approx(sum(record["padding"] for record in records[0]) / 3, abs=1e-4)


def test_a_run_killed_while_it_fills_the_cache_continues_bit_for_bit(finetune_config, tmp_path, run_and_kill):
    settings = {"steps": 10, "batch_size": 4}
    whole = finetune(finetune_config(output=tmp_path / "whole", tower_batch=1, **settings))
    config = finetune_config(output=tmp_path / "killed", tower_cache=tmp_path / "cache", **settings)
    log = config.output / "log.jsonl"
    run_and_kill(config, lambda: log.is_file() and log.read_text().count("\n") >= 3)
    kept = shards(tmp_path / "cache")
    assert kept
    resumed = finetune(config)
    assert adapter_bytes(resumed) == adapter_bytes(whole) and resumed.losses == whole.losses
    assert set(kept) <= set(shards(tmp_path / "cache"))


def test_embedding_takes_the_cache_of_the_adapter_s_training(
    finetune_config, embed_config, tmp_path, tower_runs, monkeypatch
):
    trained = finetune(finetune_config(steps=4, tower_cache=tmp_path / "cache"))
    assert tower_runs["pictures"] == 24
    tower_runs.clear()
    cached = read_item_vectors(embed(embed_config("cached", adapter=trained.adapter)))
    assert tower_runs["pictures"] == 0
    plain = embed_config("plain", adapter=trained.adapter, tower_cache="none", tower_batch=1)
    fresh = read_item_vectors(embed(plain))
    assert tower_runs["pictures"] == 24
    assert cached.metadata["noise_images"] == fresh.metadata["noise_images"] == "3"
    for name in ("image", "text", "vectors"):
        np.testing.assert_array_equal(getattr(cached, name), getattr(fresh, name))


def test_embedding_packed_gives_the_padded_vectors_without_padding(embed_config):
    # Not in 4 bits: bitsandbytes' CPU product rounds its input to bf16, which turns 1e-7 of another sum into 1e-4.
    padded = read_item_vectors(embed(embed_config("padded", packing="off", quantization="none")))
    packed = read_item_vectors(embed(embed_config("packed", packing="on", quantization="none")))
    assert float(padded.metadata["padding"]) > 0 and float(packed.metadata["padding"]) == 0
    for name in ("image", "text"):
        np.testing.assert_allclose(getattr(packed, name), getattr(padded, name), rtol=0, atol=2e-5)


def test_a_damaged_shard_is_computed_again_with_a_counted_warning(embed_config, tmp_path, tower_runs, caplog):
    folder = tmp_path / "cache"
    first = read_item_vectors(embed(embed_config("first", tower_cache=folder)))
    damaged = shards(folder)[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    tower_runs.clear()
    with caplog.at_level(logging.INFO):
        again = read_item_vectors(embed(embed_config("again", tower_cache=folder)))
    assert 0 < tower_runs["pictures"] <= 10 and not damaged.exists()
    assert "1 damaged shards deleted" in caplog.text and "computed again" in caplog.text
    np.testing.assert_array_equal(again.vectors, first.vectors)


def test_a_full_disk_stops_the_cache_and_not_the_run(finetune_config, tmp_path, monkeypatch, caplog):
    whole = finetune(finetune_config(output=tmp_path / "whole", tower_batch=1))
    write = feature_store.write_safetensors_atomic
    written = []

    def fills_up(path, *arguments):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(feature_store, "write_safetensors_atomic", fills_up)
    with caplog.at_level(logging.INFO):
        run = finetune(finetune_config(output=tmp_path / "full", tower_cache=tmp_path / "cache"))
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert caplog.text.count("cannot add to the tower cache") == 1 and "No space left" in caplog.text
    assert "not kept for want of room" in caplog.text and shards(tmp_path / "cache") == written


def test_a_bound_on_the_cache_s_size_is_kept(finetune_config, tmp_path, caplog):
    finetune(finetune_config(tower_cache=tmp_path / "cache", tower_cache_gib=0))
    assert shards(tmp_path / "cache") == [] and "it would take more than 0 bytes" in caplog.text


def test_events_are_written_for_tensorboard_where_it_is_installed(finetune_config, monkeypatch, tmp_path):
    import sys
    import types

    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    find_spec = train.RunLog.__init__.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "tensorboard" or find_spec(name, *rest))
    result = finetune(finetune_config(steps=2))
    folder = str(result.adapter.parent / "tensorboard")
    assert events[0] == ("open", folder, 1) and events[-1] == ("close",)
    losses = [value for name, value, _ in (one for one in events if len(one) == 3) if name == "loss"]
    assert losses == result.losses
    assert {one[0] for one in events} >= {"temperature", "grad_norm", "padding", "items_per_second"}


@pytest.mark.parametrize("name", ["adamw8bit", "paged"])
def test_bitsandbytes_optimisers_are_refused_on_a_cpu_before_the_model_is_read(finetune_config, monkeypatch, name):
    monkeypatch.setattr("sda_fast.jobs.train_state.load_lvlm", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(ValueError, match=f"'{name}' needs a GPU, the device is cpu; use adamw"):
        finetune(finetune_config(optimizer=name))


def test_bitsandbytes_optimisers_are_made_for_a_gpu(finetune_config, monkeypatch):
    import bitsandbytes

    from sda_fast.jobs.train_state import make_optimizer

    parameters = [torch.nn.Parameter(torch.zeros(4))]
    for name, kind in (("adamw8bit", "AdamW8bit"), ("paged", "PagedAdamW8bit")):
        made = make_optimizer(finetune_config(optimizer=name), [{"params": parameters}], torch.device("cuda"))
        assert type(made) is getattr(bitsandbytes.optim, kind)
        assert made.param_groups[0]["lr"] == 3e-3 and made.param_groups[0]["betas"] == (0.9, 0.999)


def test_bars_are_drawn_if_and_only_if_progress_is_wanted(finetune_config, embed_config, tmp_path, capfd):
    finetune(finetune_config(steps=1))
    embed(embed_config())
    assert "it/s]" not in capfd.readouterr().err
    finetune(finetune_config(output=tmp_path / "shown", steps=1, progress=True))
    assert "Loading weights" in capfd.readouterr().err
