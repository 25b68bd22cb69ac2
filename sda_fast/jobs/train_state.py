"""What a fine-tuning run changes as it goes, and how it is written to and read from disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sda_fast.atomic import write_json_atomic, write_text_atomic
from sda_fast.jobs import checkpoint
from sda_fast.jobs.fingerprint import versions
from sda_fast.jobs.model_card import model_card
from sda_fast.jobs.train_config import FinetuneConfig
from sda_fast.losses.modules import CMSALoss, InfoNCELoss
from sda_fast.lvlm.load import LVLM, load_lvlm, read_config
from sda_fast.lvlm.packing import attention_for
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.inject import adapt_model
from sda_fast.moda.save import load_adapter, save_adapter


@dataclass
class TrainingState:
    """Model, loss and optimiser in the middle of a run.

    Attributes:
        parameters: the adapters' and the loss's, as the optimiser holds them.
        step: steps made so far.
        seconds: spent in them, over all resumptions.
        chunk_size: items encoded at a time; None: the whole batch at once.
    """

    lvlm: LVLM
    loss: CMSALoss | InfoNCELoss
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    accelerator: Accelerator
    step: int = 0
    seconds: float = 0.0
    chunk_size: int | None = None

    @property
    def temperature(self) -> float:
        return float(self.loss.temperature.detach())

    def gradient_norm(self, max_norm: float | None) -> float:
        """Norm of the adapters' and the temperature's gradient, before it is clipped to `max_norm`."""
        with_gradient = [parameter for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, math.inf if max_norm is None else max_norm)
        return float(norm)

    def update(self, learning_rate: float) -> None:
        """Change the parameters by their gradients, which are dropped; that was one step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        """Write a checkpoint and delete all but the newest `keep`; every process must call it.

        Raises:
            OSError: it could not be written; the ones before it are kept.
        """
        random_states = self._gathered_random_states()
        if not self.accelerator.is_main_process:
            return
        state = {"identity": dict(identity), "seconds": self.seconds, "chunk_size": self.chunk_size}

        def write(path: Path) -> None:
            save_adapter(self.lvlm.model, path / "adapter", base_model_name=self.lvlm.name)
            save_file(
                {name: tensor.cpu() for name, tensor in self.loss.state_dict().items()}, path / "loss.safetensors"
            )
            checkpoint.save_optimizer(self.optimizer, path / "optimizer.safetensors")
            save_file(random_states, path / "random.safetensors")

        try:
            written = checkpoint.write_checkpoint(folder, self.step, state, write)
        except (OSError, SafetensorError) as error:
            older = sorted(path.name for path in folder.glob("step-*"))
            kept = f"the last checkpoint is {older[-1]}" if older else "there is none before it"
            raise OSError(f"cannot write the checkpoint of step {self.step} to {folder}: {error}; {kept}") from error
        checkpoint.prune_checkpoints(written, keep)

    def restore(self, path: Path, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint: `path` and its state, from `newest_checkpoint`."""
        load_adapter(self.lvlm.model, path / "adapter")
        self.loss.load_state_dict(load_file(path / "loss.safetensors"))
        checkpoint.load_optimizer(self.optimizer, path / "optimizer.safetensors")
        mine = f"{self.accelerator.process_index}."
        random_states = load_file(path / "random.safetensors")
        checkpoint.restore_random_state(
            {name.removeprefix(mine): tensor for name, tensor in random_states.items() if name.startswith(mine)}
        )
        self.step, self.seconds, self.chunk_size = state["step"], state["seconds"], state["chunk_size"]

    def write_adapter(
        self, folder: Path, config: FinetuneConfig, identity: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write the finished adapter with its card, replacing what `folder` held."""
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            save_adapter(self.lvlm.model, unfinished, base_model_name=self.lvlm.name)
            settings = config.as_json()
            used = versions()
            record = {"settings": settings, "identity": dict(identity), "training": dict(facts), "versions": used}
            write_json_atomic(unfinished / "training.json", record)
            card = model_card(settings, facts, used, config.differences_from_published())
            write_text_atomic(unfinished / "README.md", card)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _gathered_random_states(self) -> dict[str, torch.Tensor]:
        """Every process's random states, the names prefixed with its number."""
        processes = self.accelerator.num_processes
        gathered = {}
        for name, tensor in checkpoint.random_state().items():
            whole = self.accelerator.gather(tensor[None].to(self.accelerator.device)).cpu()
            for process in range(processes):
                gathered[f"{process}.{name}"] = whole[process].clone()
        return gathered


def build_state(config: FinetuneConfig, accelerator: Accelerator) -> TrainingState:
    """The state before the first step: model loaded and adapted, loss and optimiser made."""
    device = chosen_device(config.device, accelerator)
    dtype = activation_dtype(config.precision, device)
    # Before the model is read: an optimiser that the device cannot run must not cost minutes.
    check_optimizer(config.optimizer, device)
    lvlm = load_lvlm(
        config.model,
        quantization=config.quantization,
        double_quant=config.double_quant,
        dtype=dtype,
        device=device,
        attention=attention_for(config.packing, read_config(config.model), device, dtype),
        progress=config.progress and accelerator.is_main_process,
    )
    adapt_model(lvlm.model, moda_config(config, lvlm))
    return state_of(config, lvlm, accelerator)


def state_of(config: FinetuneConfig, lvlm: LVLM, accelerator: Accelerator) -> TrainingState:
    """The state before the first step of a model whose adapters are there and alone require gradients."""
    loss = make_loss(config).to(lvlm.device)
    adapters = [parameter for parameter in lvlm.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": adapters, "weight_decay": config.weight_decay},
        {"params": list(loss.parameters()), "weight_decay": 0.0},
    ]
    optimizer = make_optimizer(config, [group for group in groups if group["params"]], lvlm.device)
    chunk_size = config.chunk_size if isinstance(config.chunk_size, int) else None
    return TrainingState(lvlm, loss, optimizer, [*adapters, *loss.parameters()], accelerator, chunk_size=chunk_size)


def chosen_device(wanted: str | None, accelerator: Accelerator) -> torch.device:
    """The wanted device, else this process's; a GPU becomes the current one, whose random state checkpoints hold.

    Raises:
        ValueError: a device by its number, for several processes.
    """
    device = torch.device(wanted) if wanted else accelerator.device
    if wanted and device.index is not None and accelerator.num_processes > 1:
        processes = f"{accelerator.num_processes} processes, each with a device of its own"
        raise ValueError(f"device is {device} but there are {processes}; give {device.type}, or nothing")
    if device.index is None and device.type == accelerator.device.type:
        device = accelerator.device
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else torch.device("cuda", 0))
    return device


def activation_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that "bf16", "fp32" or "auto" (bf16 on a GPU, float32 on the CPU) means."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def moda_config(config: FinetuneConfig, lvlm: LVLM) -> MoDAConfig:
    """The adapter's configuration; plain LoRA is one expert, whose gate is 1."""
    return MoDAConfig(
        r=config.r,
        num_experts=config.num_experts if config.adapter == "moda" else 1,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lvlm.family.target_modules,
        seed=config.seed,
    )


def make_loss(config: FinetuneConfig) -> CMSALoss | InfoNCELoss:
    if config.loss == "infonce":
        return InfoNCELoss(config.temperature, config.learnable_temperature, normalize=config.normalize)
    return CMSALoss(
        config.temperature,
        config.learnable_temperature,
        detach_teacher=config.detach_teacher,
        normalize=config.normalize,
        row_normalized_targets=config.row_normalized_targets,
    )


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise ValueError where bitsandbytes' optimisers cannot run."""
    if name != "adamw" and device.type != "cuda":
        raise ValueError(f"optimizer {name!r} needs a GPU, the device is {device}; use adamw")


def make_optimizer(config: FinetuneConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW with the published betas (0.9, 0.999).

    Raises:
        ValueError: an 8-bit optimiser without a GPU.
    """
    check_optimizer(config.optimizer, device)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if config.optimizer == "adamw8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(groups, lr=config.learning_rate)
