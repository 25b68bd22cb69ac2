"""Pooling, the reduction to buckets, and encode's checks."""

import pytest
import torch

from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode, mean_pool, reduce_buckets


def test_mean_pool_averages_unmasked_tokens_in_float32():
    hidden_states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]])
    hidden_states[0, 0] = float("nan")
    expected = torch.stack([rows[keep].double().mean(0) for rows, keep in zip(hidden_states, mask.bool(), strict=True)])
    pooled = mean_pool(hidden_states, mask)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)


def test_buckets_of_3584_dimensions_are_256_of_four_and_512_of_five():
    vectors = torch.randn(2, 3584, dtype=torch.float64)
    expected = torch.cat(
        [vectors[:, :1024].reshape(2, 256, 4).mean(-1), vectors[:, 1024:].reshape(2, 512, 5).mean(-1)], dim=-1
    )
    torch.testing.assert_close(reduce_buckets(vectors, 768), expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [769, 1000, 1536, 2048, 4096])
def test_buckets_of_any_width_partition_the_dimensions_in_order(width):
    ramp = torch.arange(width, dtype=torch.float64)
    reduced = reduce_buckets(ramp, 768)
    assert reduced.shape == (768,) and (reduced.diff() > 0).all()
    lengths = torch.full((768,), width // 768)
    lengths[768 - width % 768 :] += 1 if width % 768 else 0
    torch.testing.assert_close((reduced * lengths).sum(), ramp.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [1, 64, 768])
def test_short_vectors_are_not_reduced(width):
    vectors = torch.randn(2, width)
    assert reduce_buckets(vectors, 768) is vectors


def test_encode_refuses_a_batch_of_the_other_modality(loaded, items):
    lvlm = loaded("qwen2_5_vl")
    with pytest.raises(ValueError, match="modality 'text' was given a batch of"):
        encode(lvlm, collate_images(lvlm, items[:1]), "text")
    with pytest.raises(ValueError, match="modality 'image' was given a batch of"):
        encode(lvlm, collate_texts(lvlm, items[:1]), "image")
    with pytest.raises(ValueError, match="'video'"):
        encode(lvlm, collate_texts(lvlm, items[:1]), "video")


def test_encode_refuses_features_of_another_number_of_sequences(loaded, items):
    lvlm = loaded("qwen2_5_vl")
    with pytest.raises(ValueError, match="0 image features for 1 sequences"):
        encode(lvlm, collate_images(lvlm, items[:1]), "image", image_features=[])


def test_the_modality_inside_encode_is_the_one_named(loaded, items):
    from sda_fast.moda.context import current_modality

    lvlm = loaded("qwen2_5_vl")
    seen = []
    layer = lvlm.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(current_modality().value))
    with torch.no_grad():
        encode(lvlm, collate_images(lvlm, items[:1]), "image")
        encode(lvlm, collate_texts(lvlm, items[:1]), "text")
    handle.remove()
    assert seen == ["image", "text"]
