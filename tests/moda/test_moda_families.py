"""adapt_model on the real classes of transformers, built small from configuration on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sda_fast import MoDAConfig, adapt_model, modality
from sda_fast.moda import adapted
from sda_fast.moda.inject import moda_parameters, named_moda_layers

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
# Three sections of a head of 8: time, height and width.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
FAMILIES = {
    "Qwen2VL": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
    },
    "Qwen2_5_VL": {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN_VISION},
    "Qwen3VL": {"text_config": {**TEXT, **MROPE, "head_dim": 8}, "vision_config": QWEN_VISION},
    "Gemma3": {
        "text_config": {**TEXT, "head_dim": 8},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "Mllama": {
        "text_config": {
            **TEXT,
            "pad_token_id": 0,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default"},
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
    },
    "Llama": TEXT,
}
PARTS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def model_of(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    kind = "CausalLM" if family == "Llama" else "ConditionalGeneration"
    return getattr(transformers, f"{family}For{kind}")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_adapted_whole_with_its_groups_and_nothing_else(family: str) -> None:
    with torch.device("meta"):
        model = model_of(family)
    names = adapt_model(model, MoDAConfig())
    layers = [0, 2] if family == "Mllama" else [0, 1, 2]
    inside = "model.layers" if family == "Llama" else "model.language_model.layers"
    assert names == [f"{inside}.{index}.{part}" for index in layers for part in PARTS]
    assert [name for name, _ in named_moda_layers(model)] == names
    grouped = {
        key for module in model.modules() for key in module._forward_pre_hooks if str(key).startswith("sda_fast ")
    }
    assert grouped == {"sda_fast q_proj k_proj v_proj", "sda_fast gate_proj up_proj"}
    attention = model.get_submodule(f"{inside}.0.self_attn")
    assert "sda_fast q_proj k_proj v_proj" in attention._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_layer_computes_its_groups_once_and_gives_what_its_layers_give_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = model_of(family).eval()
    adapt_model(model, MoDAConfig(r=4, num_experts=2))
    for _, layer in named_moda_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    served: list[int] = []
    original = adapted.moda_linear_group

    def counted(x: Tensor, weights: list[Tensor], *others: Any, **options: Any) -> list[Tensor]:
        served.append(len(weights))
        return original(x, weights, *others, **options)

    def results() -> list[Tensor]:
        served.clear()
        with modality("image"):
            logits = model(input_ids=torch.arange(1, 11).view(2, 5)).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), moda_parameters(model))]

    monkeypatch.setattr(adapted, "moda_linear_group", counted)
    together = results()
    # Without a picture Mllama passes its cross-attention layer by.
    layers = 2 if family == "Mllama" else 3
    assert served == [3, 1, 2, 1] * layers
    for module in model.modules():
        for key in [key for key in module._forward_pre_hooks if str(key).startswith("sda_fast ")]:
            del module._forward_pre_hooks[key]
    alone = results()
    assert served == [1] * 7 * layers
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected)
