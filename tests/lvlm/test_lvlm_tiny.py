"""The tiny model: real classes, trained a little, loaded like any other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import load_lvlm, quantized_linears
from sda_fast.lvlm.tiny import TinyConfig, build_tiny, build_tiny_lvlm

SMALL = {"batch_size": 2, "hidden_size": 64, "num_layers": 1, "image_side": 28, "vocab_size": 300}


def test_pretraining_lowers_both_losses(tiny_folder):
    record = json.loads((tiny_folder.folder / "pretraining.json").read_text())
    assert record["steps"] == 12 and len(record["caption_losses"]) == 12
    assert record["caption_last"] < record["caption_first"] - 0.5
    assert record["text_last"] < record["text_first"] - 0.5
    assert "stand-in" in (tiny_folder.folder / "README.md").read_text()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_is_loaded_and_encodes_like_a_model_of_its_real_class(tiny_folder, quantization):
    from transformers import Qwen2_5_VLModel, Qwen2_5_VLProcessor

    lvlm = load_lvlm(tiny_folder.folder, quantization=quantization, dtype=torch.float32, device="cpu")
    assert type(lvlm.model) is Qwen2_5_VLModel and isinstance(lvlm.processor, Qwen2_5_VLProcessor)
    assert len(quantized_linears(lvlm.model)) == (14 if quantization == "nf4" else 0)
    items = tiny_folder.catalogue.items[:3]
    with torch.no_grad():
        images = encode(lvlm, collate_images(lvlm, items), "image")
        texts = encode(lvlm, collate_texts(lvlm, items), "text")
    assert images.shape == texts.shape == (3, 64) and torch.isfinite(images + texts).all()


def test_every_quantised_linear_has_whole_blocks(tiny_folder):
    lvlm = load_lvlm(tiny_folder.folder, quantization="nf4", dtype=torch.float32, device="cpu")
    for name in quantized_linears(lvlm.model):
        module = lvlm.model.get_submodule(name)
        assert module.in_features % 64 == 0 and module.out_features % 32 == 0


def test_the_seed_decides_the_weights(catalogue, tmp_path):
    weights = [
        load_file(
            build_tiny_lvlm(catalogue, tmp_path / name, seed=seed, pretrain_steps=1, **SMALL) / "model.safetensors"
        )
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    same = [torch.equal(weights[0][name], weights[1][name]) for name in weights[0]]
    assert all(same)
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_building_leaves_the_random_state_alone(catalogue, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny_lvlm(catalogue, tmp_path / "model", pretrain_steps=1, **SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_with_something_in_it_is_not_overwritten(catalogue, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        build_tiny_lvlm(catalogue, tmp_path, pretrain_steps=0)


@pytest.mark.parametrize("wrong", [{"hidden_size": 96}, {"image_side": 60}])
def test_sizes_that_do_not_fit_are_refused(catalogue, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"multiple of .*{next(iter(wrong.values()))}"):
        build_tiny_lvlm(catalogue, tmp_path / "model", **wrong)


def test_the_command_builds_from_a_catalogue_file(tiny_folder, tmp_path):
    from sda_fast.data.items import write_items

    write_items(tiny_folder.catalogue, tmp_path / "items.jsonl")
    config = TinyConfig(
        tmp_path / "items.jsonl", tmp_path / "model", pretrain_steps=0, hidden_size=64, num_layers=1, image_side=28
    )
    assert (build_tiny(config) / "config.json").is_file()
    assert "not trained" in (tmp_path / "model" / "README.md").read_text()
