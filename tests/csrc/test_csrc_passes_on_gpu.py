"""The CUDA library's low-rank passes on a real GPU: against float64, their Triton twins and themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sda_fast.kernels import moda_naive as naive
from sda_fast.ops import cuda_library
from sda_fast.ops.dropout import dropout_scale, keep_mask
from sda_fast.ops.moda_linear import moda_linear_group
from sda_fast.ops.passes import CUDA, TRITON, VARIABLE, chosen, passes_for

if not cuda_library.is_available("cuda"):
    pytest.skip(f"no CUDA library to run: {cuda_library.reason_unavailable('cuda')}", allow_module_level=True)

# M, K, N, R, E: one row, tails of every tile, several chunks, the sizes of Qwen2.5-VL-7B and its groups
SHAPES = [
    (1, 8, 8, 8, 8),
    (17, 72, 520, 8, 4),
    (129, 1064, 264, 16, 8),
    (777, 328, 136, 48, 16),
    (2048, 3584, 3584, 8, 8),
    (2049, 3584, 512, 24, 8),
    (500, 3584, 18944, 64, 1),
]
DTYPES = [torch.float16, torch.bfloat16]
SCALING, SEED = 4.0, -7234567890123456789
ROUNDING = 8 * torch.finfo(torch.float32).eps


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def random_gates(layout: str, M: int, E: int) -> tuple[Tensor, Tensor | None, int]:
    if layout == "row_gates":
        return torch.rand(M, E, device="cuda"), None, 1
    rows = 5 if layout == "per_sequence" else 1
    return torch.rand(3, E, device="cuda"), torch.randint(0, 3, (-(-M // rows),), device="cuda"), rows


def assert_as_good_as(actual: Tensor, function, *inputs, output: int | None = None) -> None:
    """No further from function(*inputs) in float64 than the same in plain PyTorch.

    A norm over a few numbers, or over the products of one row, is a matter of luck: up to 64 of them may instead keep
    to the bound derived from three roundings of the terms that they are the sum of.
    """

    def value(convert):
        result = function(*(convert(t) if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs))
        return (result if output is None else result[output]).double()

    truth, plain = value(Tensor.double), value(lambda tensor: tensor)
    assert torch.isfinite(actual).all()
    allowed = 1.05 * torch.linalg.norm(plain - truth) + ROUNDING * torch.linalg.norm(truth)
    error = (actual.double() - truth).abs()
    if actual.numel() <= 64 and torch.linalg.norm(error) > allowed:
        terms = value(lambda tensor: tensor.double().abs())
        assert (error <= (1.5 * torch.finfo(inputs[0].dtype).eps + ROUNDING) * terms).all()
    else:
        assert torch.linalg.norm(error) <= allowed


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("lora_is_narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["per_sequence", "per_row", "row_gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pass_is_as_good_as_plain_pytorch(shape, dropout, layout, dtype, lora_is_narrow) -> None:
    M, K, N, R, E = shape
    lora_dtype = dtype if lora_is_narrow else torch.float32
    x, dx = normal(M, K, dtype=dtype), normal(M, K, dtype=dtype)
    y, dy = normal(M, N, dtype=dtype), normal(M, N, dtype=dtype)
    h, dh = normal(M, R), normal(M, R)
    lora_A, lora_B = normal(R, K, dtype=lora_dtype, scale=0.1), normal(N, R, dtype=lora_dtype, scale=0.1)
    gates, ids, rows = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows)
    drop = {"dropout_p": dropout, "seed": torch.tensor([SEED], device="cuda")}
    mask = (keep_mask(M, K, dropout, SEED, "cuda") if dropout else None), dropout_scale(dropout)

    assert_as_good_as(CUDA.project(x, lora_A, **drop), naive.naive_project, x, lora_A, *mask)
    updated = CUDA.expand_add(y.clone(), h, lora_B, gates, ids, SCALING, rows_per_sequence=rows)
    assert_as_good_as(updated, naive.naive_expand_add, y, h, lora_B, gate)
    inputs = (dy, h, lora_B, gates, ids, SCALING)
    for output, actual in enumerate(CUDA.dy_pass(*inputs, rows_per_sequence=rows)):
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, rows, output=output)
    for adds, before in ((True, dx), (False, torch.zeros_like(dx))):
        new_dx = before.clone() if adds else torch.full_like(dx, float("nan"))
        dA = CUDA.dx_pass(x, dh, lora_A, new_dx, adds=adds, **drop)
        for output, actual in enumerate((dA, new_dx)):
            assert_as_good_as(actual, naive.naive_dx_pass, x, dh, lora_A, before, *mask, output=output)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.99999, 1.0])
def test_both_implementations_drop_the_same_elements(dropout) -> None:
    ones, eye = torch.ones(300, 64, dtype=torch.float16, device="cuda"), torch.eye(64, device="cuda")
    drop = {"dropout_p": dropout, "seed": torch.tensor([SEED], device="cuda")}
    torch.testing.assert_close(CUDA.project(ones, eye, **drop), TRITON.project(ones, eye, **drop), rtol=1e-6, atol=0)


@pytest.mark.parametrize("R", [8, 16, 32, 64])
def test_the_same_inputs_give_the_same_bits(R) -> None:
    x, y, lora_A, lora_B = (normal(*shape) for shape in ((3000, 3584), (3000, 3584), (R, 3584), (3584, R)))
    x, y, h = x.bfloat16(), y.bfloat16(), normal(3000, R)
    gates, ids, rows = random_gates("per_sequence", 3000, 8)
    drop = {"dropout_p": 0.1, "seed": torch.tensor([SEED], device="cuda")}

    def results() -> list[Tensor]:
        dx = y.clone()
        update = (h, lora_B, gates, ids, SCALING)
        updated = CUDA.expand_add(y.clone(), *update, rows_per_sequence=rows)
        backward = CUDA.dy_pass(y, *update, rows_per_sequence=rows)
        dA = CUDA.dx_pass(x, h, lora_A, dx, **drop)
        return [CUDA.project(x, lora_A, **drop), updated, *backward, dA, dx]

    first = results()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(results(), first, strict=True))


@pytest.mark.parametrize("layout", ["per_sequence", "one id"])
def test_a_layer_is_the_same_with_either(layout, monkeypatch) -> None:
    x = normal(4, 100, 256, dtype=torch.bfloat16).requires_grad_()
    weights = [normal(N, 256, dtype=torch.bfloat16, scale=0.06) for N in (512, 128)]
    lora_A = [normal(8, 256, scale=0.06).requires_grad_() for _ in weights]
    lora_B = [normal(len(weight), 8).requires_grad_() for weight in weights]
    gates = [torch.softmax(normal(2, 4), -1).requires_grad_() for _ in weights]
    ids = 1 if layout == "one id" else torch.tensor([0, 1, 0, 1], device="cuda")
    directions = [normal(4, 100, len(weight), dtype=torch.bfloat16) for weight in weights]

    def results(choice: str) -> list[Tensor]:
        monkeypatch.setenv(VARIABLE, choice)
        chosen.cache_clear()
        assert passes_for(8, x.detach()[0]) is (CUDA if choice == "cuda" else TRITON)
        outputs = moda_linear_group(
            x, weights, lora_A, lora_B, gates, ids, scalings=[2.0, 0.5], biases=[None, None], dropout=0.1, seed=3,
            backend="triton",
        )  # fmt: skip
        return [*outputs, *torch.autograd.grad(outputs, [x, *lora_A, *lora_B, *gates], directions)]

    for one, other in zip(results("cuda"), results("triton"), strict=True):
        assert (one.double() - other.double()).norm() <= 4 * torch.finfo(torch.bfloat16).eps * other.double().norm()


def test_cuda_graphs_can_be_captured_over_the_passes() -> None:
    x, lora_A, dx = normal(1024, 512, dtype=torch.bfloat16), normal(8, 512), normal(1024, 512, dtype=torch.bfloat16)
    seed = torch.tensor([SEED], device="cuda")

    def results() -> tuple[Tensor, Tensor, Tensor]:
        h, updated = CUDA.project(x, lora_A, dropout_p=0.1, seed=seed), dx.clone()
        return h, updated, CUDA.dx_pass(x, h, lora_A, updated, dropout_p=0.1, seed=seed)

    expected = results()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
