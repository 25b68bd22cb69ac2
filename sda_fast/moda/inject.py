"""Putting MoDA into a transformers model: which layers to adapt, swapping them in place, freezing the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from sda_fast.moda.config import ALL_LINEAR, MoDAConfig
from sda_fast.moda.linear import ADAPTER_PARAMETERS, MoDALinear
from sda_fast.moda.shared import SharedInputGroup
from sda_fast.ops.quantized import layer_kind

LANGUAGE_MODEL_NAMES = ("language_model", "text_model")
# Parts of a vision-language model that are not its language model, for models that do not separate the two by name.
OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision\w*|image\w*|audio\w*|lm_head|embed\w*|merger|multi_modal_projector|\w*projector)(\.|$)"
)
SHARED_INPUT_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def adapt_model(model: nn.Module, config: MoDAConfig, *, backend: str = "auto") -> list[str]:
    """Replace the target layers by `MoDALinear` in place, freeze everything else, and let q/k/v and gate/up share x.

    Args:
        model: a transformers vision-language or language model, its linears float or 4-bit.
        config: see `MoDAConfig`; its seed decides the initial values.
        backend: "auto", "triton" or "torch", as in `moda_linear`; no part of the adapter, so it is not saved with it.
    Returns:
        The names of the adapted layers, in the order of the model.
    Raises:
        ValueError: nothing matches config.target_modules, the model is adapted already, or backend is none of these.
    """
    already = [name for name, module in model.named_modules() if isinstance(module, MoDALinear)]
    if already:
        raise ValueError(f"the model has {len(already)} adapted layers already, the first is {already[0]}")
    names = target_layers(model, config)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    for name in names:
        parent, attribute = parent_of(model, name)
        base_layer = getattr(parent, attribute)
        layer = MoDALinear(
            base_layer,
            r=config.r,
            num_experts=config.num_experts,
            num_modalities=config.num_modalities,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            gate_dim=config.gate_dim,
            modality_names=config.modality_names,
            adapter_dtype=getattr(torch, config.adapter_dtype),
            backend=backend,
            generator=generator,
        )
        setattr(parent, attribute, layer.train(base_layer.training))
    for parent in model.modules():
        share_inputs(parent)
    model.moda_config = config  # type: ignore[assignment]
    return names


def named_moda_layers(model: nn.Module) -> Iterator[tuple[str, MoDALinear]]:
    """The adapted layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoDALinear))


def named_moda_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters with their full names in the model."""
    for name, layer in named_moda_layers(model):
        prefix = f"{name}." if name else ""
        for parameter in ADAPTER_PARAMETERS:
            yield prefix + parameter, getattr(layer, parameter)


def moda_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters: what an optimizer trains."""
    return [parameter for _, parameter in named_moda_parameters(model)]


def target_layers(model: nn.Module, config: MoDAConfig) -> list[str]:
    """The names of the layers that `config` selects.

    Raises:
        ValueError: there are none.
    """
    linears = [name for name, module in model.named_modules() if layer_kind(module) is not None]
    if isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR:
        chosen = [name for name in linears if re.fullmatch(config.target_modules, name)]
    else:
        chosen = [name for name in linears if belongs_to_language_model(model, name)]
        if not isinstance(config.target_modules, str):
            whole_names = set(config.target_modules)
            suffixed = {name for name in chosen if has_suffix(name, config.target_modules)}
            chosen = [name for name in linears if name in whole_names or name in suffixed]
    chosen = [name for name in chosen if not is_excluded(name, config.exclude_modules)]
    if not chosen:
        found = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ValueError(
            f"no layer matches target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r}; {type(model).__name__} has {len(linears)} linear layers, "
            f"named {', '.join(found) or 'nothing'}"
        )
    return chosen


def belongs_to_language_model(model: nn.Module, name: str) -> bool:
    """Whether a layer is part of the decoder: not vision, head, embeddings, projector, nor a cross-attention layer."""
    language_model = language_model_name(model)
    if language_model is not None and not name.startswith(f"{language_model}."):
        return False
    inner = name if language_model is None else name[len(language_model) + 1 :]
    if OTHER_PARTS.search(inner):
        return False
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is not None and model.get_submodule(name) is get_head():
        return False
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return not any("CrossAttention" in type(module).__name__ for module in above)


def language_model_name(model: nn.Module) -> str | None:
    """The name of the submodule that is the language model, or None if the whole model is one."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LANGUAGE_MODEL_NAMES and any(True for _ in module.children()):
            return name
    return None


def has_suffix(name: str, suffixes: str | tuple[str, ...]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def is_excluded(name: str, exclude: str | tuple[str, ...] | None) -> bool:
    if exclude is None:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return has_suffix(name, exclude)


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the named layer, and the attribute it is held by."""
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def share_inputs(parent: nn.Module) -> None:
    """Group the layers of a module that by their names read the same x, as far as all of them are adapted alike."""
    for names in SHARED_INPUT_NAMES:
        layers = [getattr(parent, name, None) for name in names]
        if all(hasattr(layer, "shared_input") for layer in layers) and (
            len({layer.in_features for layer in layers if layer is not None}) == 1
        ):
            SharedInputGroup(names).attach(parent)
