"""Qwen2-VL and Qwen2.5-VL: images of any size as grids of merged patches, three-axis rotary positions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sda_fast.lvlm.family import Family, ImageFeatures, accepted, sequence_positions
from sda_fast.lvlm.windows import windows_together


@dataclass(frozen=True)
class Qwen2VLFamily(Family):
    """The merger (projector) is part of `visual`."""

    name: str = "Qwen2-VL / Qwen2.5-VL"
    model_types: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")
    not_quantized: tuple[str, ...] = (r"(?:.*\.)?visual", r"(?:.*\.)?lm_head")

    def image_options(self, processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """The given bounds, or the processor's own upper bound where that is lower."""
        longest = min(max_pixels, processor.image_processor.size["longest_edge"])
        return {"size": {"shortest_edge": min(min_pixels, longest), "longest_edge": longest}}

    def tower_attention(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the tower attends to all its windows of one length at once."""
        return windows_together(self.base_model(model).visual.config)

    def image_features(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[ImageFeatures]:
        with self.tower_attention(model):
            return super().image_features(model, batch)

    def position_ids(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """M-RoPE positions [3, B, T] (time, height, width); the three are equal for text."""
        if "image_grid_thw" not in batch:
            return sequence_positions(batch["attention_mask"]).expand(3, -1, -1)
        rope_index = self.base_model(model).get_rope_index
        return rope_index(**accepted(rope_index, batch))[0]


def family_for(config: Any) -> Family:
    return Qwen2VLFamily()
