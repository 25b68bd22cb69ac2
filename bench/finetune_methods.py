"""The ways of fine-tuning that are measured beside each other: each adapts the same frozen model, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.moda_layers import ExpertLoop, Settings
from sda_fast import MoDAConfig, adapt_model
from sda_fast.jobs.train_config import FinetuneConfig
from sda_fast.jobs.train_state import moda_config
from sda_fast.lvlm.load import LVLM
from sda_fast.moda.context import current_modality
from sda_fast.moda.inject import parent_of, target_layers

MODA, PEFT, PEFT_AUTOCAST = "MoDA", "PEFT LoRA", "PEFT LoRA, bf16 autocast"
LOOP, FROZEN = "loop over experts", "no adapter"


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        adapt: puts adapters into a frozen model.
        chunk_size: items encoded at a time; None: the whole batch.
        tower_cached: all pictures are in the tower cache before the first step.
        compiled: the decoder's layers are compiled.
        autocast: run the step under bf16 autocast.
        steps, warm_ups: timed, and before them.
        profiled: times of kernels are taken in one step more.
    """

    name: str
    adapt: Callable[[LVLM, FinetuneConfig], None]
    chunk_size: int | None = None
    tower_cached: bool = False
    gradient_checkpointing: bool = True
    compiled: bool = False
    autocast: bool = False
    steps: int = 5
    warm_ups: int = 2
    profiled: bool = False

    @property
    def is_ours(self) -> bool:
        return self.adapt is moda


class ExpertLoopInModel(ExpertLoop):
    """The loop with the modality of the pass, one id per sequence, as published."""

    def modality_ids(self, x: Tensor) -> Tensor:
        modality = current_modality().resolve(MoDAConfig.modality_names, MoDAConfig.num_modalities, x.device)
        return torch.full((x.shape[0],), modality, dtype=torch.int64, device=x.device)


def moda(lvlm: LVLM, config: FinetuneConfig) -> None:
    """Ours, as `finetune` does it."""
    adapt_model(lvlm.model, moda_config(config, lvlm))


def peft_lora(lvlm: LVLM, config: FinetuneConfig) -> None:
    """PEFT's LoRA of the same total rank on the same layers: float32 adapters, x cast to float32 outside autocast."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lvlm.family.target_modules,
    )
    lvlm.model.is_loaded_in_4bit = True
    get_peft_model(lvlm.model, lora)


def expert_loop(lvlm: LVLM, config: FinetuneConfig) -> None:
    """The published layer: one small float32 LoRA per expert, each with its own dropout."""
    for name in target_layers(lvlm.model, moda_config(config, lvlm)):
        parent, attribute = parent_of(lvlm.model, name)
        base_layer = getattr(parent, attribute)
        settings = Settings(
            base_layer.in_features,
            base_layer.out_features,
            r=config.r,
            num_experts=config.num_experts,
            lora_alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            device=str(base_layer.weight.device),
        )
        loop = ExpertLoopInModel(settings, base_layer)
        for part in loop.lora_B:
            nn.init.zeros_(part)
        setattr(parent, attribute, loop)


def no_adapter(lvlm: LVLM, config: FinetuneConfig) -> None:
    """The floor: forward and backward of the frozen decoder, down to its embeddings; the temperature alone learns."""
    embedding = lvlm.family.base_model(lvlm.model).get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


MAIN = Variant(MODA, moda, steps=50, profiled=True)
# The most important first: where time ends, the rest is left out.
VARIANTS = (
    MAIN,
    Variant(PEFT, peft_lora),
    Variant(LOOP, expert_loop, steps=3, warm_ups=1),
    Variant(FROZEN, no_adapter, profiled=True),
    Variant("MoDA, compiled", moda, compiled=True, warm_ups=8, profiled=True),
    Variant("MoDA, tower cached", moda, tower_cached=True),
    Variant("MoDA, chunks of 4", moda, chunk_size=4, steps=3, warm_ups=1),
    Variant(PEFT_AUTOCAST, peft_lora, autocast=True),
    Variant("MoDA, chunks of 4, tower cached", moda, chunk_size=4, tower_cached=True, steps=3, warm_ups=1),
    Variant("MoDA, no checkpointing", moda, gradient_checkpointing=False, steps=3, warm_ups=1),
)
