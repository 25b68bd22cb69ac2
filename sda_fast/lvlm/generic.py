"""The generic path: any decoder that takes image features in the places of image tokens (LLaVA, SmolVLM, ...)."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from sda_fast.lvlm.family import Family, image_token_id, known_model_types

logger = logging.getLogger(__name__)


def family_for(config: Any) -> Family:
    """A family read off the model's structure, which is built without weights.

    Raises:
        ValueError: not such a model, or one whose positions need a family of their own.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModel

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _unknown(config, "is not a vision-language model that transformers knows")
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    image_token_id(config)
    if not path or not hasattr(model, "get_image_features") or not hasattr(decoder, "layers"):
        raise _unknown(config, "has no decoder that takes image features in its input")
    if hasattr(model, "get_rope_index"):
        raise _unknown(config, "has positions of its own making")
    logger.warning("model type %s has no family of its own in sda-fast; the generic one is used", config.model_type)
    suffixes = {name.rsplit(".", 1)[-1] for name, one in decoder.layers.named_modules() if isinstance(one, nn.Linear)}
    names = "|".join(sorted(map(re.escape, suffixes)))
    return Family(
        name=f"generic ({config.model_type})",
        model_types=(config.model_type,),
        language_model=path,
        not_quantized=tuple(rf"(?:.*\.)?{re.escape(name)}" for name in (*_siblings(model, path), "lm_head")),
        target_modules=rf"(?:.*\.)?{re.escape(path)}\.layers\.\d+\.(?:.*\.)?(?:{names})",
    )


def _siblings(model: nn.Module, path: str) -> list[str]:
    """Names of the modules beside the one at `path` and beside its ancestors."""
    names, parent = [], ""
    for part in path.split("."):
        prefix = f"{parent}." if parent else ""
        names += [prefix + name for name, _ in model.get_submodule(parent).named_children() if name != part]
        parent = prefix + part
    return names


def _unknown(config: Any, reason: str) -> ValueError:
    known = ", ".join(known_model_types())
    return ValueError(
        f"model type {config.model_type!r} {reason}; sda-fast knows {known}, and other models that are a decoder with "
        "image features in its input"
    )
