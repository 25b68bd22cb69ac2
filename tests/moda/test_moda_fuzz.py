"""4-bit layers of random shapes and settings in evaluation, every way against float64, copied and saved in between."""

from __future__ import annotations

import copy
import io
import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDALinear
from sda_fast.ops import folding
from sda_fast.ops.fold_regimes import forced_evaluation
from sda_fast.ops.quantized import decode, describe_weight

bnb = pytest.importorskip("bitsandbytes")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WAYS = ("chosen", "fold", "unfold", "bitsandbytes", "kept")
LEADING = ((), (0,), (1,), (5,), (70,), (2, 3), (0, 3), (2, 0, 3))
ROUNDS = 1000


def random_size(chance: random.Random, largest: int) -> int:
    return chance.choice((1, 2, 17, 32, 33, 64, 96, 128, chance.randint(1, largest)))


def random_layer(chance: random.Random) -> MoDALinear:
    N, K = random_size(chance, 200), random_size(chance, 300)
    quant_type, blocksize = chance.choice(("nf4", "fp4")), chance.choice((32, 64, 128, 256, 1024, 4096))
    base = bnb.nn.Linear4bit(K, N, bias=chance.random() < 0.7, compute_dtype=torch.bfloat16, quant_type=quant_type)
    weight = torch.randn(N, K) * K**-0.5
    kinds = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": chance.random() < 0.5}
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kinds)
    experts, adapter_dtype = chance.choice((1, 2, 4, 8)), chance.choice((torch.float32, torch.bfloat16))
    one = MoDALinear(base.to("cpu"), r=experts * chance.randint(1, 3), num_experts=experts, adapter_dtype=adapter_dtype)
    nn.init.normal_(one.lora_B, std=0.2)
    return one.eval()


def as_it_is_or_copied(chance: random.Random, one: MoDALinear) -> MoDALinear:
    choice = chance.randrange(4)
    if choice == 0:
        return copy.deepcopy(one)
    if choice == 1:
        file = io.BytesIO()
        torch.save(one, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return one


def random_input(chance: random.Random, K: int) -> Tensor:
    dtype, leading = chance.choice(DTYPES), chance.choice(LEADING)
    if len(leading) == 1 and chance.random() < 0.4:
        return torch.randn(K, *leading).to(dtype).t()
    step = chance.choice((1, 1, 1, 2))
    return torch.randn(*leading, step * K).to(dtype)[..., ::step]


def exact_and_bound(one: MoDALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """y in float64, and the most that any of the ways may be off (docs/folding.md)."""
    u = torch.finfo(x.dtype).eps / 2
    u, summing = u / (1 - 8 * u), min(u, 2**-24)
    weight, wide = decode(*describe_weight(one.weight), torch.float32).double(), x.double()
    bias = torch.zeros(()) if one.bias is None else one.bias.to(x.dtype).double()
    gate = one.scaling * one.gates(1)[0].detach().double().repeat_interleave(one.r // one.num_experts)
    lora_A, lora_B = one.lora_A.detach().double(), one.lora_B.detach().double()
    y = wide @ weight.t() + bias + (wide @ lora_A.t() * gate) @ lora_B.t()
    h = wide.abs() @ lora_A.abs().t()
    base, update = wide.abs() @ weight.abs().t() + bias.abs(), (h * gate) @ lora_B.abs().t()
    # A rounded number too small for a relative error adds this, times what it is multiplied with.
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps / 2
    gated = (lora_B.abs() * gate).sum(1)
    sums = wide.abs().sum(-1, keepdim=True)
    numbers = (2 + gated) * sums + gated + lora_B.abs().sum(1) + (h * gate).sum(-1, keepdim=True) + 4
    accumulated = 2 * (x.shape[-1] + one.r + 4) * summing * (base + update)
    return y, u * (4 * base + 6 * update) + accumulated + smallest * numbers


def test_every_way_is_right_to_the_bound_for_random_layers_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, seen = random.Random(0), Counter()
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for _ in range(ROUNDS):
            monkeypatch.setattr(folding, "ELEMENTS_PER_CHUNK", {"cpu": chance.choice((1, 50, 1000, 1 << 17))})
            one, way = as_it_is_or_copied(chance, random_layer(chance)), chance.choice(WAYS)
            one.cache_folded = way == "kept"
            x = random_input(chance, one.in_features)
            exact, bound = exact_and_bound(one, x)
            for _ in range(2):
                with nullcontext() if way in ("chosen", "kept") else forced_evaluation(way):  # type: ignore[arg-type]
                    y = one(x, 1)
                about = (way, x.dtype, tuple(x.shape), x.stride(), describe_weight(one.weight)[0], one.r)
                assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], one.out_features), about
                assert ((y.double() - exact).abs() <= bound).all(), about
            assert bool(one.folded.by_modality) == (way == "kept")
            seen[way] += 1
    assert min(seen[way] for way in WAYS) > ROUNDS // 10
