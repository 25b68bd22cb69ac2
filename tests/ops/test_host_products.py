"""The host library's low-rank products on a CPU with AMX: no less exact than PyTorch's, whatever the shapes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sda_fast import MoDALinear
from sda_fast.ops import host_library, host_products, moda_torch
from sda_fast.ops.moda_linear import moda_linear_group

compiler = runpy.run_path(str(Path(__file__).resolve().parents[2] / "csrc" / "host" / "compile.py"))
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 96, 127, 128, 129, 200, 321])
COLUMNS = st.sampled_from([1, 2, 17, 31, 32, 33, 64, 100, 257, 512, 520])
RANKS = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 64, 65, 256])
SEEDS = st.integers(0, 2**31)
THREADS = st.sampled_from([1, 2, 3])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = compiler["reason_not_to_build"]()
    if reason is not None:
        pytest.skip(reason)
    output = tmp_path_factory.mktemp("host") / "libsda_fast_host.so"
    compiler["build"](output)
    if not host_products.has_low_rank(output):
        pytest.skip("this processor has no AMX, or the kernel does not lend it")
    return output


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_library, "LIBRARY_PATH", built)
    return built


@pytest.fixture
def nan_in_new_memory():
    """What torch.empty gives is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_matrix(generator: torch.Generator, rows: int, columns: int, strided: bool, dtype: torch.dtype) -> Tensor:
    """Of unit column stride; where `strided`, columns 3 on of a wider matrix."""
    wider = torch.randn(rows, columns + 5 if strided else columns, generator=generator).to(dtype)
    return wider[:, 3 : columns + 3] if strided else wider


def random_factor(generator: torch.Generator, ranks: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    shape = (columns, ranks) if transposed else (ranks, columns)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values.t() if transposed else values


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def no_worse(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`got` may err as PyTorch does in the same dtypes, and by float32's rounding."""
    assert got.shape == exact.shape
    assert error(got, exact) <= 1.02 * error(plain, exact) + 1e-6


@pytest.mark.usefixtures("library", "nan_in_new_memory")
@fuzz
@given(
    rows=ROWS, columns=COLUMNS, ranks=RANKS, seed=SEEDS, threads=THREADS, strided=st.booleans(),
    transposed=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_project_errs_no_more_than_pytorch(rows, columns, ranks, seed, threads, strided, transposed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = random_matrix(generator, rows, columns, strided, torch.bfloat16)
    lora_A = random_factor(generator, ranks, columns, transposed, dtype)
    narrow = lora_A.bfloat16()
    with threads_of_torch(threads):
        h = host_products.project(x, lora_A)
    assert h.is_contiguous() and h.dtype == torch.float32
    no_worse(h, x @ narrow.t(), x.double() @ narrow.double().t())


@pytest.mark.usefixtures("library")
@fuzz
@given(rows=ROWS, columns=COLUMNS, ranks=RANKS, seed=SEEDS, threads=THREADS, transposed=st.booleans(), data=st.data())
def test_expand_add_errs_no_more_than_pytorch_and_writes_nothing_else(
    rows, columns, ranks, seed, threads, transposed, data
):
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(rows + 2, columns + 7, generator=generator).bfloat16()
    before, inside = buffer.clone(), (slice(1, -1), slice(3, columns + 3))
    h = random_matrix(generator, rows, ranks, True, torch.float32)
    factors = random_factor(generator, ranks, columns, transposed, torch.float32)
    gates = random_gates(data, generator, rows, ranks)
    with threads_of_torch(threads):
        y = host_products.expand_add(buffer[inside], h, gates, factors)
    assert y.data_ptr() == buffer[inside].data_ptr()
    narrow = (h if gates is None else moda_torch.gated(h, gates)).bfloat16()
    exact = before[inside].double() + narrow.double() @ factors.bfloat16().double()
    no_worse(y, before[inside].contiguous().addmm_(narrow, factors.bfloat16()), exact)
    buffer[inside], before[inside] = 0, 0
    assert torch.equal(buffer, before)


def random_gates(data: st.DataObject, generator: torch.Generator, rows: int, ranks: int) -> Tensor | None:
    """None, or a line for every so many rows."""
    lines = data.draw(st.sampled_from([None, *(count for count in range(1, rows + 1) if rows % count == 0)]))
    return None if lines is None else torch.rand(lines, ranks, generator=generator)


@pytest.mark.usefixtures("library", "nan_in_new_memory")
@fuzz
@given(
    rows=ROWS, columns=COLUMNS, ranks=RANKS, seed=SEEDS, threads=THREADS, strided=st.booleans(), data=st.data(),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_dy_pass_errs_no_more_than_pytorch(rows, columns, ranks, seed, threads, strided, needs, data):
    generator = torch.Generator().manual_seed(seed)
    dy = random_matrix(generator, rows, columns, strided, torch.bfloat16)
    h = random_matrix(generator, rows, ranks, strided, torch.float32)
    lora_B = random_factor(generator, columns, ranks, strided, torch.float32)
    gates = random_gates(data, generator, rows, ranks)
    gates = torch.ones(1, ranks) if gates is None else gates
    wanted = dict(zip(("needs_dh", "needs_B", "needs_gates"), needs, strict=True))
    with threads_of_torch(threads):
        got = host_products.dy_pass(dy, lora_B, h, gates, **wanted)
    plain = moda_torch.dy_pass(dy, lora_B, h, gates, **wanted)
    dhg = dy.double() @ lora_B.bfloat16().double()
    exact = (
        moda_torch.gated(dhg, gates.double()),
        dy.double().t() @ moda_torch.gated(h, gates).bfloat16().double(),
        dhg * h.double(),
    )
    for one, of_pytorch, truth, needed in zip(got, plain, exact, needs, strict=True):
        assert (one is not None) == needed
        if one is not None:
            assert one.is_contiguous() and one.dtype == torch.float32
            no_worse(one, of_pytorch, truth)


@pytest.mark.usefixtures("library", "nan_in_new_memory")
@fuzz
@given(rows=ROWS, columns=COLUMNS, ranks=RANKS, seed=SEEDS, threads=THREADS, strided=st.booleans())
def test_outer_errs_no_more_than_pytorch(rows, columns, ranks, seed, threads, strided):
    generator = torch.Generator().manual_seed(seed)
    x = random_matrix(generator, rows, columns, strided, torch.bfloat16)
    dh = random_matrix(generator, rows, ranks, strided, torch.float32)
    with threads_of_torch(threads):
        dA = host_products.outer(x, dh)
    narrow = dh.bfloat16()
    no_worse(dA, narrow.t() @ x, narrow.double().t() @ x.double())


class threads_of_torch:
    """torch.get_num_threads() says so many; torch's own pool stays as it is."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.real = torch.get_num_threads
        torch.get_num_threads = lambda: self.threads

    def __exit__(self, *_) -> None:
        torch.get_num_threads = self.real


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_share_the_rows_and_repeat_their_sums(threads: int) -> None:
    rows, columns, ranks = 2100, 1030, 12
    x, y = torch.randn(rows, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    h, lora_A, gates = torch.randn(rows, ranks), torch.randn(ranks, columns), torch.rand(rows, ranks)
    wanted = {"needs_dh": True, "needs_B": True, "needs_gates": True}

    def everything() -> list[Tensor | None]:
        passed = host_products.dy_pass(x, lora_A.t(), h, gates, **wanted)
        updated = host_products.expand_add(y.clone(), h, gates, lora_A)
        return [host_products.project(x, lora_A), updated, *passed, host_products.outer(x, h)]

    with threads_of_torch(1):
        alone = everything()
    with threads_of_torch(threads):
        together, again = everything(), everything()
    assert all(map(torch.equal, together, again))
    of_all_rows = (3, 5)  # dB and dA
    for place, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert error(other, one.double()) < 1e-6 if place in of_all_rows else torch.equal(one, other)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("columns", [64, 77])
def test_what_is_not_finite_stays_in_its_row(columns: int) -> None:
    x = torch.randn(70, columns).bfloat16()
    lora_A, h = torch.randn(9, columns), torch.randn(70, 9)
    spoilt = x.clone()
    spoilt[3, -1], spoilt[69, 0] = float("inf"), float("nan")
    others = [row for row in range(70) if row not in (3, 69)]
    assert torch.equal(host_products.project(spoilt, lora_A)[others], host_products.project(x, lora_A)[others])
    assert not host_products.project(spoilt, lora_A)[[3, 69]].isfinite().any()
    dA, of_spoilt = host_products.outer(x, h), host_products.outer(spoilt, h)
    assert torch.equal(of_spoilt[:, 1:-1], dA[:, 1:-1])
    assert not of_spoilt[:, [0, -1]].isfinite().any()
    y, of_spoilt = (host_products.expand_add(one.clone(), h, None, lora_A) for one in (x, spoilt))
    assert torch.equal(of_spoilt[others], y[others])
    assert of_spoilt[3, -1] == float("inf") and of_spoilt[69, 0].isnan()


@pytest.mark.usefixtures("library")
def test_only_many_rows_and_few_ranks_in_bfloat16_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = torch.zeros(64, 48, dtype=torch.bfloat16)
    assert host_products.can_take(x, 8)
    assert not host_products.can_take(x.float(), 8)
    assert not host_products.can_take(x.half(), 8)
    assert not host_products.can_take(x[:0], 8)
    assert not host_products.can_take(x[:1], 8)
    assert not host_products.can_take(x[:, :0], 8)
    assert not host_products.can_take(x, 0)
    assert not host_products.can_take(x, 256)
    assert not host_products.can_take(x.to("meta"), 8)
    monkeypatch.setattr(host_library, "LIBRARY_PATH", tmp_path / "absent.so")
    assert not host_products.can_take(x, 8)


IDS = {"one": 1, "per sequence": [0, 1, 1, 0], "per token": [[0, 1, 1] * 17, [1] * 51, [0] * 51, [1, 0, 0] * 17]}


def forward_and_backward(
    dtype: torch.dtype, seed: int, dropout: float, r: int, num_experts: int, ids: str
) -> list[Tensor]:
    """y and all gradients of a layer whose B is not zero; in float64 from the same bfloat16 values."""
    torch.manual_seed(seed)
    layer = MoDALinear(
        nn.Linear(72, 40, bias=r == 6).bfloat16(), r=r, num_experts=num_experts, lora_dropout=dropout,
        generator=torch.Generator().manual_seed(seed + 1),
    ).train()  # fmt: skip
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(4, 51, 72).bfloat16(), torch.randn(4, 51, 40).bfloat16()
    if dtype == torch.float64:
        layer.double()
    x = x.to(dtype).requires_grad_()
    y = layer(x, torch.tensor(IDS[ids]) if ids == "per token" else IDS[ids])
    y.backward(dy.to(dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.adapter_tensors())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("r", "num_experts"), [(8, 8), (8, 1), (6, 2), (32, 32), (24, 4)])
@pytest.mark.parametrize("ids", IDS)
def test_a_layer_errs_no_more_with_the_library_than_without(
    dropout: float, r: int, num_experts: int, ids: str, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squares = torch.zeros(2, 6, dtype=torch.float64)
    for seed in range(4):
        case = (seed, dropout, r, num_experts, ids)
        exact = forward_and_backward(torch.float64, *case)
        monkeypatch.setattr(host_library, "LIBRARY_PATH", built)
        with_library = forward_and_backward(torch.bfloat16, *case)
        monkeypatch.setattr(host_library, "LIBRARY_PATH", tmp_path / "absent.so")
        without = forward_and_backward(torch.bfloat16, *case)
        assert not torch.equal(with_library[3], without[3]), "the library was not used"
        for place, (one, other, truth) in enumerate(zip(with_library, without, exact, strict=True)):
            assert one.dtype == other.dtype and one.stride() == other.stride()
            squares[:, place] += torch.tensor([error(one, truth) ** 2, error(other, truth) ** 2])
    of_library, of_pytorch = squares
    # y, dx, dA and dB as test_moda_linear compares them; a few sums over everything make up the gates' gradients.
    assert (of_library <= 1.2 * of_pytorch)[:4].all(), (of_library / of_pytorch).sqrt()
    if num_experts > 1:
        assert (of_library[4:] / 4).sqrt().max() < torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("library")
def test_layers_of_one_group_give_what_they_give_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(100, 64, generator=generator).bfloat16().requires_grad_()
    ranks, sizes = (8, 4, 12), (40, 33, 8)
    lora_A = [torch.randn(r, 64, generator=generator, requires_grad=True) for r in ranks]
    lora_B = [torch.randn(n, r, generator=generator, requires_grad=True) for n, r in zip(sizes, ranks, strict=True)]
    gates = [torch.rand(2, 4, generator=generator, requires_grad=True) for _ in ranks]
    weights = [torch.randn(n, 64, generator=generator).bfloat16() for n in sizes]
    dys = [torch.randn(100, n, generator=generator).bfloat16() for n in sizes]
    ids = torch.tensor([0, 1, 1, 0, 1] * 20)

    def gradients(groups: list[list[int]]) -> list[Tensor]:
        for tensor in (x, *lora_A, *lora_B, *gates):
            tensor.grad = None
        for group in groups:
            chosen = [[kind[one] for one in group] for kind in (weights, lora_A, lora_B, gates)]
            y = moda_linear_group(x, *chosen, ids, scalings=[2.0] * len(group), biases=[None] * len(group))
            torch.autograd.backward(y, [dys[one] for one in group])
        return [tensor.grad.clone() for tensor in (*lora_A, *lora_B, *gates)]

    for one, other in zip(gradients([[0, 1, 2]]), gradients([[0], [1], [2]]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
