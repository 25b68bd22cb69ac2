"""MoDA in every family's model against an independent one: a loop over the experts, written down from the paper.

Nothing of sda_fast computes the reference: the layers, the gates, the 4-bit weights (by bitsandbytes), the pooling and
the loss are plain PyTorch. Both run in float64, transformers' own steps to float32 included, so that what remains is
the rounding of sums in another order.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sda_fast import MoDAConfig, adapt_model
from sda_fast.losses.modules import CMSALoss
from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import load_lvlm
from sda_fast.moda.inject import named_moda_parameters, target_layers

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]
RANK, EXPERTS, ALPHA, GATE_DIM = 8, 4, 32, 64
TEMPERATURE = 3.0
# Of the largest value; float64 rounds at 2e-16, and a value is the end of some ten thousand sums and products.
TOLERANCE = 1e-11


class KeepDouble(TorchFunctionMode):
    """Whoever asks for float32 of a float64 tensor, or of positions, gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if function is torch.Tensor.float and first.dtype in (torch.float64, torch.int64):
            return first.double()
        single = torch.float32 in args or kwargs.get("dtype") is torch.float32
        if single and isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            kwargs |= {"dtype": torch.float64} if "dtype" in kwargs else {}
        return function(*args, **kwargs)


def frozen_weight(layer):
    """The layer's weight, decoded by bitsandbytes where it is in 4 bits."""
    if layer.weight.dtype != torch.uint8:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


class ExpertLoop(nn.Module):
    """A frozen linear layer plus, one after the other, scaled and gated low-rank experts."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        inputs, outputs, rank = base.in_features, base.out_features, RANK // EXPERTS
        self.downs = nn.ModuleList(nn.Linear(inputs, rank, bias=False) for _ in range(EXPERTS))
        self.ups = nn.ModuleList(nn.Linear(rank, outputs, bias=False) for _ in range(EXPERTS))
        self.modality_embedding = nn.Embedding(2, GATE_DIM)
        self.gate = nn.Linear(GATE_DIM, EXPERTS, bias=False)
        self.modality = None

    def forward(self, x):
        gates = torch.softmax(self.gate(self.modality_embedding.weight[self.modality]), dim=-1)
        y = functional.linear(x, frozen_weight(self.base), self.base.bias)
        for gate, down, up in zip(gates, self.downs, self.ups, strict=True):
            y = y + ALPHA / RANK * gate * up(down(x))
        return y

    def take(self, values):
        """The parameters of a MoDALinear, cut into the experts'."""
        with torch.no_grad():
            for expert, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
                rows = slice(expert * RANK // EXPERTS, (expert + 1) * RANK // EXPERTS)
                down.weight.copy_(values["lora_A"][rows])
                up.weight.copy_(values["lora_B"][:, rows])
            self.modality_embedding.weight.copy_(values["gate_embedding"])
            self.gate.weight.copy_(values["gate_proj"])

    def gradients(self):
        """As those of a MoDALinear's parameters."""
        return {
            "lora_A": torch.cat([down.weight.grad for down in self.downs]),
            "lora_B": torch.cat([up.weight.grad for up in self.ups], dim=1),
            "gate_embedding": self.modality_embedding.weight.grad,
            "gate_proj": self.gate.weight.grad,
        }


def plain_cmsa(images, texts, temperature):
    """The loss as its definition reads, with all matrices (DESIGN.md section 4)."""
    logits = images @ texts.T / temperature
    targets = torch.softmax(temperature * (images @ images.T + texts @ texts.T) / 2, dim=1)
    forth = -(targets * torch.log_softmax(logits, dim=1)).sum(1)
    back = -(targets.T * torch.log_softmax(logits.T, dim=1)).sum(1)
    return (forth + back).mean() / 2


def to_double(model):
    """All floating-point parameters and buffers; 4-bit weights stay as they are."""
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.double()


def fresh(folder, quantization):
    lvlm = load_lvlm(folder, quantization=quantization, dtype=torch.float32, device="cpu")
    to_double(lvlm.model)
    return lvlm


def decode_frozen_layers(model, adapted):
    """Layers in 4 bits without an adapter become float64 ones: bitsandbytes' own product on a CPU has no float64."""
    for name, layer in list(model.named_modules()):
        if name not in adapted and isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(frozen_weight(layer)), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain.requires_grad_(False))


def double_batches(lvlm, items):
    batches = {"image": collate_images(lvlm, items), "text": collate_texts(lvlm, items)}
    return {
        which: {name: one.double() if one.is_floating_point() else one for name, one in batch.items()}
        for which, batch in batches.items()
    }


def loop_vectors(lvlm, loops, batch, modality):
    """The model called as transformers calls it, and the mean over unmasked tokens."""
    for loop in loops.values():
        loop.modality = ("image", "text").index(modality)
    inputs = {name: one for name, one in batch.items() if name not in ("pool_mask", "is_noise", "position_ids")}
    states = lvlm.model(**inputs, position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    mask = batch["attention_mask"].double()
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def close(ours, theirs):
    scale = theirs.abs().max().clamp_min(1e-3)
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() <= TOLERANCE * scale, (float((ours - theirs).abs().max()), float(scale))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_gradients_and_vectors_are_those_of_a_loop_over_experts(family_folder, items, model_type, quantization):
    ours, theirs = (fresh(family_folder(model_type), quantization) for _ in range(2))
    config = MoDAConfig(
        r=RANK, num_experts=EXPERTS, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=ours.family.target_modules
    )
    decode_frozen_layers(ours.model, target_layers(ours.model, config))
    names = adapt_model(ours.model, config)
    decode_frozen_layers(theirs.model, names)
    to_double(ours.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in named_moda_parameters(ours.model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    values = dict(named_moda_parameters(ours.model))
    theirs.model.requires_grad_(False)
    loops = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        loop = loops[name] = ExpertLoop(theirs.model.get_submodule(name)).double()
        loop.take({part: values[f"{name}.{part}"] for part in ("lora_A", "lora_B", "gate_embedding", "gate_proj")})
        setattr(theirs.model.get_submodule(parent), last, loop)

    loss_module = CMSALoss(TEMPERATURE).double()
    # The module holds the logarithm, made in float32.
    temperature = loss_module.log_temperature.detach().exp().requires_grad_()
    with KeepDouble():
        batches = double_batches(ours, items)
        vectors = {which: encode(ours, batch, which) for which, batch in batches.items()}
        loss = loss_module(vectors["image"], vectors["text"])
        loss.backward()
        expected = {which: loop_vectors(theirs, loops, batch, which) for which, batch in batches.items()}
        expected_loss = plain_cmsa(expected["image"], expected["text"], temperature)
        expected_loss.backward()

    for which in ("image", "text"):
        close(vectors[which].detach(), expected[which].detach())
    assert (vectors["image"] - vectors["text"]).abs().max() > 1e-2
    close(loss.detach(), expected_loss.detach())
    close(loss_module.log_temperature.grad, temperature.grad * temperature.detach())
    for name, loop in loops.items():
        for part, gradient in loop.gradients().items():
            assert gradient.abs().max() > 0, (name, part)
            close(values[f"{name}.{part}"].grad, gradient)
