import dataclasses
import json
import logging
from importlib.metadata import version

import numpy as np
import pytest
import torch

from sda_fast import embed as embed_job
from sda_fast.data.vectors import read_item_vectors
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs.pca import fit_pca
from sda_fast.train import finetune


@pytest.fixture
def embed_config(small_world, tmp_path):
    def make(**changes):
        settings = {
            "model": str(small_world.model), "items": small_world.items, "output": tmp_path / "vectors.safetensors",
            "device": "cpu", "max_pixels": 56 * 56, "batch_size": 5, "shard_items": 10, "pca_dim": 8, "progress": False,
        }  # fmt: skip
        return EmbedConfig(**{**settings, **changes})

    return make


def test_table_holds_every_item_in_catalogue_order_and_says_how_it_was_made(embed_config, small_world):
    config = embed_config()
    assert embed(config) == config.output
    table = read_item_vectors(config.output)
    rows = [json.loads(line) for line in small_world.items.read_text().splitlines()]
    assert table.item_ids == [row["item_id"] for row in rows]
    assert table.image.shape == table.text.shape == (24, 64) and table.vectors.shape == (24, 16)
    assert table.metadata["model"] == str(small_world.model) and table.metadata["adapter"] == "null"
    assert table.metadata["noise_images"] == "3"
    assert 0 <= float(table.metadata["padding"]) < 0.5
    assert json.loads(table.metadata["versions"])["torch"] == version("torch")
    assert not config.output.with_name("vectors.safetensors.parts").exists()


def test_vectors_do_not_depend_on_the_batch_size_or_on_the_shards(embed_config, tmp_path):
    one = read_item_vectors(embed(embed_config(batch_size=1, output=tmp_path / "one.safetensors")))
    many = read_item_vectors(embed(embed_config(batch_size=24, shard_items=100, output=tmp_path / "many.safetensors")))
    for name in ("image", "text"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=0, atol=2e-5)


def test_vectors_are_the_pca_of_each_modality_or_of_both(embed_config, tmp_path):
    table = read_item_vectors(embed(embed_config()))
    image, text = torch.from_numpy(table.image), torch.from_numpy(table.text)
    apart = torch.cat([fit_pca(image, 8).transform(image), fit_pca(text, 8).transform(text)], dim=1)
    np.testing.assert_array_equal(table.vectors, apart.numpy())
    joint = read_item_vectors(embed(embed_config(pca="joint", output=tmp_path / "joint.safetensors")))
    both = fit_pca(torch.cat([image, text]), 8)
    np.testing.assert_allclose(joint.vectors[:, 8:], both.transform(text).numpy(), atol=1e-5)
    plain = read_item_vectors(embed(embed_config(pca="none", output=tmp_path / "plain.safetensors")))
    np.testing.assert_array_equal(plain.vectors, np.concatenate([plain.image, plain.text], axis=1))


def test_another_reduction_encodes_nothing_again(embed_config, monkeypatch):
    first = read_item_vectors(embed(embed_config()))
    monkeypatch.setattr(embed_job, "load_lvlm", lambda *_, **__: pytest.fail("the model was loaded"))
    again = read_item_vectors(embed(embed_config(pca_dim=3)))
    assert again.vectors.shape == (24, 6)
    np.testing.assert_array_equal(first.image, again.image)
    before = embed_config().output.stat().st_mtime_ns
    embed(embed_config(pca_dim=3))
    assert embed_config().output.stat().st_mtime_ns == before


def test_later_items_can_be_brought_into_the_space_of_an_earlier_table(embed_config, small_world, tmp_path):
    first = read_item_vectors(embed(embed_config()))
    lines = small_world.items.read_text().splitlines(keepends=True)
    later = small_world.items.with_name("later.jsonl")
    later.write_text("".join(lines[5:8]))
    table = read_item_vectors(
        embed(
            embed_config(
                items=later, output=tmp_path / "later.safetensors", pca_from=tmp_path / "vectors.pca.safetensors"
            )
        )
    )
    np.testing.assert_allclose(table.vectors, first.vectors[5:8], rtol=0, atol=2e-5)


def test_an_interrupted_run_continues_with_the_shards_it_has(embed_config, tmp_path, monkeypatch):
    whole = read_item_vectors(embed(embed_config(output=tmp_path / "whole.safetensors")))
    config = embed_config()
    encode, calls = embed_job.encode, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(embed_job, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    assert not config.output.exists()
    parts = config.output.with_name("vectors.safetensors.parts")
    names = ["image-000000", "image-000001", "image-000002", "text-000000"]
    assert sorted(path.stem for path in parts.iterdir()) == names
    calls.clear()
    monkeypatch.setattr(embed_job, "encode", lambda *given, **options: calls.append(1) or encode(*given, **options))
    resumed = read_item_vectors(embed(config))
    assert len(calls) == 3
    for name in ("image", "text", "vectors"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert resumed.metadata["noise_images"] == "3"


@pytest.mark.parametrize("damage", ["cut", "changed", "other key"])
def test_a_damaged_or_foreign_shard_is_made_again_with_a_warning(embed_config, tmp_path, monkeypatch, caplog, damage):
    whole = read_item_vectors(embed(embed_config(output=tmp_path / "whole.safetensors")))
    config = embed_config()
    with monkeypatch.context() as patch:
        patch.setattr(embed_job, "_gather", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    shard = config.output.with_name("vectors.safetensors.parts") / "text-000001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[:-10]
    elif damage == "changed":
        content[-3] ^= 1
    else:
        config = dataclasses.replace(config, image_instruction="Describe it.")
        whole = None
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        table = read_item_vectors(embed(config))
    assert f"making {shard} again" in caplog.text
    if whole is not None:
        np.testing.assert_array_equal(table.text, whole.text)


def test_an_adapter_changes_the_vectors_and_brings_its_prompts_along(embed_config, finetune_config, tmp_path):
    trained = finetune(finetune_config(steps=2, image_instruction="What is this?", seed=3))
    config = embed_config(adapter=trained.adapter)
    assert config.inherited()["image_instruction"] == "What is this?" and config.inherited()["seed"] == 3
    adapted = read_item_vectors(embed(config))
    zero_shot = read_item_vectors(
        embed(embed_config(image_instruction="What is this?", seed=3, output=tmp_path / "zero.safetensors"))
    )
    assert np.abs(adapted.image - zero_shot.image).max() > 1e-4
    assert adapted.metadata["adapter"] == str(trained.adapter)


def test_folded_weights_give_the_same_vectors_one_modality_at_a_time(
    embed_config, finetune_config, tmp_path, monkeypatch
):
    trained = finetune(finetune_config(steps=2))
    plain = read_item_vectors(embed(embed_config(adapter=trained.adapter)))
    fold_model, folded = embed_job.fold_model, []
    monkeypatch.setattr(embed_job, "fold_model", lambda model, name: folded.append(name) or fold_model(model, name))
    output = tmp_path / "folded.safetensors"
    table = read_item_vectors(embed(embed_config(adapter=trained.adapter, output=output, fold=True)))
    assert folded == ["image", "text"]
    for name in ("image", "text"):
        np.testing.assert_allclose(getattr(table, name), getattr(plain, name), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="no adapter to fold"):
        embed_config(fold=True)


def test_a_missing_adapter_and_a_vector_that_is_not_finite_are_named(embed_config, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        embed(embed_config(adapter=tmp_path / "nowhere"))
    monkeypatch.setattr(embed_job, "encode", lambda *given, **options: torch.full((5, 64), torch.nan))
    with pytest.raises(ValueError, match="image vectors of these items are not finite: I0"):
        embed(embed_config())


def test_out_of_memory_halves_the_batch_and_says_so(embed_config, tmp_path, monkeypatch, caplog):
    whole = read_item_vectors(embed(embed_config(output=tmp_path / "whole.safetensors")))
    encode = embed_job.encode

    def small_card(lvlm, batch, modality, **options):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(lvlm, batch, modality, **options)

    monkeypatch.setattr(embed_job, "encode", small_card)
    with caplog.at_level(logging.WARNING):
        table = read_item_vectors(embed(embed_config()))
    assert "batches of 3 items" in caplog.text and "batches of 2 items" in caplog.text
    np.testing.assert_allclose(table.image, whole.image, rtol=0, atol=2e-5)
