"""Qwen2.5-VL with random weights, made and put into NF4 one decoder layer at a time, and a catalogue to train on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from decoder_layer import quantise_linears
from sda_fast.data.items import Catalogue, read_items
from sda_fast.data.synthetic import generate_catalogue
from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM, check_quantized
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tiny import build_model, build_processor
from sda_fast.planning.model import preset_configs

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
# Sides of the catalogue's pictures in pixels, and how many items it has.
SIDES, ITEMS = {"cpu": 84, "cuda": 252}, {"cpu": 64, "cuda": 320}


def catalogue_in(folder: Path, device: torch.device) -> Catalogue:
    """The generated catalogue; the same on every machine."""
    paths = generate_catalogue(folder, num_items=ITEMS[device.type], num_users=10, image_side=SIDES[device.type])
    return read_items(paths.items)


def processor_for(catalogue: Catalogue, device: torch.device) -> Any:
    """Qwen2.5-VL's processor with a tokenizer trained on the catalogue."""
    return build_processor(catalogue, PromptConfig(), vocab_size=2048, image_side=SIDES[device.type])


def config_for(processor: Any, device: torch.device) -> Any:
    """The published 7B configuration with the tokenizer's special tokens; on a CPU a small one."""
    small = build_model(processor.tokenizer, hidden_size=128, num_layers=2).config
    if device.type == "cpu":
        return small
    config = copy.deepcopy(preset_configs()[QWEN])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    config.text_config.pad_token_id = small.text_config.pad_token_id
    return config


def random_lvlm(config: Any, processor: Any, device: torch.device) -> LVLM:
    """The model without a language head, frozen: decoder linears in NF4 with nested statistics, bf16 (CPU: float32).

    Weights are drawn on the device; no more than one decoder layer is there in 16 bits at any time.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with default_dtype(dtype), device:
        model = with_one_layer(config)
        decoder = model.language_model
        text, layer_class = config.text_config, type(decoder.layers[0])
        for place in range(text.num_hidden_layers):
            if place:
                decoder.layers.append(layer_class(decoder.config, place))
            layer = decoder.layers[place]
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if name.endswith("_proj.weight"):
                        parameter.normal_(std=text.initializer_range)
            quantise_linears(layer, device, compute_dtype=dtype)
    model.eval().requires_grad_(False)
    family = family_of(model.config)
    check_quantized(model, family)
    return LVLM(model, processor, family, f"{QWEN}, random weights" if device.type == "cuda" else "small")


def with_one_layer(config: Any) -> Any:
    """The model of a configuration, the decoder's first layer alone of all layers."""
    from transformers import Qwen2_5_VLModel

    text, shortened = config.text_config, copy.deepcopy(config)
    shortened.text_config.layer_types, shortened.text_config.num_hidden_layers = text.layer_types[:1], 1
    model = Qwen2_5_VLModel(shortened)
    whole = model.language_model.config
    whole.layer_types, whole.num_hidden_layers = text.layer_types, text.num_hidden_layers
    return model


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
