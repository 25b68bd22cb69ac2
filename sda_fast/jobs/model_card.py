"""The README.md of an adapter folder: which data, settings and versions made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """\
---
base_model: {model}
library_name: sda-fast
tags:
- sda-fast
- {adapter}
- multimodal-recommendation
---

# {title} adapter for {model_name}

Trained by sda-fast {sda_fast} with {loss_name} on the image and text sequences of {items} catalogue items
(SDA, arXiv 2512.06883). It makes image and text vectors of one item agree; it is meant for item vectors, not for chat.

## Use

```bash
sda-fast embed --model {model} --adapter <this folder> --items items.jsonl --output vectors.safetensors
```

## Training

| what | value |
| --- | --- |
{training}

## Settings

| setting | value |
| --- | --- |
{settings}

## Differences from the published settings

{differences}

## Versions

{versions}
"""

_KNOWN_DIFFERENCES = (
    "The temperature is learned as its logarithm, so that it stays positive.",
    "The modality gates and low-rank factors act under one dropout mask per layer, not one per expert.",
    "Qwen models get their M-RoPE positions; the public code left them out.",
    "Image and text sequences are padded separately.",
    "The incomplete last batch of an epoch is left out.",
    "The others are listed in docs/published.md of sda-fast.",
)


def model_card(
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    versions: Mapping[str, str],
    differences: Mapping[str, tuple[Any, Any]],
) -> str:
    """Markdown text.

    Args:
        settings: every field of the run's FinetuneConfig.
        training: facts of the run by name (items, steps, seconds, losses, temperature, device ...).
        differences: field name -> (value here, published value).
    """
    own = [
        f"`{name}` is {_word(here)}; published: {_word(published)}." for name, (here, published) in differences.items()
    ]
    if settings["quantization"] != "none":
        own.append(f"The frozen weights are held in {settings['quantization'].upper()}; published: 16 bit.")
    return _CARD.format(
        model=json.dumps(str(settings["model"])),
        model_name=str(settings["model"]),
        adapter=settings["adapter"],
        title="MoDA" if settings["adapter"] == "moda" else "LoRA",
        loss_name="CMSA" if settings["loss"] == "cmsa" else "InfoNCE",
        items=training["items"],
        sda_fast=versions["sda-fast"],
        training=_table(training),
        settings=_table(settings),
        differences="\n".join(f"- {line}" for line in (*own, *_KNOWN_DIFFERENCES)),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {_word(value)} |" for name, value in rows.items())


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
