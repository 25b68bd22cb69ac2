"""The whole forward of a Qwen2.5-VL decoder layer in evaluation: frozen, PEFT LoRA, and ours folded and not."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from contest import Contestant, Record, contest, relative_error
from nf4_products import DTYPE, EXPERTS, RANK, update_of
from sda_fast import MoDAConfig, MoDALinear, adapt_model, modality
from sda_fast.ops import cuda_library
from sda_fast.ops.fold_regimes import forced_evaluation
from sda_fast.tune import plain_weight

SIZES = {
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip
FROZEN = "frozen, bitsandbytes"
# How much further from the truth than the same layer with dense 16-bit weights in plain PyTorch a result may be.
SLACK = 1.5


def layer_cases(device: torch.device, *, quick: bool) -> list[tuple[str, int, int]]:
    """Size, sequences and tokens of each."""
    if device.type == "cuda":
        few = [("Qwen2.5-VL-7B", 1, 1), ("Qwen2.5-VL-7B", 1, 64), ("Qwen2.5-VL-7B", 16, 64), ("Qwen2.5-VL-7B", 64, 128)]
        return few if quick else [*few, ("Qwen2.5-VL-7B", 1, 16), ("Qwen2.5-VL-7B", 4, 64), ("Qwen2.5-VL-7B", 256, 128)]
    small = [("small", 1, 16), ("small", 4, 64), ("small", 16, 64)]
    return small if quick else [*small, ("Qwen2.5-VL-7B", 1, 16)]


def measure_layer(size: str, sequences: int, tokens: int, device: torch.device, seconds: float) -> list[Record]:
    """The records of one decoder layer."""
    rows = sequences * tokens
    case = {
        "part": "decoder layer",
        "case": f"{size}, {sequences} x {tokens} tokens, M={rows}",
        "size": size,
        "M": rows,
    }
    config = text_config(size)
    x = torch.randn(sequences, tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
    x = x.to(device, DTYPE)
    positions = rotary(config, x)
    frozen, ours, peft = (quantised_layer(config, device) for _ in range(3))
    with torch.no_grad():
        adapt_model(ours, MoDAConfig(r=RANK, num_experts=EXPERTS))
        randomise(ours)
        kept = quantised_layer(config, device)
        adapt_model(kept, MoDAConfig(r=RANK, num_experts=EXPERTS))
        randomise(kept)
        for module in kept.modules():
            if isinstance(module, MoDALinear):
                module.cache_folded = True
        ours.eval(), kept.eval()

    def step(layer: nn.Module, way: str | None = None) -> Tensor:
        by_library = cuda_library.is_available(device)
        choose = forced_evaluation(way, by_library=by_library and way == "fold") if way else nullcontext()  # type: ignore[arg-type]
        with torch.no_grad(), modality(0), choose:
            return layer(x, position_embeddings=positions)

    plain, adapted = truths(frozen, config, x), truths(ours, config, x)
    entries: dict[str, Contestant | str] = {
        FROZEN: Contestant(partial(step, frozen), *plain),
        "PEFT LoRA": peft_entry(peft, config, x, step),
        "MoDA, chosen here": Contestant(partial(step, ours), *adapted),
        "MoDA, folded": Contestant(partial(step, ours, "fold"), *adapted),
        "MoDA, folded weights kept": Contestant(partial(step, kept), *adapted),
        "MoDA, unfolded": Contestant(partial(step, ours, "unfold"), *adapted),
    }
    return contest(case, entries, device, seconds=seconds, against=(FROZEN, "PEFT LoRA"))


def text_config(size: str) -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    sizes = SIZES[size]
    head = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    section = [head // 4, head // 8 * 3, head - head // 4 - head // 8 * 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    config = Qwen2_5_VLTextConfig(**sizes, num_hidden_layers=1, rope_parameters=rope)
    config._attn_implementation = "sdpa"
    return config


def rotary(config: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    places = torch.arange(x.shape[1], device=x.device).expand(3, x.shape[0], -1)
    return Qwen2_5_VLRotaryEmbedding(config).to(x.device)(x, places)


def decoder_layer(config: Any, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A layer with the same random weights for the same config."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Qwen2_5_VLDecoderLayer(config, 0)
    return layer.to(device, dtype).eval().requires_grad_(False)


def quantised_layer(config: Any, device: torch.device) -> nn.Module:
    """The layer with its linears in NF4, nested statistics, as QLoRA has them."""
    layer = decoder_layer(config, device, DTYPE)
    quantise_linears(layer, device)
    return layer.eval()


def quantise_linears(model: nn.Module, device: torch.device | str, *, compute_dtype: torch.dtype = DTYPE) -> None:
    """Replace every nn.Linear of a model by a bitsandbytes NF4 one with nested statistics, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            # On the meta device: a weight of its own would be drawn, on the CPU, only to be replaced.
            packed = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=compute_dtype,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            if linear.bias is not None:
                packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, packed.to(device))


def randomise(model: nn.Module, std: float = 0.2) -> None:
    """Give every B a value, so large that a wrong update fails the check: about a sixth of the weight with a gate."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def peft_entry(layer: nn.Module, config: Any, x: Tensor, step: Any) -> Contestant | str:
    """PEFT's LoRA of the same total rank on every linear."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return "peft is not installed"
    names = sorted(
        {name.rsplit(".", 1)[-1] for name, module in layer.named_modules() if hasattr(module, "in_features")}
    )
    layer.is_loaded_in_4bit = True  # type: ignore[assignment]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapted = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=32, target_modules=names), layer)
    randomise(adapted, std=0.2 / EXPERTS)  # no gate divides it
    adapted.eval()
    return Contestant(partial(step, adapted), *truths(adapted, config, x))


def dense_of(linear: Any, modality_id: int = 0) -> Tensor:
    """The weight that a linear layer multiplies by for one modality, update included, float32."""
    if isinstance(linear, MoDALinear):
        return dense_of(linear.base_layer) + update_of(linear, modality_id)
    if hasattr(linear, "lora_A"):
        update = linear.lora_B["default"].weight.float() @ linear.lora_A["default"].weight.float()
        return dense_of(linear.base_layer) + linear.scaling["default"] * update
    return plain_weight(linear).float()


def truths(layer: nn.Module, config: Any, x: Tensor) -> tuple[Tensor, float]:
    """What a layer should give, in float32 with dense weights, and the error it may have."""
    results = []
    for dtype in (torch.float32, DTYPE):
        dense = decoder_layer(config, x.device, dtype)
        with torch.no_grad():
            for name, linear in dense.named_modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(dense_of(layer.get_submodule(name)))
            values = x.to(dtype)
            results.append(dense(values, position_embeddings=rotary(config, values)))
        del dense
    truth, plain = results
    return truth, SLACK * relative_error(plain, truth)
