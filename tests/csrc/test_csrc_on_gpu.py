"""The CUDA library on a real GPU: decode as bitsandbytes does, the fold and the small product against float64,
the gates against a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sda_fast.ops import cuda_library
from sda_fast.ops.gates import moda_gates
from sda_fast.ops.quantized import describe_weight

if not cuda_library.is_available("cuda"):
    pytest.skip(f"no CUDA library to run: {cuda_library.reason_unavailable('cuda')}", allow_module_level=True)
functional = pytest.importorskip("bitsandbytes.functional")

# N, K: whole blocks, rows that straddle blocks, an odd number of elements, one partial block
SHAPES = [(512, 3584), (70, 96), (33, 129), (5, 7), (256, 64)]
# So large that a CTA of the fold goes down several tiles of rows.
SEVERAL_STEPS = (18944, 3584)
DTYPES = [torch.float16, torch.bfloat16]
LARGEST_ERROR = 1.05


def packed(N: int, K: int, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True) -> tuple[Tensor, ...]:
    """A described 4-bit weight and the same in float32."""
    torch.manual_seed(N * K)
    weight = torch.randn(N, K, device="cuda") * K**-0.5
    data, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    parameter = torch.nn.Parameter(data, requires_grad=False)
    parameter.quant_state = state
    return describe_weight(parameter), functional.dequantize_4bit(data, state), (data, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_bitsandbytes_bit_for_bit(shape, quant_type, blocksize, nested, dtype) -> None:
    described, exact, _ = packed(*shape, quant_type=quant_type, blocksize=blocksize, nested=nested)
    out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    assert torch.equal(cuda_library.decode(*described, out), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [8, 16, 40, 72])
@pytest.mark.parametrize("shape", [*SHAPES, SEVERAL_STEPS], ids=str)
def test_the_fold_rounds_once(shape, R, dtype) -> None:
    (N, K), E = shape, 4
    described, exact, _ = packed(N, K)
    lora_A, lora_B = torch.randn(R, K, device="cuda") * K**-0.5, torch.randn(N, R, device="cuda") * 0.3
    gates = torch.softmax(torch.randn(E, device="cuda"), 0)
    out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    cuda_library.decode_fold(*described, lora_A, lora_B, gates, 2.0, out)
    truth = exact.double() + (lora_B.double() * 2.0 * gates.double().repeat_interleave(R // E)) @ lora_A.double()
    allowed = LARGEST_ERROR * (truth.to(dtype).double() - truth).norm() + 2**-20 * truth.norm()
    assert (out.double() - truth).norm() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3, 8, 9, 16, 32, 33, 64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 16], ids=str)
def test_the_small_product_is_no_worse_than_decode_and_multiply(shape, M, dtype) -> None:
    (N, K), R, E = shape, 8, 4
    described, exact, _ = packed(N, K)
    x, bias = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
    h, lora_B = torch.randn(M, R, device="cuda"), torch.randn(N, R, device="cuda") * 0.1
    gates = torch.softmax(torch.randn(E, device="cuda"), 0)
    ranks = 2.0 * gates.repeat_interleave(R // E)
    y = cuda_library.linear(x, *described, bias, h, lora_B, gates, 2.0)
    truth = x.double() @ exact.double().t() + bias.double() + (h.double() * ranks.double()) @ lora_B.double().t()
    plain = torch.nn.functional.linear(x, exact.to(dtype), bias) + ((h * ranks) @ lora_B.t()).to(dtype)
    assert (y.double() - truth).norm() <= LARGEST_ERROR * (plain.double() - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modality", [None, 1])
def test_gates_and_their_gradients_equal_those_of_a_cpu(modality, dtype) -> None:
    on_cpu = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 64), (8, 64))]
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in on_cpu]
    assert cuda_library.takes_gates(*on_gpu)
    expected, gates = moda_gates(*on_cpu, modality), moda_gates(*on_gpu, modality)
    torch.testing.assert_close(gates.cpu(), expected)
    dgates = torch.linspace(-1, 1, gates.numel()).view(gates.shape)
    for one, other in zip(
        torch.autograd.grad(gates, on_gpu, dgates.cuda()), torch.autograd.grad(expected, on_cpu, dgates), strict=True
    ):
        torch.testing.assert_close(one.cpu(), other, atol=1e-6, rtol=torch.finfo(dtype).eps * 4)
