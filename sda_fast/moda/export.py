"""MoDA adapters as stock LoRAs: for one modality the gates are constants, and go into the columns of B.

scaling * sum_e g_e B_e A_e = scaling * (B diag(g)) A: exactly one LoRA of the total rank, with A as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sda_fast.atomic import write_json_atomic, write_safetensors_atomic
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.folder import CONFIG_FILE, WEIGHTS_FILE
from sda_fast.moda.save import AdapterMismatchError, adapted_names, named_as_in, read_adapter
from sda_fast.ops.gates import moda_gates


def gated_lora(tensors: dict[str, Tensor], config: MoDAConfig, modality: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The plain LoRA of every layer for one modality.

    Args:
        tensors: names as in `read_adapter`, "<layer>.lora_A" and so on.
        modality: its id.
    Returns:
        Layer name -> (A [R, K], B diag(g) [N, R]), float32.
    """
    result = {}
    for layer in adapted_names(tensors):
        (gates,) = moda_gates(tensors[f"{layer}.gate_embedding"], tensors[f"{layer}.gate_proj"], modality)
        columns = gates.float().repeat_interleave(config.r // config.num_experts)
        result[layer] = (tensors[f"{layer}.lora_A"].float(), tensors[f"{layer}.lora_B"].float() * columns)
    return result


def export_lora(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    modality: str | int,
    *,
    model: torch.nn.Module | None = None,
) -> Path:
    """Write one modality of a MoDA adapter as a LoRA that unmodified PEFT, or anything that serves LoRAs, loads.

    Args:
        adapter: folder written by `save_adapter` or PEFT, or a hub id.
        output: folder to write.
        modality: a name or id.
        model: layers are named as in this one, which may be on the meta device; default: as in the model that was
            trained. It matters: PEFT takes a LoRA for a model with its language head into one without, and the other
            way round, with no more than a warning that all its weights are left out.
    Returns:
        `output`.
    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the adapter does not know the modality.
    """
    config, tensors, base_model_name = read_adapter(adapter)
    tensors = tensors if model is None else named_as_in(model, tensors)
    lora = gated_lora(tensors, config, modality_id(config, modality))
    weights = {}
    for layer, (lora_A, lora_B) in lora.items():
        weights[f"base_model.model.{layer}.lora_A.weight"] = lora_A.contiguous()
        weights[f"base_model.model.{layer}.lora_B.weight"] = lora_B.contiguous()
    output = Path(output)
    write_safetensors_atomic(output / WEIGHTS_FILE, weights, {"format": "pt"})
    write_json_atomic(output / CONFIG_FILE, lora_config(config, list(lora), base_model_name))
    return output


def merge_into(model: torch.nn.Module, adapter: str | os.PathLike[str], modality: str | int) -> None:
    """Add one modality's update to a 16- or 32-bit model's weights in place: float32 sums, rounded once.

    Raises:
        AdapterMismatchError: the model lacks a layer, or holds it in 4-bit.
        ValueError: the adapter does not know the modality.
    """
    config, tensors, _ = read_adapter(adapter)
    lora = gated_lora(named_as_in(model, tensors), config, modality_id(config, modality))
    for layer, (lora_A, lora_B) in lora.items():
        try:
            weight = model.get_submodule(layer).weight
        except AttributeError as error:
            raise AdapterMismatchError(f"{type(model).__name__} has no layer {layer}") from error
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise AdapterMismatchError(
                f"{layer} is not held in floating point; load the model with quantization='none'"
            )
        with torch.no_grad():
            update = config.scaling * (lora_B.to(weight.device) @ lora_A.to(weight.device))
            weight.copy_((weight.float() + update).to(weight.dtype))


def modality_id(config: MoDAConfig, modality: str | int) -> int:
    """The id of a modality given by name or id.

    Raises:
        ValueError: the adapter does not know it.
    """
    if isinstance(modality, str):
        if modality not in config.modality_names:
            raise ValueError(f"modality {modality!r} is not among the adapter's {', '.join(config.modality_names)}")
        return config.modality_names.index(modality)
    if not 0 <= modality < config.num_modalities:
        raise ValueError(f"modality id {modality} is not below the adapter's {config.num_modalities} modalities")
    return modality


def lora_config(config: MoDAConfig, layers: list[str], base_model_name: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
    }
