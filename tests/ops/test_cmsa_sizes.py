"""CMSA at the ends of what it takes: many items, long vectors, offsets beyond 32 bits, views that are not copied."""

import pytest
import torch

from sda_fast import cmsa_loss
from sda_fast.ops import cmsa
from sda_fast.ops.cmsa_blockwise import item_statistics, row_statistics, row_target_sums
from sda_fast.ops.cmsa_naive import naive_cmsa_loss
from sda_fast.ops.cmsa_tiles import Form, Scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = {"torch": torch.float32, "triton": torch.float16}


def loss_and_gradients(function, x, y):
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equals_the_formula(x, y, backend, dtype):
    truth = loss_and_gradients(lambda x, y: naive_cmsa_loss(x, y, 1.3), x.double(), y.double())
    ours = loss_and_gradients(lambda x, y: cmsa_loss(x, y, 1.3, backend=backend), x, y)
    for mine, true in zip(ours, truth, strict=True):
        resolution = torch.finfo(mine.dtype).eps
        atol = 64 * torch.finfo(torch.float32).eps * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(mine.double(), true, rtol=4 * resolution, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_rows_of_262144_items(backend):
    # in the interpreter a program takes milliseconds: fewer items there, and offsets have a test of their own
    items = 262144 if backend == "torch" or DEVICE == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(2 * items, 8, generator=generator).to(DEVICE)
    x, y = pairs[0::2], pairs[1::2]
    temperature = torch.tensor(1.3, device=DEVICE)
    rows = (items - 5, items)
    tiles = cmsa.make_tiles(x, y, temperature, Form(True, False), backend, 0, 0)
    statistics = item_statistics(tiles, row_statistics(tiles, rows, symmetric=False))
    own_x, own_y, x, y = (side.double() for side in (x[-5:], y[-5:], x, y))
    L, S = own_x @ y.T / 1.3, 1.3 / 2 * (own_x @ x.T + own_y @ y.T)
    expected = [L.logsumexp(1), (own_y @ x.T / 1.3).logsumexp(1), S.logsumexp(1), (S.softmax(1) * L).sum(1)]
    in_nats = torch.tensor([1 / 1.3, 1 / 1.3, 1.3 / 2, 1 / 1.3], dtype=torch.float64, device=DEVICE).unsqueeze(1)
    of_rows = statistics[:8, -5:].double().view(4, 2, 5).sum(1) * in_nats
    torch.testing.assert_close(of_rows, torch.stack(expected), rtol=1e-5, atol=1e-5)
    # with every log-sum-exp of S at 40 bits and every c at one and a half, q is known and so is the sum of c
    scores = (1.3 / 2 * (own_x @ x.T + own_y @ y.T)).exp().sum(1) * 2.0**-40
    statistics[2:6] = torch.tensor([[1.0], [0.5], [40 / Scales.at(1.3).teacher], [0.0]])
    received, given, high, low = row_target_sums(tiles, rows, statistics, symmetric=False)[:, -5:]
    for mine, factor in ((received, 1), (given, 1), (high + low, 1.5)):
        torch.testing.assert_close(mine, factor * scores, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimensions", [8, 8192])
def test_short_and_long_vectors(backend, dimensions):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(9, dimensions, generator=generator) / dimensions**0.5 for _ in range(2))
    dtype = DTYPES[backend]
    assert_equals_the_formula(x.to(DEVICE, dtype), y.to(DEVICE, dtype), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend):
    # memory that is never touched costs nothing on a CPU
    items, stride = 40, 2**26
    memory = torch.empty(items * stride, dtype=torch.float16, device=DEVICE)
    generator = torch.Generator().manual_seed(2)
    sides = []
    for start in (0, 64):
        side = memory.as_strided((items, 12), (stride, 1), start)
        side.copy_(torch.randn(items, 12, generator=generator))
        sides.append(side)
    expected = [side.clone() for side in sides]
    loss = cmsa_loss(*sides, 1.3, backend=backend)
    assert (items - 1) * stride > 2**31 and loss == cmsa_loss(*expected, 1.3, backend=backend)
    assert_equals_the_formula(*expected, backend, torch.float16)
    ours = loss_and_gradients(lambda x, y: cmsa_loss(x, y, 1.3, backend=backend), *sides)
    contiguous = loss_and_gradients(lambda x, y: cmsa_loss(x, y, 1.3, backend=backend), *expected)
    assert all(map(torch.equal, ours, contiguous))


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_rows_reach_the_tiles_without_a_copy(backend, monkeypatch):
    pairs = torch.randn(26, 9, device=DEVICE, requires_grad=True)
    seen = []
    make_tiles = cmsa.make_tiles

    def spy(x, y, *arguments):
        seen.append((x.data_ptr(), x.stride(), y.data_ptr(), y.stride()))
        return make_tiles(x, y, *arguments)

    monkeypatch.setattr(cmsa, "make_tiles", spy)
    cmsa_loss(pairs[0::2], pairs[1::2], 2.0, backend=backend).backward()
    start = pairs.data_ptr()
    assert seen == 2 * [(start, (18, 1), start + 9 * 4, (18, 1))]
