"""Every family through the jobs that users start: fine-tune, embed with the adapter, in 16-bit and 4-bit."""

import math

import numpy as np
import pytest

from sda_fast.data.items import write_items
from sda_fast.data.vectors import read_item_vectors
from sda_fast.embed import EmbedConfig, embed
from sda_fast.train import FinetuneConfig, finetune

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_is_trained_and_changes_the_vectors(family_folder, catalogue, tmp_path, model_type, quantization):
    write_items(catalogue, tmp_path / "items.jsonl")
    common = {
        "model": str(family_folder(model_type)), "items": tmp_path / "items.jsonl", "quantization": quantization,
        "precision": "bf16", "device": "cpu", "progress": False,
    }  # fmt: skip
    result = finetune(
        FinetuneConfig(
            output=tmp_path / "run", batch_size=5, steps=3, chunk_size=2, learning_rate=1e-2, temperature=1.0, **common
        )
    )
    assert len(result.losses) == 3 and all(math.isfinite(loss) for loss in result.losses)
    before, after = (
        read_item_vectors(embed(EmbedConfig(output=tmp_path / name, adapter=adapter, pca_dim=2, **common)))
        for name, adapter in (("before.safetensors", None), ("after.safetensors", result.adapter))
    )
    assert after.item_ids == catalogue.item_ids and after.vectors.shape == (len(catalogue), 4)
    for ours, theirs in ((after.image, before.image), (after.text, before.text)):
        assert ours.shape[1] == 64 and np.isfinite(ours).all()
        assert (abs(ours - theirs).max(axis=1) > 0).all()
