"""adapt_model on the real classes of transformers, built small from configuration on the meta device."""

from __future__ import annotations

import pytest
import torch
import transformers

from sda_fast import MoDAConfig, adapt_model
from sda_fast.moda import adapted
from sda_fast.moda.inject import named_moda_layers

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
FAMILIES = {
    "Qwen2VL": {"text_config": TEXT, "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}},
    "Qwen2_5_VL": {"text_config": TEXT, "vision_config": QWEN_VISION},
    "Qwen3VL": {"text_config": {**TEXT, "head_dim": 8}, "vision_config": QWEN_VISION},
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_adapted_whole_with_its_groups_and_nothing_else(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    kind = "CausalLM" if family == "Llama" else "ConditionalGeneration"
    with torch.device("meta"):
        model = getattr(transformers, f"{family}For{kind}")(config)
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


def test_a_decoder_layer_computes_its_groups_once_and_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    tokens = torch.randint(0, 64, (2, 5))
    expected = model(tokens).logits
    adapt_model(model, MoDAConfig())
    served: list[int] = []
    from sda_fast import modality

    original = adapted.moda_linear_group

    def counted(x: torch.Tensor, weights: list[torch.Tensor], *others: object, **options: object) -> list[torch.Tensor]:
        served.append(len(weights))
        return original(x, weights, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapted, "moda_linear_group", counted)
    with modality("image"), torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected)
    assert served == [3, 1, 2, 1] * 3
