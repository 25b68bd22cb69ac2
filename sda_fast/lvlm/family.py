"""What differs from one family of vision-language models to the next, and the list of the families we know."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ImageFeatures = dict[str, torch.Tensor]

# Entries of a batch that belong to its sequences; all others are what the tower is given.
SEQUENCE_ENTRIES = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "pool_mask",
    "is_noise",
    "shown_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "cross_attention_mask",
)


@dataclass(frozen=True)
class Family:
    """A family of models; the defaults fit models of the LLaVA shape, where image features replace placeholder tokens.

    Attributes:
        name: how errors and cards call it.
        model_types: `config.model_type` values that belong to it.
        language_model: path of the decoder inside the base model; all its linears are quantised, nothing else is.
        not_quantized: regular expressions of what stays 16-bit, from the start of a module's name to a dot or its end.
        target_modules: regular expression that matches whole names of the linears to adapt.
        packs: modalities whose sequences can lie one after another in one row (sda_fast.lvlm.packing).
        flash_attention: whether flash attention, which takes no mask, computes what the model means.
    """

    name: str = "generic"
    model_types: tuple[str, ...] = ()
    language_model: str = "language_model"
    not_quantized: tuple[str, ...] = (r"(?:.*\.)?vision_tower", r"(?:.*\.)?multi_modal_projector", r"(?:.*\.)?lm_head")
    target_modules: str = r"(?:.*\.)?language_model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj"
    packs: tuple[str, ...] = ("image", "text")
    flash_attention: bool = True

    def base_model(self, model: nn.Module) -> Any:
        """The model without its language head; `model` itself when it was loaded without one."""
        return getattr(model, getattr(model, "base_model_prefix", ""), model)

    def decoder(self, model: nn.Module) -> Any:
        """The language model inside `model`."""
        return self.base_model(model).get_submodule(self.language_model)

    def tower_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the tower and the projector by name: all of the base model beside the decoder."""
        base = self.base_model(model)
        others = [self.decoder(model), base.get_input_embeddings()]
        beside = {id(tensor) for module in others for tensor in (*module.parameters(), *module.buffers())}
        named = (*base.named_parameters(), *base.named_buffers())
        return {name: tensor for name, tensor in named if id(tensor) not in beside}

    def image_options(self, processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """Keywords of the processor that keep a picture between the bounds on width x height; {}: fixed size."""
        return {}

    def position_ids(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Positions [B, T] counted from each sequence's first unmasked token, 0 under padding."""
        return sequence_positions(batch["attention_mask"])

    def picture_rows(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
        """Per tensor that the tower is given, how many of its rows belong to each sequence.

        A tensor with another number of rows than sequences (patches, tiles) is shared out by image tokens.

        Raises:
            ValueError: the rows cannot be shared out so.
        """
        tokens = image_token_mask(model, batch["input_ids"]).sum(-1).tolist()
        rows = {}
        for name, tensor in batch.items():
            if len(tensor) == len(tokens):
                rows[name] = [1] * len(tokens)
            elif name not in SEQUENCE_ENTRIES:
                if any(count * len(tensor) % sum(tokens) for count in tokens):
                    raise ValueError(f"{name} has {len(tensor)} rows for sequences with {tokens} image tokens")
                rows[name] = [count * len(tensor) // sum(tokens) for count in tokens]
        return {name: own for name, own in rows.items() if name not in SEQUENCE_ENTRIES or name == "input_ids"}

    def pictures(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], places: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """What the tower is given for the pictures of some sequences, their `input_ids` included."""
        pieces = {name: batch[name].split(rows) for name, rows in self.picture_rows(model, batch).items()}
        return {name: torch.cat([own[place] for place in places]) for name, own in pieces.items()}

    def image_features(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[ImageFeatures]:
        """What the frozen tower and projector make of the pixels: per sequence, tensors [image tokens, D] by name."""
        image_features = self.base_model(model).get_image_features
        output = image_features(**accepted(image_features, batch)).pooler_output
        return self.by_sequence(model, batch, features=flat_features(output))

    def by_sequence(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], **features: torch.Tensor
    ) -> list[ImageFeatures]:
        """Split tensors [image tokens of the batch, D] into one dictionary per sequence."""
        counts = image_token_mask(model, batch["input_ids"]).sum(-1).tolist()
        for name, tensor in features.items():
            if sum(counts) != len(tensor):
                raise ValueError(f"the batch has {sum(counts)} image tokens but {len(tensor)} image {name}")
        columns = [tensor.split(counts) for tensor in features.values()]
        return [dict(zip(features, row, strict=True)) for row in zip(*columns, strict=True)]

    def last_hidden_state(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        image_features: Sequence[ImageFeatures] | None,
    ) -> torch.Tensor:
        """The decoder's last hidden state [B, T, D], after its final norm; `image_features` as above, None for text.

        Calls the base model on embeddings, so that its own attention mask applies; without a key-value cache, and
        keeping no other hidden state.
        """
        base = self.base_model(model)
        names = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
        arguments = accepted(base.forward, {name: batch[name] for name in names if name in batch})
        inputs_embeds = self.embed(model, batch["input_ids"], image_features)
        return base(inputs_embeds=inputs_embeds, use_cache=False, **arguments).last_hidden_state

    def embed(
        self, model: nn.Module, input_ids: torch.Tensor, image_features: Sequence[ImageFeatures] | None
    ) -> torch.Tensor:
        """Token embeddings [B, T, D] with the image features in the places of the image tokens."""
        is_image = image_token_mask(model, input_ids)
        embedding = self.base_model(model).get_input_embeddings()
        inputs_embeds = embedding(input_ids.masked_fill(is_image & (input_ids >= embedding.num_embeddings), 0))
        if image_features is None:
            return inputs_embeds
        features = torch.cat([one["features"] for one in image_features]).to(inputs_embeds)
        if int(is_image.sum()) != len(features):
            raise ValueError(f"the batch has {int(is_image.sum())} image tokens but {len(features)} image features")
        return inputs_embeds.masked_scatter(is_image[..., None], features)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names as parameters; transformers' versions differ in them."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def flat_features(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Features in any of transformers' shapes, per image or stacked, as [image tokens, D]."""
    if isinstance(features, torch.Tensor):
        return features.flatten(0, -2)
    return torch.cat([one.flatten(0, -2) for one in features])


def sequence_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """[B, T] mask of 0 and 1 -> [B, T] int64 positions of the unmasked tokens from 0, and 0 where masked."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def image_token_id(config: Any) -> int:
    """The id of the token that image features replace, under either of its names in transformers' configurations."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(f"the configuration of model type {config.model_type!r} names no image token")


def image_token_mask(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: where the image features go."""
    return input_ids == image_token_id(model.config)


_MODULE_OF_MODEL_TYPE = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "mllama": "mllama",
    "gemma3": "gemma3",
}


def known_model_types() -> list[str]:
    """Model types with a family of their own."""
    return sorted(_MODULE_OF_MODEL_TYPE)


def family_of(config: Any) -> Family:
    """The family of a transformers configuration.

    A model type without a family of its own gets the generic one if it is a decoder with image tokens in its input.

    Raises:
        ValueError: neither; the message lists the known model types.
    """
    module = _MODULE_OF_MODEL_TYPE.get(config.model_type, "generic")
    return importlib.import_module(f"sda_fast.lvlm.{module}").family_for(config)
