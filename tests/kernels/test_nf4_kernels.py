"""The 4-bit kernels against bitsandbytes and against the plain formula, over every layout of codes and scales."""

from __future__ import annotations

import random

import pytest
import torch

from sda_fast.kernels import moda_naive as naive
from sda_fast.kernels import nf4_linear
from sda_fast.kernels.nf4 import decode_4bit
from sda_fast.kernels.nf4_linear import small_linear_4bit

functional = pytest.importorskip("bitsandbytes").functional

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter computes wrongly in bfloat16.
HALF = torch.bfloat16 if ON_GPU else torch.float16
SCALING = 2.0
# Rows that start a block, a byte, neither; one row; a weight smaller than a block.
SHAPES = [(64, 128), (33, 96), (5, 70), (7, 33), (1, 130), (1, 1)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def quantize(shape, blocksize, quant_type="nf4", nested=False):
    """(data, statistics, nested blocksize) as the kernels take them, and the exact weight in float32."""
    weight = torch.randn(shape, device=DEVICE)
    data, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    statistics, nested_blocksize, absmax = [state.absmax, state.code], 0, state.absmax
    if nested:
        outer = state.state2
        statistics = [state.absmax, state.code, outer.absmax, outer.code, state.offset]
        nested_blocksize = outer.blocksize
        blocks = torch.arange(state.absmax.numel(), device=DEVICE)
        absmax = outer.code[state.absmax.long()] * outer.absmax[blocks // nested_blocksize] + state.offset
    flat = data.view(-1)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).view(-1)[: weight.numel()].long()
    exact = state.code[codes] * absmax[torch.arange(weight.numel(), device=DEVICE) // blocksize]
    return flat, statistics, nested_blocksize, exact.view(shape), functional.dequantize_4bit(data, state)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decoding_is_exact(shape, blocksize, nested, quant_type):
    data, statistics, nested_blocksize, exact, theirs = quantize(shape, blocksize, quant_type, nested)
    for dtype in (torch.float32, HALF):
        out = poisoned(*shape, dtype=dtype)
        assert decode_4bit(data, statistics, shape, blocksize, nested_blocksize, out=out) is out
        assert torch.equal(out, exact.to(dtype))
    # bitsandbytes 0.50.2 decodes wrongly on a CPU where blocks straddle rows.
    if ON_GPU or shape[1] % blocksize == 0:
        assert torch.equal(theirs, exact)


def test_nested_statistics_span_several_outer_blocks():
    shape = (160, 128)
    data, statistics, nested_blocksize, exact, theirs = quantize(shape, 32, nested=True)
    assert statistics[2].numel() > 1
    assert torch.equal(decode_4bit(data, statistics, shape, 32, nested_blocksize, dtype=torch.float32), exact)
    assert torch.equal(theirs, exact)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_may_begin_anywhere_in_their_memory(offset):
    shape = (24, 128)
    data, statistics, nested_blocksize, exact, _ = quantize(shape, 64, nested=True)
    moved = torch.cat((data.new_zeros(offset), data))[offset:]
    assert moved.data_ptr() % 4 == offset % 4
    x = torch.randn(3, 128, device=DEVICE)
    decoded = decode_4bit(moved, statistics, shape, 64, nested_blocksize, dtype=torch.float32)
    assert torch.equal(decoded, exact)
    same = [small_linear_4bit(x, codes, statistics, 24, 64, nested_blocksize) for codes in (data, moved)]
    assert torch.equal(*same)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 256])
@pytest.mark.parametrize("R, E", [(1, 1), (24, 8), (128, 4)])
def test_fold_rounds_once(shape, blocksize, R, E):
    data, statistics, nested_blocksize, exact, _ = quantize(shape, blocksize, nested=True)
    N, K = shape
    lora_A = torch.randn(R, K, device=DEVICE) * 0.05
    lora_B, gates = torch.randn(N, R, device=DEVICE), torch.rand(E, device=DEVICE)
    gated = lora_B.double() * gates.double().repeat_interleave(R // E)
    truth = exact.double() + SCALING * gated @ lora_A.double()
    terms = exact.double().abs() + SCALING * gated.abs() @ lora_A.double().abs()
    fold = {"lora_A": lora_A, "lora_B": lora_B, "gates": gates, "scaling": SCALING}
    for dtype in (torch.float32, HALF):
        out = decode_4bit(
            data, statistics, shape, blocksize, nested_blocksize, out=poisoned(*shape, dtype=dtype), **fold
        )
        # Half a step of the result's dtype, and float32 rounding of the terms on the way.
        allowed = torch.finfo(dtype).eps / 2 * truth.abs() + 8 * torch.finfo(torch.float32).eps * terms
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((out.double() - truth).abs() <= allowed + smallest).all()


@pytest.mark.parametrize("M", [1, 17, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["frozen", "per_sequence", "row_gates"])
def test_small_product_is_as_good_as_pytorch(M, shape, layout):
    (N, K), R, E, blocksize = shape, 24, 8, 64
    data, statistics, nested_blocksize, exact, _ = quantize(shape, blocksize, nested=layout != "frozen")
    for dtype in (torch.float32, HALF):
        frame = poisoned(M, K + 3, dtype=dtype)
        x = frame[:, 1 : K + 1].copy_(torch.randn(M, K))
        bias = None if layout == "frozen" else torch.randn(N, device=DEVICE).to(dtype)
        options, gate = {}, torch.zeros(M, R, device=DEVICE)
        h, lora_B = torch.randn(M, R, device=DEVICE), torch.randn(N, R, device=DEVICE) * 0.1
        if layout != "frozen":
            ids = None if layout == "row_gates" else torch.randint(0, 2, (-(-M // 3),), device=DEVICE)
            gates = torch.rand(M if ids is None else 2, E, device=DEVICE)
            gate = naive.naive_gate(gates, ids, SCALING, M, R, 3)
            options = {"h": h, "lora_B": lora_B, "gates": gates, "modality_ids": ids}
            options |= {"scaling": SCALING, "rows_per_sequence": 3, "bias": bias}
        out = poisoned(M, N, dtype=dtype)
        y = small_linear_4bit(x, data, statistics, N, blocksize, nested_blocksize, out=out, **options)
        weight = exact.to(dtype)
        doubles = [t if t is None else t.double() for t in (x, exact, bias, h, lora_B, gate)]
        truth = naive.naive_gated_linear(*doubles)
        plain = naive.naive_gated_linear(x, weight, bias, h, lora_B, gate)
        terms = naive.naive_gated_linear(*(t if t is None else t.abs() for t in doubles))
        error = (y.double() - truth).abs()
        eps = torch.finfo(torch.float32).eps
        allowed = 1.05 * torch.linalg.norm(plain.double() - truth) + 8 * eps * torch.linalg.norm(truth)
        few_and_bounded = y.numel() <= 64 and (error <= (3 * torch.finfo(dtype).eps / 2 + 8 * eps) * terms).all()
        assert torch.linalg.norm(error) <= allowed or few_and_bounded


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_small_product_adds_its_parts_of_k_to_the_whole(M, blocksize, monkeypatch):
    N, K, R, E = 33, 1280, 24, 8
    data, statistics, nested_blocksize, exact, _ = quantize((N, K), blocksize, nested=True)
    x, bias = torch.randn(M, K, device=DEVICE), torch.randn(N, device=DEVICE)
    h, lora_B = torch.randn(M, R, device=DEVICE), torch.randn(N, R, device=DEVICE) * 0.1
    gates = torch.rand(1, E, device=DEVICE)
    options = {"bias": bias, "h": h, "lora_B": lora_B, "gates": gates, "scaling": SCALING, "rows_per_sequence": M}
    options["modality_ids"] = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    parts = []
    empty = torch.empty
    monkeypatch.setattr(nf4_linear.torch, "empty", lambda *shape, **o: (parts.append(shape), empty(*shape, **o))[1])
    results = []
    for programs in (1, 6, 64, 64):
        monkeypatch.setattr(nf4_linear, "programs_wanted", lambda device, programs=programs: programs)
        out = poisoned(M, N)
        results.append(small_linear_4bit(x, data, statistics, N, blocksize, nested_blocksize, out=out, **options))
    splits = [shape[0] for shape in parts if len(shape) == 3]
    assert splits[0] == 1 < splits[1] < splits[2] == splits[3]
    assert torch.equal(results[2], results[3])
    gate = naive.naive_gate(gates, options["modality_ids"], SCALING, M, R, M)
    doubles = [t.double() for t in (x, exact, bias, h, lora_B, gate)]
    truth, terms = naive.naive_gated_linear(*doubles), naive.naive_gated_linear(*(t.abs() for t in doubles))
    for y in results:
        assert ((y.double() - truth).abs() <= (K + R + 4) * torch.finfo(torch.float32).eps * terms).all()


FUZZ_ROUNDS = 150


def random_weight(chance):
    """A shape, what `quantize` makes of it, and an update for it."""
    N, K = chance.choice((1, 2, 33, 64, chance.randint(1, 80))), chance.choice((1, 17, 32, 65, chance.randint(1, 300)))
    blocksize, quant_type = chance.choice((32, 64, 128, 512, 4096)), chance.choice(("nf4", "fp4"))
    E = chance.choice((1, 3, 8))
    R = E * chance.choice((1, 2, 5))
    update = torch.randn(R, K) * 0.1, torch.randn(N, R) * 0.1, torch.rand(E)
    # bitsandbytes compiles its statistics' decode, which costs more than the kernels.
    with torch.compiler.set_stance("force_eager"):
        made = quantize((N, K), blocksize, quant_type, nested=chance.random() < 0.5)[:4]
    return (N, K), blocksize, *made, *(tensor.to(DEVICE) for tensor in update)


def test_fold_is_right_for_random_shapes_and_settings():
    chance = random.Random(0)
    for _ in range(FUZZ_ROUNDS):
        shape, blocksize, data, statistics, nested_blocksize, exact, lora_A, lora_B, gates = random_weight(chance)
        dtype = chance.choice((torch.float32, HALF))
        fold = {"lora_A": lora_A, "lora_B": lora_B, "gates": gates, "scaling": SCALING}
        out = poisoned(*shape, dtype=dtype)
        decode_4bit(data, statistics, shape, blocksize, nested_blocksize, out=out, **fold)
        gated = SCALING * lora_B.double() * gates.double().repeat_interleave(lora_B.shape[1] // gates.numel())
        truth = exact.double() + gated @ lora_A.double()
        terms = exact.double().abs() + gated.abs() @ lora_A.double().abs()
        allowed = torch.finfo(dtype).eps / 2 * truth.abs() + 8 * torch.finfo(torch.float32).eps * terms
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((out.double() - truth).abs() <= allowed + smallest).all(), (shape, blocksize, lora_A.shape, dtype)


def test_small_product_is_right_for_random_shapes_and_settings():
    chance = random.Random(1)
    for _ in range(FUZZ_ROUNDS):
        shape, blocksize, data, statistics, nested_blocksize, exact, _, lora_B, gates = random_weight(chance)
        (N, K), R, M = shape, lora_B.shape[1], chance.choice((1, 2, 5, 16, 17, 33, 64))
        dtype, splits = chance.choice((torch.float32, HALF)), chance.choice((0, 1, 2, 3, 99))
        x, h = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(M, R, device=DEVICE)
        out = poisoned(M, N, dtype=dtype)
        options = {"h": h, "lora_B": lora_B, "gates": gates[None], "scaling": SCALING, "rows_per_sequence": M}
        small_linear_4bit(x, data, statistics, N, blocksize, nested_blocksize, out=out, splits=splits, **options)
        gate = SCALING * gates.double().repeat_interleave(R // gates.numel())
        doubles = x.double(), exact.double(), None, h.double(), lora_B.double(), gate
        truth = naive.naive_gated_linear(*doubles)
        terms = naive.naive_gated_linear(*(t if t is None else t.abs() for t in doubles))
        # The weight and y are rounded to the dtype of x, sums are float32; float16 has few small numbers.
        allowed = (torch.finfo(dtype).eps + (K + R + 4) * torch.finfo(torch.float32).eps) * terms
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (x.double().abs().sum(1)[:, None] + 1)
        assert ((out.double() - truth).abs() <= allowed + smallest).all(), (M, shape, blocksize, R, dtype, splits)


def test_small_product_refuses_many_rows():
    data, statistics, _, _, _ = quantize((4, 64), 64)
    with pytest.raises(ValueError, match="65 rows"):
        small_linear_4bit(torch.zeros(65, 64, device=DEVICE), data, statistics, 4, 64)
