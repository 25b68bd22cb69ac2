"""Qwen3-VL: as Qwen2.5-VL, and features of three depths of the tower are added to the first decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sda_fast.lvlm.family import Family, ImageFeatures, flat_features, image_token_mask
from sda_fast.lvlm.qwen2_vl import Qwen2VLFamily

DEPTH = "deepstack_"


@dataclass(frozen=True)
class Qwen3VLFamily(Qwen2VLFamily):
    """Image features are `features`, the decoder's input, and `deepstack_0`, `deepstack_1`, ..."""

    name: str = "Qwen3-VL"
    model_types: tuple[str, ...] = ("qwen3_vl",)

    def image_features(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[ImageFeatures]:
        with self.tower_attention(model):
            output = self.base_model(model).get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        depths = {f"{DEPTH}{depth}": flat_features(one) for depth, one in enumerate(output.deepstack_features)}
        return self.by_sequence(model, batch, features=flat_features(output.pooler_output), **depths)

    def last_hidden_state(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        image_features: Sequence[ImageFeatures] | None,
    ) -> torch.Tensor:
        deepstack: dict[str, Any] = {}
        if image_features is not None:
            names = sorted((name for name in image_features[0] if name.startswith(DEPTH)), key=_depth)
            deepstack["visual_pos_masks"] = image_token_mask(model, batch["input_ids"])
            deepstack["deepstack_visual_embeds"] = [torch.cat([one[name] for one in image_features]) for name in names]
        output = self.decoder(model)(
            inputs_embeds=self.embed(model, batch["input_ids"], image_features),
            attention_mask=batch.get("attention_mask"),
            position_ids=batch["position_ids"],
            use_cache=False,
            **deepstack,
        )
        return output.last_hidden_state


def _depth(name: str) -> int:
    return int(name.removeprefix(DEPTH))


def family_for(config: Any) -> Family:
    return Qwen3VLFamily()
