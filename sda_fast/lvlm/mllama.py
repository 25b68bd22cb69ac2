"""Mllama (Llama-3.2-Vision): the image enters through cross-attention layers, not through tokens of the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sda_fast.lvlm.family import Family, ImageFeatures


@dataclass(frozen=True)
class MllamaFamily(Family):
    """Cross-attention layers are quantised with the decoder but get no adapters (DESIGN.md section 2).

    Pictures are laid on tiles of the tower's size by the processor; within 256 x 256 pixels they take one or two. The
    features of the empty tiles count: tokens before the picture attend to all tiles. Only text is packed, because a
    packed row would attend to the pictures of all its items and mask them.
    """

    name: str = "Mllama (Llama-3.2-Vision)"
    model_types: tuple[str, ...] = ("mllama",)
    packs: tuple[str, ...] = ("text",)
    flash_attention: bool = False
    not_quantized: tuple[str, ...] = (r"(?:.*\.)?vision_model", r"(?:.*\.)?multi_modal_projector", r"(?:.*\.)?lm_head")

    def image_features(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[ImageFeatures]:
        """Per sequence {"features": [tiles, tokens of a tile, D]}."""
        base = self.base_model(model)
        tower = base.vision_model(
            pixel_values=batch["pixel_values"],
            aspect_ratio_ids=batch["aspect_ratio_ids"],
            aspect_ratio_mask=batch["aspect_ratio_mask"],
        )
        features = base.multi_modal_projector(tower.last_hidden_state)
        return [{"features": one.flatten(0, -3)} for one in features]

    def last_hidden_state(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        image_features: Sequence[ImageFeatures] | None,
    ) -> torch.Tensor:
        image: dict[str, torch.Tensor] = {}
        if image_features is not None:
            image["cross_attention_states"] = torch.cat([one["features"] for one in image_features])
            image["cross_attention_mask"] = batch["cross_attention_mask"]
        base = self.base_model(model)
        output = base(
            inputs_embeds=base.get_input_embeddings()(batch["input_ids"]),
            attention_mask=batch.get("attention_mask"),
            position_ids=batch["position_ids"],
            use_cache=False,
            **image,
        )
        return output.last_hidden_state


def family_for(config: Any) -> Family:
    """The adapted layers are the configuration's self-attention layers."""
    text = config.text_config
    layers = [str(layer) for layer in range(text.num_hidden_layers) if layer not in text.cross_attention_layers]
    target_modules = rf"(?:.*\.)?language_model\.layers\.(?:{'|'.join(layers)})\.(?:self_attn|mlp)\.\w+_proj"
    return MllamaFamily(target_modules=target_modules)
