"""Brief pre-training of the tiny model: attributes written under a picture, and texts continued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from sda_fast.data.items import Item
from sda_fast.lvlm.collate import collate_images, plain_text, render
from sda_fast.lvlm.encode import mean_pool
from sda_fast.lvlm.family import image_token_mask
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig, attribute_text, text_messages

MAX_CAPTION_TOKENS = 16
TEXT_EVERY = 4
WORD_WEIGHT = 0.5
RARE_WORD = 0.02


@dataclass(frozen=True)
class PretrainingLosses:
    """Mean next-token losses in nats, one entry per step with captions, with texts."""

    caption: list[float]
    text: list[float]


def pretrain(
    lvlm: LVLM, items: Sequence[Item], prompts: PromptConfig, *, steps: int, batch_size: int, learning_rate: float
) -> PretrainingLosses:
    """Train the whole model, in place, to write an item's attributes under its picture and to continue its text.

    A caption is one attribute, drawn at random: in a whole text most tokens follow from the ones before, and the
    picture would hardly matter. To find the picture at all within a minute, the mean hidden state of picture and
    instruction must also tell which words the item's text holds. Every fourth step adds half a batch of whole texts.
    """
    losses = PretrainingLosses([], [])
    if not steps:
        return losses
    examples = [_example(lvlm, item, prompts) for item in items]
    words = _word_targets(examples, lvlm.model.config.text_config.vocab_size)
    model = lvlm.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    order: list[int] = []
    progress = tqdm(range(steps), desc="Pre-training the tiny model", disable=None)
    for step in progress:
        while len(order) < batch_size:
            order += torch.randperm(len(examples)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        batch = [examples[index] for index in chosen]
        captions = [example.captions[int(torch.randint(len(example.captions), ()))] for example in batch]
        caption_loss, prompt_vectors = _forward(lvlm, captions, [example.image for example in batch])
        word_loss = -(words[chosen] * model.lm_head(prompt_vectors).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        (caption_loss + WORD_WEIGHT * word_loss).backward()
        if step % TEXT_EVERY == 0:
            text_loss, _ = _forward(lvlm, [example.text for example in batch[: math.ceil(batch_size / 2)]], None)
            text_loss.backward()
            losses.text.append(float(text_loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.caption.append(float(caption_loss.detach()))
        progress.set_postfix(caption=f"{losses.caption[-1]:.2f}", text=f"{losses.text[-1]:.2f}")
    return losses


@dataclass(frozen=True)
class _Sequence:
    input_ids: torch.Tensor  # [T]
    first_target: int  # the loss starts at this token


@dataclass(frozen=True)
class _Example:
    image: dict[str, torch.Tensor]
    captions: list[_Sequence]  # one per attribute
    text: _Sequence


def _example(lvlm: LVLM, item: Item, prompts: PromptConfig) -> _Example:
    batch = collate_images(lvlm, [item], prompts)
    image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    prompt = batch["input_ids"][0]

    def token_ids(text: str) -> torch.Tensor:
        return lvlm.tokenizer(text, return_tensors="pt")["input_ids"][0]

    captions = []
    for line in attribute_text(item, replace(prompts, separator="\n")).split("\n"):
        caption = token_ids(plain_text(lvlm, line, MAX_CAPTION_TOKENS) + "<|im_end|>\n")
        captions.append(_Sequence(torch.cat([prompt, caption]), len(prompt)))
    text = plain_text(lvlm, attribute_text(item, prompts), prompts.max_text_tokens)
    return _Example(image, captions, _Sequence(token_ids(render(lvlm, text_messages(text), prompts)), 1))


def _word_targets(examples: Sequence[_Example], vocab_size: int) -> torch.Tensor:
    """[items, vocabulary]: each text's tokens weighted by how telling they are, without rare and omnipresent ones.

    The weight is the logarithm of the inverse share of items that have the token; rows sum to one, or to zero.
    """
    present = torch.zeros(len(examples), vocab_size)
    for row, example in enumerate(examples):
        present[row, example.text.input_ids] = 1
    share = present.mean(0)
    weights = torch.where(share > RARE_WORD, -share.log(), 0.0)
    targets = present * weights
    return targets / targets.sum(-1, keepdim=True).clamp_min(1e-6)


def _forward(
    lvlm: LVLM, sequences: Sequence[_Sequence], images: Sequence[dict[str, torch.Tensor]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token loss over the targets, and the mean hidden state [B, D] over what comes before them."""
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
        batch["mm_token_type_ids"] = image_token_mask(lvlm.model, input_ids).int()
        features = lvlm.family.image_features(lvlm.model, batch)
    batch["position_ids"] = lvlm.family.position_ids(lvlm.model, batch)
    hidden_states = lvlm.family.last_hidden_state(lvlm.model, batch, features)
    logits = lvlm.model.lm_head(hidden_states[:, :-1][is_target[:, 1:]])
    loss = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:][is_target[:, 1:]])
    return loss, mean_pool(hidden_states, attention_mask.bool() & ~is_target)
