"""Packed rows beside padded batches: the same positions, vectors and gradients."""

import pytest
import torch

from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import load_lvlm
from sda_fast.lvlm.packing import attention_for, pack, packed_modalities, pool_packed
from sda_fast.lvlm.prompts import PromptConfig

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]
families = pytest.mark.parametrize("model_type", MODEL_TYPES)
modalities = pytest.mark.parametrize("modality", ["image", "text"])


def collated(lvlm, items, modality, prompts=None):
    return (collate_images if modality == "image" else collate_texts)(lvlm, items, prompts)


@families
@modalities
def test_packing_keeps_the_unmasked_tokens_and_starts_positions_anew(loaded, items, model_type, modality):
    lvlm = loaded(model_type)
    batch = collated(lvlm, items, modality)
    packed = pack({name: one for name, one in batch.items() if not name.startswith("pixel_")})
    mask = batch["attention_mask"].bool()
    assert "attention_mask" not in packed and packed["lengths"].tolist() == mask.sum(1).tolist()
    assert torch.equal(packed["input_ids"], batch["input_ids"][mask][None])
    restarts = torch.cat([torch.arange(length) for length in packed["lengths"].tolist()])
    plain = packed["position_ids"][0] if packed["position_ids"].dim() == 3 else packed["position_ids"]
    assert torch.equal(plain, restarts[None])
    if model_type.startswith("qwen"):
        assert packed["position_ids"].shape == (4, 1, int(mask.sum()))
        assert torch.equal(packed["position_ids"][1:, 0], batch["position_ids"][:, mask])


@families
@modalities
@pytest.mark.parametrize("pool_template", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_vectors_are_the_padded_ones(family_folder, items, model_type, modality, pool_template, attention):
    lvlm = load_lvlm(
        family_folder(model_type), quantization="none", dtype=torch.float32, device="cpu", attention=attention
    )
    batch = collated(lvlm, items, modality, PromptConfig(pool_template=pool_template))
    if modality == "text" or model_type.startswith("qwen"):
        assert not batch["attention_mask"].all()
    with torch.no_grad():
        padded = encode(lvlm, batch, modality)
        if modality not in lvlm.family.packs:
            with pytest.raises(ValueError, match="cannot pack image sequences"):
                encode(lvlm, batch, modality, packed=True)
            return
        packed = encode(lvlm, batch, modality, packed=True)
        alone = torch.cat(
            [
                encode(lvlm, collated(lvlm, [item], modality, PromptConfig(pool_template=pool_template)), modality)
                for item in items
            ]
        )
    # Sums of float32 numbers of size 1 in another order; the same bound as between batches.
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=5e-6)


@families
@modalities
def test_packed_gradients_are_the_padded_ones(family_folder, items, model_type, modality):
    import sda_fast

    lvlm = load_lvlm(family_folder(model_type), quantization="none", dtype=torch.float32, device="cpu")
    if modality not in lvlm.family.packs:
        return
    config = sda_fast.MoDAConfig(r=4, num_experts=2, lora_dropout=0.0, target_modules=lvlm.family.target_modules)
    sda_fast.adapt_model(lvlm.model, config)
    parameters = {name: one for name, one in lvlm.model.named_parameters() if one.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = collated(lvlm, items, modality)
    gradients = []
    for packed in (False, True):
        vectors = encode(lvlm, batch, modality, packed=packed)
        weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad((vectors * weights).sum(), list(parameters.values()), allow_unused=True))
    assert any(one is not None and bool(one.any()) for one in gradients[0])
    for padded, packed in zip(*gradients, strict=True):
        if padded is None:
            assert packed is None
            continue
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5 * float(padded.abs().max()))


def test_a_row_is_pooled_by_sequence_over_the_mask_in_float32():
    hidden_states = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1]]).bool()
    lengths = torch.tensor([3, 1, 5])
    rows = hidden_states[0].double()
    expected = torch.stack([rows[:2].mean(0), rows[3], rows[5:].mean(0)])
    pooled = pool_packed(hidden_states, mask, lengths)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)


def test_without_flash_attention_auto_pads_and_on_packs_with_a_warning(loaded, caplog):
    lvlm, mllama = loaded("qwen2_5_vl"), loaded("mllama")
    assert packed_modalities("auto", lvlm) == packed_modalities("off", lvlm) == ()
    assert "packing without flash attention" not in caplog.text
    assert packed_modalities("on", lvlm) == ("image", "text") and packed_modalities("on", mllama) == ("text",)
    assert "packing without flash attention" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "device", "dtype", "installed", "expected"),
    [
        ("qwen2_5_vl", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("qwen3_vl", "cuda", torch.float16, True, "flash_attention_2"),
        ("qwen2_5_vl", "cuda", torch.bfloat16, False, None),
        ("qwen2_5_vl", "cuda", torch.float32, True, None),
        ("qwen2_5_vl", "cpu", torch.bfloat16, True, None),
        ("mllama", "cuda", torch.bfloat16, True, None),
        ("gemma3", "cuda", torch.bfloat16, True, None),
    ],
)
def test_flash_attention_is_chosen_where_it_fits(loaded, monkeypatch, model_type, device, dtype, installed, expected):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    config = loaded(model_type).model.config
    assert attention_for("auto", config, torch.device(device), dtype) == expected
    assert attention_for("off", config, torch.device(device), dtype) is None
    with pytest.raises(ValueError, match="auto, on or off, got 'yes'"):
        attention_for("yes", config, torch.device(device), dtype)


def test_flash_attention_gets_restarting_positions_and_no_mask(loaded, items, monkeypatch):
    """transformers cuts a packed row at the zeros of the positions that every attention layer is handed."""
    from transformers import AttentionInterface
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    lvlm = loaded("qwen2_5_vl")
    batch = collate_images(lvlm, items)
    seen = []

    def watched(module, query, key, value, attention_mask, **options):
        seen.append((attention_mask, options.get("position_ids")))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("flash_attention_2_watched", watched)
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionMaskInterface.register("flash_attention_2_watched", flash_attention_mask)
    config = lvlm.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2_watched"
    try:
        with torch.no_grad():
            encode(lvlm, batch, "image", packed=True)
    finally:
        config._attn_implementation = before
    lengths = batch["attention_mask"].sum(1)
    assert len(seen) == config.num_hidden_layers
    for mask, positions in seen:
        assert mask is None and _is_packed_sequence(positions, 1)
        (cumulative, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
        assert cumulative.tolist() == [0, *lengths.cumsum(0).tolist()] and longest == lengths.max()
