"""Every family, end to end on the CPU, with tiny models of its real classes."""

import re

import pytest
import torch
from torch import nn

from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode, mean_pool, tower_features
from sda_fast.lvlm.load import quantized_linears

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]
OWN_ENTRIES = ("pool_mask", "is_noise", "position_ids", "shown_sizes")

families = pytest.mark.parametrize("model_type", MODEL_TYPES)
quantizations = pytest.mark.parametrize("quantization", ["none", "nf4"])


def vectors(lvlm, items, modality):
    collate = collate_images if modality == "image" else collate_texts
    with torch.no_grad():
        return encode(lvlm, collate(lvlm, items), modality)


@families
@quantizations
@pytest.mark.parametrize("modality", ["image", "text"])
def test_items_get_different_finite_vectors_that_do_not_depend_on_the_batch(
    loaded, items, model_type, quantization, modality
):
    lvlm = loaded(model_type, quantization)
    together = vectors(lvlm, items, modality)
    alone = torch.cat([vectors(lvlm, [item], modality) for item in items])
    assert together.shape == (len(items), lvlm.hidden_size) and together.dtype == torch.float32
    assert torch.isfinite(together).all()
    assert (together[0] - together[1]).abs().max() > 1e-2
    # Sums of float32 numbers of size 1 in another order.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=5e-6)


@families
@pytest.mark.parametrize("modality", ["image", "text"])
def test_encoding_in_two_parts_equals_the_models_own_forward_pass(loaded, items, model_type, modality):
    lvlm = loaded(model_type)
    for item in items:
        batch = (collate_images if modality == "image" else collate_texts)(lvlm, [item])
        own_input = {name: tensor for name, tensor in batch.items() if name not in OWN_ENTRIES}
        with torch.no_grad():
            expected = mean_pool(lvlm.model(**own_input, use_cache=False).last_hidden_state, batch["attention_mask"])
            torch.testing.assert_close(encode(lvlm, batch, modality), expected, rtol=1e-5, atol=1e-5)


@families
def test_exactly_the_linears_of_the_decoder_are_in_4_bits(loaded, model_type):
    lvlm = loaded(model_type, "nf4")
    decoder = {id(module) for module in lvlm.language_model.modules()}
    expected = [n for n, m in lvlm.model.named_modules() if isinstance(m, nn.Linear) and id(m) in decoder]
    assert quantized_linears(lvlm.model) == expected
    others = [p for n, p in lvlm.model.named_parameters() if n.rsplit(".", 1)[0] not in set(expected)]
    assert {parameter.dtype for parameter in others} == {torch.float32}
    assert not any("lm_head" in name for name, _ in lvlm.model.named_modules())


@families
def test_target_modules_are_the_decoders_linears_without_cross_attention(loaded, model_type):
    lvlm = loaded(model_type)
    decoder = {id(module) for module in lvlm.language_model.modules()}
    linears = {n for n, m in lvlm.model.named_modules() if isinstance(m, nn.Linear)}
    inside = {n for n, m in lvlm.model.named_modules() if n in linears and id(m) in decoder}
    chosen = {name for name in linears if re.fullmatch(lvlm.family.target_modules, name)}
    cross = {name for name in inside if model_type == "mllama" and ".layers.1." in name}
    assert chosen == inside - cross
    assert len(cross) == (7 if model_type == "mllama" else 0)


@families
def test_features_of_the_tower_can_be_kept_and_used_again(loaded, items, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    features = tower_features(lvlm, batch)
    assert len(features) == len(items)
    alone = [tower_features(lvlm, collate_images(lvlm, [item]))[0] for item in items]
    with torch.no_grad():
        expected = encode(lvlm, batch, "image")
        for kept in (features, alone):
            torch.testing.assert_close(
                encode(lvlm, batch, "image", image_features=kept), expected, rtol=1e-5, atol=1e-5
            )


@families
@quantizations
def test_gradients_reach_the_adapters_of_the_decoder_and_nothing_else(family_folder, items, model_type, quantization):
    import sda_fast
    from sda_fast.lvlm.load import load_lvlm

    lvlm = load_lvlm(family_folder(model_type), quantization=quantization, dtype=torch.float32, device="cpu")
    config = sda_fast.MoDAConfig(r=4, num_experts=2, lora_dropout=0.0, target_modules=lvlm.family.target_modules)
    adapted = sda_fast.adapt_model(lvlm.model, config)
    prefix = next(name for name, module in lvlm.model.named_modules() if module is lvlm.language_model)
    assert adapted and all(name.startswith(f"{prefix}.layers.") for name in adapted)
    batch = collate_images(lvlm, items[:2])
    loss = (
        encode(lvlm, batch, "image").square().mean() + encode(lvlm, collate_texts(lvlm, items), "text").square().mean()
    )
    loss.backward()
    with_gradient = {name for name, parameter in lvlm.model.named_parameters() if parameter.grad is not None}
    trainable = {name for name, parameter in lvlm.model.named_parameters() if parameter.requires_grad}
    assert with_gradient == trainable
    assert all(any(name.startswith(f"{layer}.") for layer in adapted) for name in with_gradient)
