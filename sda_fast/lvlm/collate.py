"""Items in, one batch of one modality out: chat template, tokens padded on the left, pixels, positions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from sda_fast.data.images import load_image
from sda_fast.data.items import Item
from sda_fast.lvlm.family import SEQUENCE_ENTRIES, image_token_id
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig, attribute_text, image_messages, text_messages

logger = logging.getLogger(__name__)

# Not whitespace, so that templates which trim the content keep it; of no meaning in any text.
_CONTENT = "\ue000"


@dataclass(frozen=True)
class ImageOptions:
    """Bounds on width x height of a picture, and the seed of the noise that replaces a missing or broken one."""

    min_pixels: int = 20 * 20
    max_pixels: int = 256 * 256
    noise_seed: int = 0


def collate_images(
    lvlm: LVLM,
    items: Sequence[Item],
    prompts: PromptConfig | None = None,
    image_options: ImageOptions | None = None,
    warnings: Counter[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The image sequences of a batch of items: picture and instruction line.

    Args:
        warnings: where given, counts the pictures that noise replaces by reason (sda_fast.data.load_image).

    Returns:
        On the CPU: input_ids, attention_mask [B, T] int64; position_ids [B, T] or [3, B, T]; pool_mask [B, T] bool,
        the tokens that the vector averages; is_noise [B] bool; shown_sizes [B, 2] int64, width and height; and what the
        family's processor makes of the pixels (pixel_values, image_grid_thw, ...).

    Raises:
        ValueError: no items.
    """
    prompts, options = prompts or PromptConfig(), image_options or ImageOptions()
    _check_not_empty(items)
    loaded = [
        load_image(
            item,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            seed=options.noise_seed,
            warnings=warnings,
        )
        for item in items
    ]
    batch = _process(lvlm, [image for image, _ in loaded], prompts, options)
    return _finish(lvlm, batch, prompts) | {
        "is_noise": torch.tensor([noise for _, noise in loaded]),
        "shown_sizes": torch.tensor([image.size for image, _ in loaded]),
    }


def collate_shown(
    lvlm: LVLM,
    sizes: Sequence[tuple[int, int]],
    prompts: PromptConfig | None = None,
    image_options: ImageOptions | None = None,
    known: dict[tuple[int, int], dict[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """What `collate_images` returns for pictures of these (width, height), without pixels and is_noise.

    A picture's sequence depends on its size alone, so no picture is needed where the tower's output is known.

    Args:
        known: sequences by size, taken from and added to, so that each size goes through the processor once.
    """
    prompts, options = prompts or PromptConfig(), image_options or ImageOptions()
    known = {} if known is None else known
    for size in set(sizes) - set(known):
        blank = _process(lvlm, [Image.new("RGB", size)], prompts, options)
        known[size] = {name: tensor for name, tensor in blank.items() if not name.startswith("pixel_")}
    longest = max(known[size]["input_ids"].shape[1] for size in sizes)
    batch = {}
    for name in known[sizes[0]]:
        fill = lvlm.tokenizer.pad_token_id if name == "input_ids" else 0
        batch[name] = torch.cat([_pad_left(known[size], name, longest, fill) for size in sizes])
    return _finish(lvlm, batch, prompts) | {"shown_sizes": torch.tensor(sizes)}


def collate_texts(lvlm: LVLM, items: Sequence[Item], prompts: PromptConfig | None = None) -> dict[str, torch.Tensor]:
    """The text sequences of a batch of items: their attributes.

    Returns:
        input_ids, attention_mask, position_ids and pool_mask as `collate_images`, on the CPU.

    Raises:
        ValueError: no items.
    """
    prompts = prompts or PromptConfig()
    _check_not_empty(items)
    texts = [plain_text(lvlm, attribute_text(item, prompts), prompts.max_text_tokens) for item in items]
    rendered = [render(lvlm, text_messages(text), prompts) for text in texts]
    batch = lvlm.tokenizer(
        rendered, padding=True, return_tensors="pt", add_special_tokens=_adds_special_tokens(lvlm, rendered[0])
    )
    return _finish(lvlm, {name: batch[name] for name in ("input_ids", "attention_mask")}, prompts)


def render(lvlm: LVLM, messages: list[dict[str, Any]], prompts: PromptConfig) -> str:
    """The chat as one string, by the model's own template."""
    return lvlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts.generation_prompt)


def plain_text(lvlm: LVLM, text: str, max_tokens: int | None) -> str:
    """`text` cut after `max_tokens` tokens, with the spelling of special tokens in it broken by a space.

    An attribute that spells "<|image_pad|>" would otherwise ask for an image, and one with "<|im_end|>" end the turn.
    """
    for token in lvlm.tokenizer.all_special_tokens:
        if token in text:
            logger.warning("an attribute text spells the special token %s; it is taken as plain text", token)
            text = text.replace(token, f"{token[0]} {token[1:]}")
    if max_tokens is None:
        return text
    offsets = lvlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]]


def _process(
    lvlm: LVLM, pictures: Sequence[Image.Image], prompts: PromptConfig, options: ImageOptions
) -> dict[str, torch.Tensor]:
    """The family's processor on pictures and the instruction line."""
    rendered = render(lvlm, image_messages(prompts.image_instruction), prompts)
    return dict(
        lvlm.processor(
            text=[rendered] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            return_tensors="pt",
            add_special_tokens=_adds_special_tokens(lvlm, rendered),
            **lvlm.family.image_options(lvlm.processor, options.min_pixels, options.max_pixels),
        )
    )


def _pad_left(sequence: dict[str, torch.Tensor], name: str, length: int, fill: int) -> torch.Tensor:
    """One sequence's tensor, with `fill` before it up to `length` tokens where it goes along the tokens."""
    tensor, tokens = sequence[name], sequence["input_ids"].shape[1]
    if name not in SEQUENCE_ENTRIES or tokens == length:
        return tensor
    return torch.cat([tensor.new_full((1, length - tokens, *tensor.shape[2:]), fill), tensor], dim=1)


def _check_not_empty(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("expected at least one item, got none")


def _adds_special_tokens(lvlm: LVLM, rendered: str) -> bool:
    """Whether the tokenizer must add the start token: not where the chat template has written it."""
    start = lvlm.tokenizer.bos_token
    return start is not None and not rendered.startswith(start)


def _finish(lvlm: LVLM, batch: dict[str, torch.Tensor], prompts: PromptConfig) -> dict[str, torch.Tensor]:
    batch["position_ids"] = lvlm.family.position_ids(lvlm.model, batch)
    batch["pool_mask"] = batch["attention_mask"].bool()
    if not prompts.pool_template:
        batch["pool_mask"] = _content_mask(lvlm, batch, prompts)
    return batch


def _content_mask(lvlm: LVLM, batch: dict[str, torch.Tensor], prompts: PromptConfig) -> torch.Tensor:
    """[B, T] bool: unmasked tokens that are not the template's; where none is left (empty text), all unmasked ones."""
    prefix, suffix = render(lvlm, text_messages(_CONTENT), prompts).split(_CONTENT)
    specials = _adds_special_tokens(lvlm, prefix)
    num_prefix = len(lvlm.tokenizer(prefix, add_special_tokens=specials)["input_ids"])
    num_suffix = len(lvlm.tokenizer(suffix, add_special_tokens=False)["input_ids"])
    mask, input_ids = batch["attention_mask"].bool(), batch["input_ids"]
    place = mask.long().cumsum(-1)
    image_token = image_token_id(lvlm.model.config)
    special_ids = torch.tensor([token for token in lvlm.tokenizer.all_special_ids if token != image_token])
    content = mask & (place > num_prefix) & (place <= place[:, -1:] - num_suffix) & ~torch.isin(input_ids, special_ids)
    return torch.where(content.any(-1, keepdim=True), content, mask)
