"""Gemma 3: fixed 256 tokens per image, which attend to each other in both directions.

Chosen beside the larger families because its 4B model is what people run on small cards: about 3 GB in 4-bit. SmolVLM,
smaller still, is a plain decoder that the generic path covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sda_fast.lvlm.family import Family


@dataclass(frozen=True)
class Gemma3Family(Family):
    """The two-way attention is the base model's own mask, made from token_type_ids; the picture's size is fixed."""

    name: str = "Gemma 3"
    model_types: tuple[str, ...] = ("gemma3",)
    flash_attention: bool = False


def family_for(config: Any) -> Family:
    return Gemma3Family()
