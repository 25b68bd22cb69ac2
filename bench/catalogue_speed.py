"""Embedding a catalogue in items per second: ours beside one small LoRA per expert in a loop, on a 16-bit model.

The model is Qwen2.5-VL from its configuration with random weights: the whole 7B one on a GPU (with --quick its widths
and the first layers), a small one on a CPU. All contestants have the same weights (the decoded NF4 ones) and the same
adapter, so that they compute the same vectors. Both sequences of every item are encoded, the vision tower included;
drawing and tokenising the items is not timed.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contest import Contestant, Record, contest, relative_error
from decoder_layer import SLACK, dense_of, quantise_linears, randomise
from nf4_products import DTYPE, EXPERTS, RANK
from sda_fast import MoDAConfig, MoDALinear, adapt_model
from sda_fast.data.items import read_items
from sda_fast.data.synthetic import generate_catalogue
from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode, tower_features
from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tiny import build_model, build_processor
from sda_fast.moda.context import current_modality

logger = logging.getLogger(__name__)

MODALITIES = ("image", "text")
LOOP, FLOOR = "loop over experts, 16-bit", "no adapter, 4-bit"


class ExpertLoop(nn.Module):
    """MoDA as published, from the parameters of a MoDALinear: adapters and their input in float32, one by one."""

    def __init__(self, base_layer: nn.Module, adapter: MoDALinear) -> None:
        super().__init__()
        rank = adapter.r // adapter.num_experts
        self.base_layer, self.scaling, self.names = base_layer, adapter.scaling, adapter.modality_names
        self.lora_A = nn.ParameterList(part.clone() for part in adapter.lora_A.detach().float().split(rank))
        self.lora_B = nn.ParameterList(part.clone() for part in adapter.lora_B.detach().float().split(rank, dim=1))
        self.gate_embedding, self.gate_proj = adapter.gate_embedding.detach(), adapter.gate_proj.detach()

    def forward(self, x: Tensor) -> Tensor:
        result, wide = self.base_layer(x), x.float()
        modality = current_modality().resolve(self.names, self.gate_embedding.shape[0], x.device)
        gates = torch.softmax(self.gate_embedding[modality] @ self.gate_proj.t(), dim=-1)
        for gate, A, B in zip(gates, self.lora_A, self.lora_B, strict=True):
            update = nn.functional.linear(nn.functional.linear(wide, A), B) * self.scaling
            result = result + (update * gate).to(result.dtype)
        return result


def measure_catalogue(device: torch.device, seconds: float, *, quick: bool) -> list[Record]:
    """The records of one catalogue, times of a batch of its items in milliseconds and items per second."""
    num_items = 32 if device.type == "cuda" else 8
    with tempfile.TemporaryDirectory() as folder:
        paths = generate_catalogue(Path(folder) / "catalogue", num_items=max(num_items, 64), num_users=10)
        catalogue = read_items(paths.items)
        lvlm = random_model(catalogue, device, quick=quick)
        items = [catalogue[i] for i in range(num_items)]
        batches = {"image": collate_images(lvlm, items), "text": collate_texts(lvlm, items)}
    layers = lvlm.language_model.config.num_hidden_layers
    name = f"Qwen2.5-VL, width {lvlm.hidden_size}, {layers} layers, {num_items} items a batch"
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches.values())
    case = {"part": "embedding", "case": name, "items": num_items, "tokens": tokens}

    quantise_linears(lvlm.language_model, device)
    ours = sharing_copy(lvlm)
    adapt_model(ours.model, MoDAConfig(r=RANK, num_experts=EXPERTS))
    randomise(ours.model)
    ours.model.eval()
    kept = sharing_copy(ours)
    for module in kept.model.modules():
        if isinstance(module, MoDALinear):
            module.cache_folded = True
    dense = with_dense_weights(lvlm, DTYPE)
    contestants = {
        LOOP: with_loops(ours, dense),
        FLOOR: lvlm,
        "MoDA, 4-bit": ours,
        "MoDA, 4-bit, folded weights kept": kept,
        "MoDA, 16-bit": with_dense_bases(ours, dense),
    }
    features = tower_features(lvlm, batches["image"])
    adapted, frozen = truth_and_allowance(ours, batches, features), truth_and_allowance(lvlm, batches, features)
    entries: dict[str, Contestant | str] = {}
    for name, model in contestants.items():
        truth, allowed = frozen if name == FLOOR else adapted
        # Plain PyTorch rounds weight and output of a layer; the loop rounds the output once more per expert.
        allowed *= math.sqrt(1 + EXPERTS / 2) if name == LOOP else 1.0
        entries[name] = Contestant(partial(vectors, model, batches), truth, allowed)
    records = contest(case, entries, device, seconds=seconds, against=(LOOP, FLOOR))
    for record in records:
        if "milliseconds" in record:
            record["items_per_second"] = round(1e3 * num_items / record["milliseconds"][1], 3)
    return records


def random_model(catalogue: Any, device: torch.device, *, quick: bool) -> LVLM:
    """The model in 16 bits with the real processor, its tokenizer trained on the catalogue."""
    processor = build_processor(
        catalogue, PromptConfig(), vocab_size=2048, image_side=252 if device.type == "cuda" else 84
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if device.type == "cpu":
            model = build_model(processor.tokenizer, hidden_size=256, num_layers=2 if quick else 4)
        else:
            model = full_model(processor.tokenizer, device, layers=4 if quick else 28)
    model = model.to(device, DTYPE).eval().requires_grad_(False)
    return LVLM(model, processor, family_of(model.config), "random")


def full_model(tokenizer: Any, device: torch.device, *, layers: int) -> Any:
    """Qwen2.5-VL-7B's sizes (transformers' defaults for the tower), weights drawn on the device in 16 bits."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    small = build_model(tokenizer, hidden_size=64, num_layers=1).config
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 4096, "vocab_size": small.text_config.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    ids = {name: getattr(small, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            return Qwen2_5_VLModel(config)
    finally:
        torch.set_default_dtype(before)


def vectors(lvlm: LVLM, batches: dict[str, Any]) -> Tensor:
    """[2 B, D], the image vectors above the text vectors."""
    with torch.no_grad():
        return torch.cat([encode(lvlm, batches[modality], modality) for modality in MODALITIES])


def sharing_copy(lvlm: LVLM) -> LVLM:
    """A model of its own modules on the same tensors."""
    memo = {id(tensor): tensor for tensor in (*lvlm.model.parameters(), *lvlm.model.buffers())}
    return LVLM(copy.deepcopy(lvlm.model, memo), lvlm.processor, lvlm.family, lvlm.name)


def replace(lvlm: LVLM, make: Any) -> LVLM:
    """A copy whose every decoder linear of the frozen or adapted kind is what `make(name, layer)` gives."""
    new = sharing_copy(lvlm)
    decoder = new.language_model
    # The outermost ones alone: an adapted layer holds the frozen one.
    names = [name for name, module in decoder.named_modules() if hasattr(module, "in_features")]
    names = [name for name in names if not name.endswith(".base_layer")]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, make(name, decoder.get_submodule(name)))
    return new


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def with_dense_weights(lvlm: LVLM, dtype: torch.dtype) -> LVLM:
    """The frozen model with its decoder's weights decoded."""
    return replace(lvlm, lambda name, layer: dense_linear(dense_of(layer), layer.bias, dtype))


def with_loops(ours: LVLM, dense: LVLM) -> LVLM:
    """The adapted model with a loop over experts in place of every adapted layer, on dense weights."""
    decoder = dense.language_model
    return replace(ours, lambda name, layer: ExpertLoop(decoder.get_submodule(name), layer))


def with_dense_bases(ours: LVLM, dense: LVLM) -> LVLM:
    """The adapted model on dense weights."""
    decoder = dense.language_model

    def on_dense(name: str, layer: MoDALinear) -> MoDALinear:
        layer.base_layer = decoder.get_submodule(name)
        return layer

    return replace(ours, on_dense)


def truth_and_allowance(lvlm: LVLM, batches: dict[str, Any], features: Any) -> tuple[Tensor, float]:
    """The vectors in float32 with dense weights, the update merged, and the error they may have in 16 bits."""
    results = []
    for dtype in (torch.float32, DTYPE):
        parts = []
        for number, modality in enumerate(MODALITIES):
            merged = replace(lvlm, lambda name, layer, m=number: dense_linear(dense_of(layer, m), layer.bias, dtype))  # noqa: B023
            merged.model.to(dtype)
            of_images = [{k: v.to(dtype) for k, v in one.items()} for one in features] if modality == "image" else None
            with torch.no_grad():
                parts.append(encode(merged, batches[modality], modality, image_features=of_images))
            del merged
        results.append(torch.cat(parts))
    truth, plain = results
    return truth, SLACK * relative_error(plain, truth)
