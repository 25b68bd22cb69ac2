"""The job `export`: one stock LoRA per modality, and a merged model per modality, from one MoDA adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sda_fast.arguments import setting
from sda_fast.atomic import write_text_atomic
from sda_fast.jobs.fingerprint import versions
from sda_fast.lvlm.load import load_lvlm, read_config
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.export import export_lora, merge_into
from sda_fast.moda.folder import TRAINING_FILE, adapter_folder
from sda_fast.moda.save import read_adapter

logger = logging.getLogger(__name__)

CARD = """\
---
base_model: {base_model}
library_name: {library}
tags:
- sda-fast
- moda
- multimodal-recommendation
---

# {title}

For {modality} sequences only: the other modalities have their own folders beside this one. Made by `sda-fast export`
from a MoDA adapter (SDA, arXiv 2512.06883) of {base_model}: for one modality the gates of the experts are constants, so
that the update is one LoRA of rank {rank} in each of {layers} layers. {kind}

## Use

```python
{use}
```

## How the adapter was trained

{training}

## Versions

{versions}
"""
LORA_KIND = "This folder holds that LoRA, which unmodified PEFT loads."
MERGED_KIND = (
    "This folder holds the whole model with the update added to its weights, in {dtype}: float32 sums, rounded once."
)
USE_LORA = """\
model = transformers.{auto_class}.from_pretrained({base_model})
model = peft.PeftModel.from_pretrained(model, "<this folder>")"""
USE_MERGED = 'model = transformers.{auto_class}.from_pretrained("<this folder>", dtype="auto")'


@dataclass(frozen=True)
class ExportConfig:
    """What to export where."""

    adapter: str | Path = field(metadata={"help": "adapter folder written by finetune, or a hub id"})
    output: Path = field(metadata={"help": "folder for lora-<modality>/ and merged-<modality>/"})
    merged: bool = setting(False, "also write a whole merged 16-bit model per modality")
    lm_head: bool = setting(
        False, "name the LoRA's layers as in the model with its language head, which servers load, not as in AutoModel"
    )
    model: str | None = setting(None, "model to merge into; default: the one the adapter names")
    device: str | None = setting(None, "where to merge: cpu, cuda or cuda:1; default: a GPU where there is one")


def export(config: ExportConfig) -> Path:
    """Write `lora-<modality>/` for every modality, and `merged-<modality>/` if asked to; returns the output folder.

    Every folder gets a model card. A merged model has its language head, as the model that it is made from.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: a model is needed and neither the adapter nor the configuration names it.
    """
    folder = adapter_folder(config.adapter)
    moda, tensors, base_model_name = read_adapter(folder)
    model_name = config.model or base_model_name
    if model_name is None and (config.merged or config.lm_head):
        raise ValueError(f"the adapter in {config.adapter} names no model; give one with --model")
    named_like = model_with_head(str(model_name)) if config.lm_head else None
    facts: dict[str, Any] = {
        "base_model": json.dumps(str(model_name)),
        "rank": moda.r,
        "layers": sum(name.endswith(".lora_A") for name in tensors),
        "training": training_tables(folder, moda),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    auto_class = "AutoModelForImageTextToText" if config.lm_head else "AutoModel"
    output = Path(config.output)
    for modality in moda.modality_names:
        lora = export_lora(folder, output / f"lora-{modality}", modality, model=named_like)
        use = USE_LORA.format(auto_class=auto_class, base_model=facts["base_model"])
        title = f"LoRA for {modality} sequences of {model_name}"
        write_card(lora, facts, library="peft", title=title, modality=modality, kind=LORA_KIND, use=use)
        if config.merged:
            merged = output / f"merged-{modality}"
            lvlm = load_lvlm(str(model_name), quantization="none", device=config.device, lm_head=True)
            merge_into(lvlm.model, folder, modality)
            lvlm.model.save_pretrained(merged)
            lvlm.processor.save_pretrained(merged)
            kind = MERGED_KIND.format(dtype=str(lvlm.model.dtype).removeprefix("torch."))
            use = USE_MERGED.format(auto_class="AutoModelForImageTextToText")
            title = f"{model_name} tuned for {modality} sequences"
            write_card(merged, facts, library="transformers", title=title, modality=modality, kind=kind, use=use)
        logger.info("exported %s to %s", modality, output)
    return output


def model_with_head(name: str) -> torch.nn.Module:
    """The model's modules with their names, without weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(read_config(name))


def training_tables(adapter: Path, moda: MoDAConfig) -> str:
    """Data, facts, settings and versions of the adapter's training where it has a training.json, else its sizes."""
    path = adapter / TRAINING_FILE
    if not path.is_file():
        return table("setting", moda.as_dict())
    record = json.loads(path.read_text(encoding="utf-8"))
    heads = {"what": "training", "setting": "settings", "package": "versions"}
    return "\n\n".join(table(head, record[part]) for head, part in heads.items())


def table(head: str, rows: Mapping[str, Any]) -> str:
    cells = [(name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in rows.items()]
    return "\n".join([f"| {head} | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])


def write_card(folder: Path, facts: Mapping[str, Any], **words: str) -> None:
    """Write README.md of one exported folder."""
    write_text_atomic(folder / "README.md", CARD.format(**facts, **words))
