"""A small model of the real Qwen2.5-VL classes, so that every job runs on any machine without a download."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sda_fast.data.items import Catalogue, Item
from sda_fast.lvlm.collate import ImageOptions, collate_images, plain_text, render
from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.processor import prepare_tokenizer, without_video
from sda_fast.lvlm.prompts import PromptConfig, attribute_text, text_messages

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
MODEL_CARD = """\
# A tiny stand-in for Qwen2.5-VL

Built by `sda_fast.lvlm.tiny.build_tiny_lvlm` from configuration: the classes and the file layout of Qwen2.5-VL, but
{parameters:,} parameters, random at first and then trained for {steps} steps ({seconds:.0f} s) to caption the pictures
and continue the texts of one catalogue of {items} items. Mean next-token loss of the first and last steps: captions
{caption_first:.2f} -> {caption_last:.2f}, texts {text_first:.2f} -> {text_last:.2f} nats.

It exists so that sda-fast can be tried and tested without a download and without a GPU. It knows nothing beyond that
catalogue. It contains no weights of Qwen2.5-VL.
"""


def build_tiny_lvlm(
    catalogue: Catalogue,
    folder: str | Path,
    *,
    seed: int = 0,
    pretrain_steps: int = 300,
    pretrain_items: int = 1024,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    hidden_size: int = 128,
    num_layers: int = 4,
    image_side: int = 84,
    vocab_size: int = 2048,
    prompts: PromptConfig | None = None,
) -> Path:
    """Build, pre-train on the catalogue and save a tiny Qwen2.5-VL that `load_lvlm(folder)` loads.

    Args:
        catalogue: trains the tokenizer and the model.
        folder: to write; must not exist or be empty.
        pretrain_steps: of `batch_size` captions and as many texts each; 0 leaves the model random.
        pretrain_items: at most so many items, drawn with the seed, are used for pre-training.
        hidden_size: of decoder and tower, a multiple of 64, so that blocks of NF4 end with the rows.
        image_side: pictures are scaled to about image_side x image_side pixels, a multiple of 28.
        vocab_size: upper bound, special tokens included.

    Returns:
        `folder`. Beside the model it holds README.md and pretraining.json (settings and every step's losses).

    Raises:
        ValueError: hidden_size or image_side is no such multiple.
        FileExistsError: the folder is not empty.
    """
    if hidden_size < 64 or hidden_size % 64:
        raise ValueError(f"hidden_size must be a multiple of 64, got {hidden_size}")
    if image_side < 28 or image_side % 28:
        raise ValueError(f"image_side must be a multiple of 28, got {image_side}")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    prompts = prompts or PromptConfig()
    started = time.monotonic()
    processor = build_processor(catalogue, prompts, vocab_size=vocab_size, image_side=image_side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(processor.tokenizer, hidden_size=hidden_size, num_layers=num_layers)
        lvlm = LVLM(model, processor, family_of(model.config), str(folder))
        items = [catalogue[i] for i in torch.randperm(len(catalogue))[:pretrain_items].tolist()]
        losses = pretrain(
            lvlm, items, prompts, steps=pretrain_steps, batch_size=batch_size, learning_rate=learning_rate
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    processor.save_pretrained(partial)
    _write_card(partial, model, losses, len(items), time.monotonic() - started)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return folder


def build_processor(catalogue: Catalogue, prompts: PromptConfig, *, vocab_size: int, image_side: int) -> Any:
    """The real Qwen2.5-VL processor on PIL images, with a byte-level BPE tokenizer trained on the catalogue's texts."""
    from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def texts() -> Iterator[str]:
        for item in catalogue:
            yield attribute_text(item, prompts)
            yield f"user\n{prompts.image_instruction}assistant\n"

    blank = Qwen2Tokenizer(extra_special_tokens=list(SPECIAL_TOKENS))
    tokenizer = blank.train_new_from_iterator(texts(), vocab_size, show_progress=False)
    prepare_tokenizer(tokenizer)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=image_side * image_side)
    return without_video(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Any, *, hidden_size: int, num_layers: int) -> Any:
    """Qwen2_5_VLForConditionalGeneration with random weights in float32, its token ids taken from the tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    num_heads = hidden_size // 32
    token_id = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": 64 * math.ceil(len(tokenizer) / 64),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 3,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": num_heads,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [2],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).float()


@dataclass(frozen=True)
class PretrainingLosses:
    """Mean next-token losses in nats, one entry per step."""

    caption: list[float]
    text: list[float]


def pretrain(
    lvlm: LVLM, items: Sequence[Item], prompts: PromptConfig, *, steps: int, batch_size: int, learning_rate: float
) -> PretrainingLosses:
    """Train the whole model, in place, to write an item's attributes under its picture and to continue its text."""
    examples = [_example(lvlm, item, prompts) for item in (items if steps else [])]
    model = lvlm.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    losses = PretrainingLosses([], [])
    order: list[int] = []
    progress = tqdm(range(steps), desc="Pre-training the tiny model", disable=not steps)
    for _ in progress:
        while len(order) < batch_size:
            order += torch.randperm(len(examples)).tolist()
        chosen, order = [examples[i] for i in order[:batch_size]], order[batch_size:]
        caption_loss = _next_token_loss(lvlm, [e.caption for e in chosen], [e.image for e in chosen])
        text_loss = _next_token_loss(lvlm, [e.text for e in chosen], None)
        optimizer.zero_grad()
        (caption_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.caption.append(float(caption_loss.detach()))
        losses.text.append(float(text_loss.detach()))
        progress.set_postfix(caption=f"{losses.caption[-1]:.2f}", text=f"{losses.text[-1]:.2f}")
    return losses


@dataclass(frozen=True)
class _Sequence:
    input_ids: torch.Tensor  # [T]
    first_target: int  # the loss starts at this token


@dataclass(frozen=True)
class _Example:
    image: dict[str, torch.Tensor]
    caption: _Sequence
    text: _Sequence


def _example(lvlm: LVLM, item: Item, prompts: PromptConfig) -> _Example:
    batch = collate_images(lvlm, [item], prompts, ImageOptions())
    text = plain_text(lvlm, attribute_text(item, prompts), prompts.max_text_tokens)
    caption = lvlm.tokenizer(text + "<|im_end|>\n", return_tensors="pt")["input_ids"][0]
    prompt = batch["input_ids"][0]
    chat = lvlm.tokenizer(render(lvlm, text_messages(text), prompts), return_tensors="pt")["input_ids"][0]
    image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    return _Example(image, _Sequence(torch.cat([prompt, caption]), len(prompt)), _Sequence(chat, 1))


def _next_token_loss(
    lvlm: LVLM, sequences: Sequence[_Sequence], images: Sequence[dict[str, torch.Tensor]] | None
) -> torch.Tensor:
    length = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), length), lvlm.tokenizer.pad_token_id)
    attention_mask, is_target = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        end = len(sequence.input_ids)
        input_ids[row, :end] = sequence.input_ids
        attention_mask[row, :end] = 1
        is_target[row, sequence.first_target : end] = True
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    features = None
    if images is not None:
        batch |= {name: torch.cat([image[name] for image in images]) for name in images[0]}
        batch["mm_token_type_ids"] = (input_ids == lvlm.model.config.image_token_id).int()
        features = lvlm.family.image_features(lvlm.model, batch)
    batch["position_ids"] = lvlm.family.position_ids(lvlm.model, batch)
    hidden_states = lvlm.family.last_hidden_state(lvlm.model, batch, features)
    logits = lvlm.model.lm_head(hidden_states[:, :-1][is_target[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, input_ids[:, 1:][is_target[:, 1:]])


def _write_card(folder: Path, model: Any, losses: PretrainingLosses, num_items: int, seconds: float) -> None:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    edge = max(1, len(losses.caption) // 20)
    summary = {
        "items": num_items,
        "steps": len(losses.caption),
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "caption_first": mean(losses.caption[:edge]),
        "caption_last": mean(losses.caption[-edge:]),
        "text_first": mean(losses.text[:edge]),
        "text_last": mean(losses.text[-edge:]),
    }
    (folder / "README.md").write_text(MODEL_CARD.format(**summary), encoding="utf-8")
    curves = {"caption_losses": losses.caption, "text_losses": losses.text}
    (folder / "pretraining.json").write_text(json.dumps(summary | curves, indent=1), encoding="utf-8")
    logger.info(
        "tiny model: %d parameters, %d steps in %.0f s, caption loss %.2f -> %.2f, text loss %.2f -> %.2f",
        *(summary[name] for name in ("parameters", "steps", "seconds", "caption_first", "caption_last", "text_first")),
        summary["text_last"],
    )
