"""An adapter on disk: adapter_config.json and adapter_model.safetensors in one folder, each replaced as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from sda_fast.atomic import write_json_atomic, write_safetensors_atomic
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.folder import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from sda_fast.moda.inject import adapt_model, named_moda_parameters

PEFT_TYPE = "MODA"
TENSOR_PREFIX = "base_model.model."
SAVED_NAMES = {
    "lora_A": "moda_A",
    "lora_B": "moda_B",
    "gate_embedding": "moda_gate_embedding",
    "gate_proj": "moda_gate_proj",
}


class AdapterMismatchError(ValueError):
    """An adapter on disk does not belong to the model it is loaded into."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, base_model_name: str | None = None) -> None:
    """Write a model's adapter and nothing else of it, in PEFT's layout. A crash leaves the files as they were before.

    Args:
        model: adapted by `adapt_model`.
        folder: made if absent.
        base_model_name: kept in the configuration, for whoever loads the adapter.
    Raises:
        ValueError: the model is not adapted.
    """
    config = config_of(model)
    target = Path(folder)
    tensors = {saved_name(name): value.detach() for name, value in named_moda_parameters(model)}
    description = {"peft_type": PEFT_TYPE, "base_model_name_or_path": base_model_name, **config.as_dict()}
    write_safetensors_atomic(target / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json_atomic(target / CONFIG_FILE, description)


def saved_name(name: str) -> str:
    """The name on disk of a parameter "<layer>.lora_A": "base_model.model.<layer>.moda_A"."""
    layer, _, parameter = name.rpartition(".")
    return f"{TENSOR_PREFIX}{layer}.{SAVED_NAMES[parameter]}"


def loaded_name(name: str) -> str:
    """The inverse of `saved_name`; names that are not ours stay as they are."""
    layer, _, parameter = name.removeprefix(TENSOR_PREFIX).rpartition(".")
    ours = {saved: own for own, saved in SAVED_NAMES.items()}
    return f"{layer}.{ours[parameter]}" if parameter in ours else name


def config_of(model: nn.Module) -> MoDAConfig:
    """The configuration that the model was adapted by."""
    config = getattr(model, "moda_config", None)
    if not isinstance(config, MoDAConfig):
        raise ValueError(f"{type(model).__name__} is not adapted; call adapt_model first")
    return config


def read_adapter(adapter: str | os.PathLike[str]) -> tuple[MoDAConfig, dict[str, Tensor], str | None]:
    """An adapter's configuration, its tensors by their names in the model it was saved from, and that model's name.

    Args:
        adapter: a folder or a hub id, see `adapter_folder`.
    Raises:
        FileNotFoundError: there is no adapter.
        AdapterMismatchError: it is not a MoDA adapter.
    """
    from safetensors.torch import load_file

    folder = adapter_folder(adapter)
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterMismatchError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("peft_type") != PEFT_TYPE:
        found = description.get("peft_type") if isinstance(description, dict) else description
        raise AdapterMismatchError(f"{path} is not a MoDA adapter: expected peft_type {PEFT_TYPE!r}, got {found!r}")
    known = {field.name for field in dataclasses.fields(MoDAConfig)}
    config = MoDAConfig(**{name: value for name, value in description.items() if name in known})
    tensors = load_file(folder / WEIGHTS_FILE)
    return (
        config,
        {loaded_name(name): value for name, value in tensors.items()},
        description.get("base_model_name_or_path"),
    )


def load_adapter(model: nn.Module, adapter: str | os.PathLike[str], *, backend: str = "auto") -> MoDAConfig:
    """Load an adapter into a model, adapting it first if it is not adapted yet.

    Everything is checked before anything of an adapted model is changed.

    Args:
        model: the base model, or one adapted with the same configuration; with or without its language head, however
            the model was that the adapter is from.
        adapter: a folder written by `save_adapter` or by PEFT, or the hub id of one.
        backend: of the layers, where they are not adapted yet; see `adapt_model`.
    Returns:
        The adapter's configuration.
    Raises:
        FileNotFoundError: a file is missing.
        AdapterMismatchError: configuration, names or shapes do not fit; the message says which.
    """
    config, saved, _ = read_adapter(adapter)
    tensors = named_as_in(model, saved)
    if getattr(model, "moda_config", None) is None:
        layers = adapted_names(tensors)
        check_layers_exist(model, layers)
        if layers != adapted_names(saved):
            config = dataclasses.replace(config, target_modules=tuple(layers), exclude_modules=None)
        adapt_model(model, config, backend=backend)
    else:
        check_same_config(config_of(model), config)
    parameters = dict(named_moda_parameters(model))
    check_tensors(parameters, tensors, f"{adapter}: {WEIGHTS_FILE}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return config


def adapted_names(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the layers that an adapter's tensors belong to."""
    return [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]


def named_as_in(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that their layers have in `model`.

    transformers calls a layer "language_model.layers.0..." in a model without its language head and
    "model.language_model.layers.0..." in one with it.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    present = {name for name, _ in model.named_modules()}
    for change in (str, prefix.__add__, lambda name: name.removeprefix(prefix)):
        if all(change(layer) in present for layer in adapted_names(tensors)):
            return {change(name): value for name, value in tensors.items()}
    return tensors


def check_layers_exist(model: nn.Module, names: list[str]) -> None:
    """The adapted layers must be there before a fresh model is touched."""
    present = {name for name, _ in model.named_modules()}
    absent = [name for name in names if name not in present]
    if absent:
        raise AdapterMismatchError(
            f"{type(model).__name__} lacks {len(absent)} of the adapter's {len(names)} layers: {some(absent)}"
        )


def check_same_config(of_model: MoDAConfig, of_adapter: MoDAConfig) -> None:
    """An adapted model must have been adapted like the one that was saved; dropout and seed may differ.

    Which layers are adapted is compared by the tensors' names, since there are several ways to name them.
    """
    free = ("seed", "lora_dropout", "target_modules", "exclude_modules")
    ours, theirs = of_model.as_dict(), of_adapter.as_dict()
    different = [
        f"{name} is {ours[name]!r} in the model and {theirs[name]!r} in the adapter"
        for name in ours
        if name not in free and ours[name] != theirs[name]
    ]
    if different:
        raise AdapterMismatchError("; ".join(different))


def check_tensors(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], source: str) -> None:
    """Names and shapes on disk must be those of the model."""
    missing = [name for name in parameters if name not in tensors]
    unexpected = [name for name in tensors if name not in parameters]
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    faults = [
        f"{label}: {some(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if faults:
        raise AdapterMismatchError(f"{source} does not fit the model; " + "; ".join(faults))


def some(names: list[str], shown: int = 8) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
