"""The job `export`: one stock LoRA per modality, and a merged model per modality, from one MoDA adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from sda_fast.arguments import setting
from sda_fast.lvlm.load import load_lvlm
from sda_fast.moda.export import export_lora, merge_into
from sda_fast.moda.save import read_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportConfig:
    """What to export where."""

    adapter: Path = field(metadata={"help": "adapter folder written by finetune"})
    output: Path = field(metadata={"help": "folder for lora-<modality>/ and merged-<modality>/"})
    merged: bool = setting(False, "also write a whole merged 16-bit model per modality")
    model: str | None = setting(None, "model to merge into; default: the one the adapter names")
    device: str | None = setting(None, "where to merge: cpu, cuda or cuda:1; default: a GPU where there is one")


def export(config: ExportConfig) -> Path:
    """Write `lora-<modality>/` for every modality, and `merged-<modality>/` if asked to; returns the output folder.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: a merged model is wanted and neither the adapter nor the configuration names the model.
    """
    moda, _, base_model_name = read_adapter(config.adapter)
    model_name = config.model or base_model_name
    if config.merged and model_name is None:
        raise ValueError(f"the adapter in {config.adapter} names no model; give one with --model")
    output = Path(config.output)
    for modality in moda.modality_names:
        export_lora(config.adapter, output / f"lora-{modality}", modality)
        if config.merged and model_name is not None:
            lvlm = load_lvlm(model_name, quantization="none", device=config.device, lm_head=True)
            merge_into(lvlm.model, config.adapter, modality)
            lvlm.model.save_pretrained(output / f"merged-{modality}")
            lvlm.processor.save_pretrained(output / f"merged-{modality}")
        logger.info("exported %s to %s", modality, output)
    return output
