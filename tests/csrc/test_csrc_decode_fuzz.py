"""Every way of decoding (PyTorch, Triton, CUDA emulated on the host) against bitsandbytes' own, over random formats."""

import copy
import dataclasses
import io
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

from sda_fast.ops.quantized import WeightLayout, decode, decode_absmax, decode_in_pytorch, describe_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int8)


@pytest.fixture(autouse=True)
def uncompiled():
    """bitsandbytes compiles its statistics' decode, which costs more than all these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass
class Case:
    shape: tuple[int, int]
    block_size: int
    quant_type: str
    nested: bool
    storage: torch.dtype
    dtype: torch.dtype
    packed: torch.Tensor
    state: object
    parameter: torch.nn.Parameter
    layout: WeightLayout
    data: torch.Tensor
    statistics: list[torch.Tensor]

    def settings(self):
        return self.shape, self.block_size, self.quant_type, self.nested, self.storage, self.dtype


def random_case(chance: random.Random, dtypes, largest: int) -> Case:
    """A weight quantised by bitsandbytes, its sizes log-uniform, seen as our code sees a layer's weight."""
    numel = math.exp(chance.uniform(0, math.log(largest)))
    rows = max(1, round(math.exp(chance.uniform(0, math.log(numel) if numel > 1 else 0))))
    columns = max(1, round(numel / rows))
    if chance.random() < 0.3:
        columns = max(8, columns // 8 * 8)
    shape = (rows, columns)
    block_size, quant_type = chance.choice(BLOCK_SIZES), chance.choice(("nf4", "fp4"))
    nested, storage, dtype = chance.random() < 0.5, chance.choice(STORAGE_DTYPES), chance.choice(dtypes)
    return case_of(shape, block_size, quant_type, nested, storage, dtype, chance.getrandbits(32))


def case_of(
    shape: tuple[int, int],
    block_size: int,
    quant_type: str,
    nested: bool,
    storage: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> Case:
    """One weight of these kinds; bytes that its storage dtype cannot hold whole are stored as bytes."""
    num_bytes = (shape[0] * shape[1] + 1) // 2
    if num_bytes == 1 or num_bytes % storage.itemsize:
        storage = torch.uint8
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    parameter = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )
    layout, data, statistics = describe_weight(parameter)
    kinds = (shape, block_size, quant_type, nested, storage, dtype)
    return Case(*kinds, packed, state, parameter, layout, data, statistics)


def expected(case: Case, scales: Callable[[torch.Tensor], torch.Tensor] = lambda absmax: absmax) -> torch.Tensor:
    """bitsandbytes' decode of the flattened matrix: its CPU kernel is wrong where blocks straddle rows (0.50.2)."""
    absmax = case.state.absmax
    if case.nested:
        absmax = functional.dequantize_blockwise(absmax, case.state.state2) + case.state.offset
    absmax = scales(absmax)
    flat = (1, case.state.shape.numel())
    packed = case.packed.view(torch.uint8)
    out = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, case.block_size, case.quant_type, flat, case.dtype)
    return out.view(case.shape)


def assert_equal(out: torch.Tensor, case: Case) -> None:
    assert torch.equal(out, expected(case)), case.settings()


def saved_and_loaded(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """As transformers writes a 4-bit layer to safetensors and reads it again."""
    state = {name: tensor.contiguous() for name, tensor in parameter.quant_state.as_dict(packed=True).items()}
    loaded = safetensors.torch.load(safetensors.torch.save({"weight": parameter.data, **state}))
    return bitsandbytes.nn.Params4bit.from_prequantized(loaded.pop("weight"), loaded, device="cpu")


def pickled(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    buffer = io.BytesIO()
    torch.save(parameter, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def moved(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if torch.cuda.is_available():
        parameter = parameter.to("cuda")
        assert describe_weight(parameter)[1].is_cuda
    return parameter.to("cpu")


def repacked_for_a_cpu(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """As bitsandbytes leaves a weight that it evaluated on a CPU with AVX-512: in another layout, scales rounded."""
    again = copy.deepcopy(parameter)
    again.data, again.quant_state = functional._convert_weight_packed_for_cpu(again.data, again.quant_state)
    return again


TRANSPORTS = (saved_and_loaded, pickled, moved, copy.deepcopy)


def test_what_was_saved_moved_or_copied_decodes_to_the_same_on_thousands_of_formats():
    chance = random.Random(3)
    for number in range(2000):
        case = random_case(chance, (torch.bfloat16, torch.float16, torch.float32), 10_000)
        transport = TRANSPORTS[number % len(TRANSPORTS)]
        again = describe_weight(transport(case.parameter))
        assert again[0].blocksize == case.block_size and again[1].dtype == case.storage, case.settings()
        assert torch.equal(decode(*again, case.dtype), expected(case)), (transport, case.settings())


def test_weights_that_bitsandbytes_repacked_decode_to_its_own_values_with_rounded_scales():
    chance = random.Random(4)
    for quant_type, nested, storage in itertools.product(("nf4", "fp4"), (True, False), STORAGE_DTYPES):
        for block_size in BLOCK_SIZES:
            shape = 32 * chance.randint(1, 3), block_size * chance.randint(1, 3)
            case = case_of(shape, block_size, quant_type, nested, storage, torch.float32, chance.getrandbits(32))
            again = describe_weight(repacked_for_a_cpu(case.parameter))
            assert torch.equal(
                decode(*again, torch.float32), expected(case, lambda absmax: absmax.bfloat16().float())
            ), case.settings()


def test_the_random_formats_cover_every_kind():
    """What the tests here draw, counted by the same generator that the largest of them starts from."""
    chance, seen = random.Random(0), Counter()
    for _ in range(3000):
        case = random_case(chance, (torch.bfloat16, torch.float16, torch.float32), 30_000)
        rows, columns = case.shape
        seen[case.quant_type, case.nested, case.block_size] += 1
        seen[case.storage] += 1
        seen["odd K"] += columns % 2
        seen["odd N"] += rows % 2
        seen["odd N * K"] += rows * columns % 2
        seen["blocks straddle rows"] += rows > 1 and columns % case.block_size != 0
        seen["the last block is partial"] += rows * columns % case.block_size != 0
        seen["one block is all"] += rows * columns <= case.block_size
    kinds = itertools.product(("nf4", "fp4"), (True, False), BLOCK_SIZES)
    assert all(seen[kind] >= 50 for kind in kinds) and all(seen[storage] >= 100 for storage in STORAGE_DTYPES)
    named = [name for name in seen if isinstance(name, str)]
    assert len(named) == 6 and all(seen[name] >= 300 for name in named), {name: seen[name] for name in named}


def test_pytorch_decode_equals_bitsandbytes_on_thousands_of_formats():
    chance = random.Random(0)
    for _ in range(3000):
        case = random_case(chance, (torch.bfloat16, torch.float16, torch.float32), 30_000)
        assert_equal(decode(case.layout, case.data, case.statistics, case.dtype), case)
        out = torch.full((case.shape[0] * case.shape[1],), float("nan"), dtype=case.dtype)
        codes = case.data.reshape(-1).view(torch.uint8)
        decode_in_pytorch(case.layout, codes, decode_absmax(case.layout, case.statistics), case.statistics[1], out)
        assert_equal(out.view(case.shape), case)


def test_triton_decode_equals_bitsandbytes():
    pytest.importorskip("triton")
    from sda_fast.kernels.nf4 import decode_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance = random.Random(1)
    for _ in range(120):
        case = random_case(chance, (torch.float16, torch.float32), 4000)
        out = torch.full(case.shape, float("nan"), dtype=case.dtype, device=device)
        statistics = [tensor.to(device) for tensor in case.statistics]
        codes = case.data.reshape(-1).view(torch.uint8).to(device)
        decode_4bit(codes, statistics, case.shape, case.block_size, case.layout.nested_blocksize, out=out)
        assert_equal(out.cpu(), case)


def test_cuda_decode_equals_bitsandbytes(emulated_kernels):
    chance = random.Random(2)
    for _ in range(1000):
        case = random_case(chance, (torch.bfloat16, torch.float16), 20_000)
        out = torch.full(case.shape, float("nan"), dtype=case.dtype)
        assert_equal(emulated_kernels.decode(case.packed, case.state, out), case)


def test_cuda_fold_rounds_the_exact_sum_once(emulated_kernels):
    chance, kernels = random.Random(5), Counter()
    for _ in range(150):
        case = random_case(chance, (torch.bfloat16, torch.float16), 6000)
        if chance.random() < 0.7:
            shape = case.shape[0] % 150 + 1, max(32, case.shape[1] // 32 * 32) % 1024 + 32
            kinds = case.block_size, case.quant_type, case.nested, torch.uint8, case.dtype
            case = case_of(shape, *kinds, chance.getrandbits(32))
        kernels["tensor cores" if case.shape[1] % 32 == 0 else "any shape"] += 1
        experts = chance.choice((1, 2, 3, 8))
        rank = experts * chance.choice((1, 2, 4, 5))
        lora_dtype = chance.choice((torch.float32, torch.bfloat16))
        generator = torch.Generator().manual_seed(chance.getrandbits(32))
        lora_A = (0.1 * torch.randn(rank, case.shape[1], generator=generator)).to(lora_dtype)
        lora_B = (0.1 * torch.randn(case.shape[0], rank, generator=generator)).to(lora_dtype)
        gates = torch.rand(experts, generator=generator)
        out = torch.full(case.shape, float("nan"), dtype=case.dtype)
        emulated_kernels.decode_fold(case.packed, case.state, lora_A, lora_B, gates, 2.0, out)
        scaled_B = lora_B.double() * (2.0 * gates.double()).repeat_interleave(rank // experts)
        exact = expected(dataclasses.replace(case, dtype=torch.float32)).double() + scaled_B @ lora_A.double()
        half_ulp = 2.0**-8 if case.dtype == torch.bfloat16 else 2.0**-11
        slack = 2.0**-19 * (scaled_B.abs() @ lora_A.double().abs() + exact.abs())
        allowed = half_ulp * exact.abs() + slack + 2.0**-25
        assert ((out.double() - exact).abs() <= allowed).all(), (case.settings(), rank, experts, lora_dtype)
    assert min(kernels.values()) >= 20, kernels
