"""Every way of decoding (PyTorch, Triton, CUDA emulated on the host) against bitsandbytes' own, over random formats."""

import math
import random
from dataclasses import dataclass

import pytest
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
    num_bytes = (rows * columns + 1) // 2
    if num_bytes == 1 or num_bytes % storage.itemsize:
        storage = torch.uint8
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(chance.getrandbits(32)))
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
    return Case(shape, block_size, quant_type, nested, storage, dtype, packed, state, layout, data, statistics)


def expected(case: Case) -> torch.Tensor:
    """bitsandbytes' decode of the flattened matrix: its CPU kernel is wrong where blocks straddle rows (0.50.2)."""
    absmax = case.state.absmax
    if case.nested:
        absmax = functional.dequantize_blockwise(absmax, case.state.state2) + case.state.offset
    flat = (1, case.state.shape.numel())
    packed = case.packed.view(torch.uint8)
    out = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, case.block_size, case.quant_type, flat, case.dtype)
    return out.view(case.shape)


def assert_equal(out: torch.Tensor, case: Case) -> None:
    assert torch.equal(out, expected(case)), case.settings()


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
