"""Loading: what is read, what is left out, and what the errors say."""

import dataclasses
import json
import shutil

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file

from sda_fast.lvlm.collate import collate_images
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.family import family_of, known_model_types
from sda_fast.lvlm.load import check_quantized, load_lvlm, quantized_linears


def load(folder, **options):
    return load_lvlm(folder, **{"dtype": torch.float32, "device": "cpu", **options})


def copy_with_config(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_the_language_head_is_loaded_in_16_bits_on_request_only(family_folder):
    folder = family_folder("qwen2_5_vl")
    without, with_head = load(folder), load(folder, lm_head=True, dtype=torch.bfloat16)
    assert not hasattr(without.model, "lm_head")
    assert type(with_head.model.lm_head) is torch.nn.Linear and with_head.model.lm_head.weight.dtype == torch.bfloat16
    assert all(name.startswith("model.language_model.") for name in quantized_linears(with_head.model))
    assert len(quantized_linears(with_head.model)) == 14


def test_a_checkpoint_with_the_hubs_older_names_gives_the_same_vectors(family_folder, items, tmp_path):
    """Qwen/Qwen2.5-VL-7B-Instruct names its weights visual.*, model.layers.* and lm_head.weight."""
    folder = tmp_path / "hub"
    shutil.copytree(family_folder("qwen2_5_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): weight.contiguous()
        for name, weight in weights.items()
    }
    assert any(name.startswith("visual.blocks.0") for name in renamed)
    assert any(name.startswith("model.layers.0") for name in renamed)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    for quantization in ("none", "nf4"):
        vectors = []
        for path in (folder, family_folder("qwen2_5_vl")):
            lvlm = load(path, quantization=quantization)
            with torch.no_grad():
                vectors.append(encode(lvlm, collate_images(lvlm, items), "image"))
        assert torch.equal(*vectors)


@pytest.mark.parametrize("double_quant", [True, False])
def test_double_quantisation_nests_the_block_scales(family_folder, double_quant):
    lvlm = load(family_folder("qwen2_5_vl"), double_quant=double_quant)
    states = [module.weight.quant_state for module in lvlm.language_model.modules() if hasattr(module, "compute_dtype")]
    assert states and all(state.nested == double_quant for state in states)
    assert all(state.quant_type == "nf4" and state.blocksize == 64 for state in states)


def test_float32_rows_are_multiplied_in_float32_whatever_the_processor_can(family_folder):
    """In evaluation and without an adapter, where bitsandbytes may have a product of its own."""
    lvlm = load_lvlm(family_folder("qwen2_vl"), dtype=torch.float32, device="cpu")
    layer = lvlm.model.get_submodule(quantized_linears(lvlm.model)[0])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, layer.in_features, generator=draw)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = torch.nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_model_comes_frozen_and_in_evaluation_mode(loaded):
    for quantization in ("none", "nf4"):
        model = loaded("qwen2_5_vl", quantization).model
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_attention_implementation_can_be_chosen(family_folder):
    lvlm = load(family_folder("qwen2_5_vl"), quantization="none", attention="eager")
    assert lvlm.language_model.config._attn_implementation == "eager"


def test_a_quantised_vision_tower_is_an_error(loaded):
    lvlm = loaded("qwen2_5_vl", "nf4")
    wrong = dataclasses.replace(lvlm.family, language_model="visual")
    with pytest.raises(RuntimeError, match=r"visual\.blocks\.0\.attn\.qkv was not put into 4 bits"):
        check_quantized(lvlm.model, wrong)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(tmp_path)


@pytest.mark.parametrize("removed", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_reported(family_folder, tmp_path, removed):
    folder = tmp_path / "model"
    shutil.copytree(family_folder("qwen2_5_vl"), folder)
    (folder / removed).unlink()
    with pytest.raises(FileNotFoundError, match=str(folder)):
        load(folder)


def test_missing_weights_are_an_error(family_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family_folder("qwen2_5_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks the weights .*layers\.1\.mlp\.up_proj"):
        load(folder, quantization="none")


@pytest.mark.parametrize("model_type", ["no-such-model", "bert"])
def test_an_unknown_model_type_gets_the_list_of_known_ones(family_folder, tmp_path, model_type):
    folder = copy_with_config(family_folder("qwen2_5_vl"), tmp_path / "model", model_type=model_type)
    with pytest.raises(ValueError, match="gemma3, mllama, qwen2_5_vl, qwen2_vl, qwen3_vl"):
        load(folder)


def test_every_known_model_type_is_claimed_by_its_family():
    from transformers import AutoConfig

    for model_type in known_model_types():
        assert model_type in family_of(AutoConfig.for_model(model_type)).model_types


def test_an_unknown_quantisation_is_refused(family_folder):
    with pytest.raises(ValueError, match="'int3'"):
        load(family_folder("qwen2_5_vl"), quantization="int3")
