"""A model without weights: built from its configuration on fake tensors, its decoder's linears as packed 4-bit ones."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast.lvlm.family import Family, family_of
from sda_fast.lvlm.load import LVLM, read_config
from sda_fast.ops.quantized import decode_absmax, describe_weight, is_4bit, state_of

NF4_BLOCK = 64
NESTED_BLOCK = 256


def preset_configs() -> dict[str, Any]:
    """Hub name -> the configuration published with it, for when the hub cannot be reached."""
    from transformers import MllamaConfig, Qwen2_5_VLConfig

    qwen = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
        tie_word_embeddings=False,
    )  # fmt: skip
    llama = MllamaConfig(
        text_config={
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        vision_config={
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
            "attention_heads": 16, "image_size": 560, "patch_size": 14, "max_num_tiles": 4, "vision_output_dim": 7680,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=128256,
    )  # fmt: skip
    return {"Qwen/Qwen2.5-VL-7B-Instruct": qwen, "meta-llama/Llama-3.2-11B-Vision-Instruct": llama}


def config_of_model(name: str) -> tuple[Any, bool]:
    """A model's configuration, and whether it is a preset because nothing else could be read.

    Raises:
        FileNotFoundError: no such folder, configuration file, hub model in reach or preset.
        ValueError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    try:
        return (AutoConfig.from_pretrained(name) if name.endswith(".json") else read_config(name)), False
    except OSError as error:
        presets = preset_configs()
        if name in presets:
            return presets[name], True
        raise FileNotFoundError(f"{error}; without the hub there are {', '.join(presets)}") from error


def fake_lvlm(
    config: Any,
    name: str,
    *,
    quantization: str,
    dtype: torch.dtype,
    double_quant: bool = True,
    processor: Any = None,
) -> LVLM:
    """What `load_lvlm` would return, on fake tensors; call it inside a FakeTensorMode."""
    from transformers import AutoModel

    family = family_of(config)
    model = AutoModel.from_config(config, dtype=dtype)
    if quantization == "nf4":
        pack_decoder(model, family, double_quant)
    model.eval().requires_grad_(False)
    return LVLM(model, processor, family, name)


def pack_decoder(model: nn.Module, family: Family, double_quant: bool) -> None:
    """Put a packed stand-in in the place of every linear of the decoder, as `load_lvlm` quantises them."""
    for parent in list(family.decoder(model).modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear4bit(child, double_quant))


class Linear4bit(nn.Linear):
    """The shape of bitsandbytes' layer of this name: NF4 codes, and statistics, quantised themselves with double_quant.

    A product decodes the whole weight into new memory and frees it again, as bitsandbytes does for many rows.
    """

    def __init__(self, linear: nn.Linear, double_quant: bool = True) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device, elements = linear.weight.device, linear.weight.numel()
        packed = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        blocks = -(-elements // NF4_BLOCK)
        nested = SimpleNamespace(
            absmax=torch.empty(-(-blocks // NESTED_BLOCK), device=device),
            code=torch.empty(256, device=device),
            blocksize=NESTED_BLOCK,
        )
        self.weight.quant_state = SimpleNamespace(  # type: ignore[attr-defined]
            shape=linear.weight.shape,
            quant_type="nf4",
            blocksize=NF4_BLOCK,
            nested=double_quant,
            absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device),
            code=torch.empty(16, device=device),
            offset=torch.empty((), device=device) if double_quant else None,
            state2=nested if double_quant else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        return Product4bit.apply(x, self.weight, self.bias)


class Product4bit(torch.autograd.Function):
    """x W^T + bias with W decoded for the length of the product, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer = weight
        return torch.nn.functional.linear(x, decoded_anew(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ decoded_anew(ctx.layer, dy.dtype), None, None


def decoded_anew(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The decoded weight in memory of its own."""
    import bitsandbytes  # noqa: F401

    layout, data, statistics = describe_weight(weight)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        data, decode_absmax(layout, statistics), layout.blocksize, "nf4", list(state_of(weight).shape), dtype
    )


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors that the frozen model holds, statistics of 4-bit weights included."""
    yield from (parameter for parameter in model.parameters() if not parameter.requires_grad)
    yield from model.buffers()
    for parameter in model.parameters():
        if is_4bit(parameter):
            yield from describe_weight(parameter)[2]
