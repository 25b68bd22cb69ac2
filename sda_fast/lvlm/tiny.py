"""A small model of the real Qwen2.5-VL classes, so that every job runs on any machine without a download."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sda_fast.data.items import Catalogue, read_items
from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM, transformers_bars
from sda_fast.lvlm.pretraining import PretrainingLosses, pretrain
from sda_fast.lvlm.processor import prepare_tokenizer, without_video
from sda_fast.lvlm.prompts import PromptConfig, attribute_text

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
{parameters:,} parameters, random at first. {training}

It exists so that sda-fast can be tried and tested without a download and without a GPU. It contains no weights of
Qwen2.5-VL and knows nothing beyond the catalogue it was built for.
"""
PRETRAINING_LINES = """\
It was then trained for {steps} steps ({seconds} s) to write the attributes of {items} items
of one catalogue under their pictures and to continue their texts. Next-token loss in nats, mean over the first and last
tenth of the steps: captions {caption_first:.2f} -> {caption_last:.2f}, texts {text_first:.2f} -> {text_last:.2f}."""


@dataclass
class TinyConfig:
    """What `build_tiny` needs."""

    items: Path = field(metadata={"help": "catalogue that trains the model: items.jsonl or items.jsonl.gz"})
    output: Path = field(metadata={"help": "folder to write; must not exist or be empty"})
    images: Path | None = field(default=None, metadata={"help": "where image paths start; default: beside the items"})
    seed: int = field(default=0, metadata={"help": "seed of weights and batches"})
    pretrain_steps: int = field(default=300, metadata={"help": "captioning steps; 0 leaves the model random"})
    hidden_size: int = field(default=128, metadata={"help": "width of the decoder, a multiple of 64"})
    num_layers: int = field(default=4, metadata={"help": "decoder layers"})
    image_side: int = field(default=84, metadata={"help": "pictures are scaled to this square area; multiple of 28"})


def build_tiny(config: TinyConfig) -> Path:
    """`build_tiny_lvlm` on the catalogue that the configuration names."""
    return build_tiny_lvlm(
        read_items(config.items, config.images),
        config.output,
        seed=config.seed,
        pretrain_steps=config.pretrain_steps,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        image_side=config.image_side,
    )


def build_tiny_lvlm(
    catalogue: Catalogue,
    folder: str | Path,
    *,
    seed: int = 0,
    pretrain_steps: int = 300,
    pretrain_items: int = 1024,
    batch_size: int = 24,
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
        hidden_size: of the decoder, a multiple of 64, so that blocks of NF4 end with the rows.
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
    with transformers_bars(shown=False):
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
        "initializer_range": hidden_size**-0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "fullatt_block_indexes": [0, 1],
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


def _write_card(folder: Path, model: Any, losses: PretrainingLosses, num_items: int, seconds: float) -> None:
    summary = {
        "items": num_items,
        "steps": len(losses.caption),
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "caption_first": _mean_of_tenth(losses.caption, last=False),
        "caption_last": _mean_of_tenth(losses.caption, last=True),
        "text_first": _mean_of_tenth(losses.text, last=False),
        "text_last": _mean_of_tenth(losses.text, last=True),
    }
    (folder / "README.md").write_text(_model_card(summary), encoding="utf-8")
    curves = {"caption_losses": losses.caption, "text_losses": losses.text}
    (folder / "pretraining.json").write_text(json.dumps(summary | curves, indent=1), encoding="utf-8")
    logger.info("tiny model in %s: %s", folder.name, summary)


def _mean_of_tenth(values: Sequence[float], *, last: bool) -> float | None:
    """Mean of the first or last tenth of the values, at least one; None of none."""
    count = math.ceil(len(values) / 10)
    return statistics.fmean(values[-count:] if last else values[:count]) if values else None


def _model_card(summary: dict[str, Any]) -> str:
    training = "It was not trained." if not summary["steps"] else PRETRAINING_LINES.format(**summary)
    return MODEL_CARD.format(parameters=summary["parameters"], training=training)
