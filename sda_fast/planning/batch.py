"""Batches of the longest sequences: made by the model's own processor, or of the right shapes where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sda_fast.data.items import Item
from sda_fast.jobs.batches import BatchMaker, image_area
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.family import image_token_id
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig, attribute_text

# Assumed where there is no tokenizer.
CHARACTERS_PER_TOKEN = 4.0
TEMPLATE_TOKENS = 20
SAMPLED_ITEMS = 64


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence: of the longest text and picture, and their means as shares of these.

    Attributes:
        text, image: tokens of the longest sequences, the template's included; for models whose pictures enter beside
            the sequence, `image` counts the sequence alone.
        text_share, image_share: mean length over longest length.
        grid: merged patches of the largest picture in height and width.
        source: where the figures are from, for people.
    """

    text: int
    image: int
    text_share: float
    image_share: float
    grid: tuple[int, int]
    source: str


def estimated_lengths(
    config: Any,
    items: Sequence[Item],
    prompts: PromptConfig,
    options: ImageOptions,
    *,
    text_tokens: int | None,
    image_tokens: int | None,
) -> Lengths:
    """Lengths without a tokenizer: from the characters of the texts and the sizes of the pictures, or as given.

    Raises:
        ValueError: neither items nor text_tokens are given.
    """
    sources = []
    text_share = image_share = 1.0
    if text_tokens is not None:
        text = text_tokens
        sources.append("texts as given")
    elif items:
        counts = [text_length(item, prompts) for item in items]
        text = max(counts)
        text_share = sum(counts) / len(counts) / text
        sources.append(f"texts from {len(items)} items at {CHARACTERS_PER_TOKEN:g} characters a token")
    else:
        raise ValueError("give items, or text_tokens for the length of a text sequence")
    unit = patch_unit(config)
    if image_tokens is not None:
        grid = nearly_square(image_tokens)
        sources.append("pictures as given")
    else:
        areas = [image_area(item, options) for item in items] or [options.max_pixels]
        side = max(1, math.isqrt(max(areas)) // unit)
        grid = (side, side)
        image_share = sum(areas) / len(areas) / max(areas)
        sources.append("pictures from their sizes" if items else f"pictures of {options.max_pixels} pixels")
    instruction = math.ceil(len(prompts.image_instruction) / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS
    picture = 1 if config.model_type == "mllama" else grid[0] * grid[1]
    return Lengths(text, picture + instruction, text_share, image_share, grid, "; ".join(sources))


def text_length(item: Item, prompts: PromptConfig) -> int:
    """Tokens of an item's text sequence, estimated."""
    tokens = math.ceil(len(attribute_text(item, prompts)) / CHARACTERS_PER_TOKEN)
    return min(tokens, prompts.max_text_tokens or tokens) + TEMPLATE_TOKENS


def patch_unit(config: Any) -> int:
    """Pixels along the edge of what becomes one token."""
    vision = config.vision_config
    return vision.patch_size * getattr(vision, "spatial_merge_size", 1)


def nearly_square(count: int) -> tuple[int, int]:
    """Height and width with this product, as close to each other as can be."""
    height = next(edge for edge in range(math.isqrt(count), 0, -1) if count % edge == 0)
    return height, count // height


def synthetic_chunks(lvlm: LVLM, size: int, lengths: Lengths) -> dict[str, dict[str, Tensor]]:
    """Chunks as `collate_images` and `collate_texts` make them, for families whose pixels have a simple shape.

    Half of the sequences are one token shorter, so that the padding mask is made as with real batches.

    Raises:
        ValueError: the family needs its processor.
    """
    config = lvlm.model.config
    text = sequences(size, lengths.text)
    image = sequences(size, lengths.image)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        vision = config.vision_config
        merge = vision.spatial_merge_size
        height, width = lengths.grid[0] * merge, lengths.grid[1] * merge
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        values = channels * vision.temporal_patch_size * vision.patch_size**2
        image["pixel_values"] = torch.empty(size * height * width, values)
        image["image_grid_thw"] = torch.tensor([[1, height, width]] * size)
        first = lengths.image - lengths.grid[0] * lengths.grid[1]
        image["input_ids"][:, first:] = image_token_id(config)
        image["mm_token_type_ids"] = (image["input_ids"] == image_token_id(config)).long()
    elif config.model_type == "mllama":
        vision = config.vision_config
        tiles, side = vision.max_num_tiles, vision.image_size
        image["pixel_values"] = torch.empty(size, 1, tiles, 3, side, side)
        image["aspect_ratio_ids"] = torch.ones(size, 1, dtype=torch.int64)
        image["aspect_ratio_mask"] = torch.tensor([[[1] + [0] * (tiles - 1)]] * size)
        image["cross_attention_mask"] = torch.zeros(size, lengths.image, 1, tiles, dtype=torch.int64)
        image["cross_attention_mask"][..., 0] = 1
    else:
        raise ValueError(f"{config.model_type} needs a processor to plan for; give a folder that holds one")
    return {"image": finished(lvlm, image), "text": finished(lvlm, text)}


def sequences(size: int, length: int) -> dict[str, Tensor]:
    """Token ids 1, padded on the left by one token in every other sequence."""
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[1::2, 0] = 0
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def finished(lvlm: LVLM, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {
        "position_ids": lvlm.family.position_ids(lvlm.model, tensors),
        "pool_mask": tensors["attention_mask"].bool(),
    }


def longest_chunks(maker: BatchMaker, items: Sequence[Item], size: int) -> dict[str, dict[str, Tensor]]:
    """The longest pictures and texts of a catalogue by the model's own processor; few items are repeated."""
    by_area = sorted(items, key=lambda item: -image_area(item, maker.image_options))
    by_length = sorted(items, key=lambda item: -len(attribute_text(item, maker.prompts)))
    return {
        "image": maker.image_chunk([by_area[place % len(items)] for place in range(size)]).tensors,
        "text": maker.text_chunk([by_length[place % len(items)] for place in range(size)]).tensors,
    }


def tokenized_lengths(maker: BatchMaker, items: Sequence[Item]) -> Lengths:
    """Lengths by the model's own tokenizer and processor: the longest, and the mean of a sample."""
    longest = longest_chunks(maker, items, 1)
    stride = max(1, len(items) // SAMPLED_ITEMS)
    sample = items[::stride]
    text, image = (int(longest[name]["attention_mask"].sum()) for name in ("text", "image"))
    texts = maker.text_chunk(sample).tensors["attention_mask"].sum(1).float().mean()
    areas = [image_area(item, maker.image_options) for item in items]
    share = sum(areas) / len(areas) / max(areas)
    return Lengths(text, image, float(texts) / text, share, (0, 0), f"the model's processor on {len(items)} items")
