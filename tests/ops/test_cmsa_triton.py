"""The Triton kernels of CMSA (in Triton's interpreter where there is no GPU) against the formulas written out."""

import numpy as np
import pytest
import torch

from sda_fast import cmsa_loss, infonce_loss
from sda_fast.ops import cmsa
from sda_fast.ops.cmsa_naive import naive_cmsa_loss, naive_infonce_loss
from sda_fast.ops.cmsa_products import forced_products
from sda_fast.ops.cmsa_tiles import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
FORMS = [{}, {"detach_teacher": True}, {"row_normalized_targets": True}, {"targets": "hard"}]


@pytest.fixture(params=["in kernel", "library"], autouse=True)
def way(request):
    with forced_products(request.param):
        yield request.param


def naive(x, y, temperature, form):
    if form.get("targets") == "hard":
        return naive_infonce_loss(x, y, temperature)
    return naive_cmsa_loss(x, y, temperature, **form)


def loss_and_gradients(function, pairs, dtype, temperature=1.3):
    pairs = pairs.to(dtype).requires_grad_()
    temperature = torch.tensor(temperature, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    temperature.requires_grad_()
    loss = function(pairs[0::2], pairs[1::2], temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (pairs, temperature))]


def draw(items, dimensions, dtype, scale=0.5):
    generator = torch.Generator().manual_seed(items)
    return (torch.randn(2 * items, dimensions, generator=generator) * scale).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("items", "dimensions", "block_size"), [(2, 8, None), (17, 5, None), (129, 40, 70)])
def test_kernels_equal_the_formula_on_interleaved_rows(dtype, form, items, dimensions, block_size):
    pairs = draw(items, dimensions, dtype)
    truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float64)
    ours = loss_and_gradients(
        lambda x, y, t: cmsa_loss(x, y, t, backend="triton", block_size=block_size, **form), pairs, dtype
    )
    eps = torch.finfo(torch.float32).eps
    if dtype == torch.bfloat16:
        # tiles of gradients are bfloat16 as well, which an element cannot be held to
        plain = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, dtype)
        gradient, exact = ours.pop(1).double(), truth.pop(1)
        assert (gradient - exact).norm() <= (plain.pop(1).double() - exact).norm()
    # float32 sums, rounded once to the vectors' dtype
    resolutions = (eps, eps) if dtype == torch.bfloat16 else (eps, torch.finfo(dtype).eps, eps)
    for mine, true, resolution in zip(ours, truth, resolutions, strict=True):
        atol = 32 * eps * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(mine.double(), true, rtol=max(resolution, 32 * eps), atol=atol)


@pytest.fixture
def products_as_on_a_gpu(monkeypatch):
    """Products whose rounding does not depend on an element's place in the tile; numpy's does on some processors."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += np.multiply.outer(a.data[:, k], b.data[k], dtype=total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("products_as_on_a_gpu")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("temperature", "size"), [(3.0, 1.0), (1.0, 3.0)])
def test_error_is_no_larger_than_that_of_plain_pytorch_in_float32(form, temperature, size):
    batches = [size * torch.randn(66, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert_errors_like_plain(batches, temperature, form)


@pytest.mark.usefixtures("products_as_on_a_gpu")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("likeness", [0.0, 0.9])
@pytest.mark.parametrize(("temperature", "size"), [(10.0, 1e3), (1.0, 1e4), (3.0, 1e4), (10.0, 1e4), (3.0, 1e10)])
def test_gradients_of_huge_rows_err_no_more_than_those_of_plain_pytorch(form, likeness, temperature, size, way):
    batches = []
    for seed in range(4):
        pairs = size * torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        pairs[1::2] = likeness * pairs[0::2] + (1 - likeness**2) ** 0.5 * pairs[1::2]
        batches.append(pairs)
    assert_errors_like_plain(batches, temperature, form, block_size=16 if way == "library" else None)


def assert_errors_like_plain(batches, temperature, form, **options):
    """As for the tiles in PyTorch, see test_cmsa_loss."""
    mine, other, scale = torch.zeros(3, 3, dtype=torch.float64)
    for pairs in batches:
        pairs, seeds = pairs.to(DEVICE), len(batches)
        truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float64, temperature)
        plain = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float32, temperature)
        ours = loss_and_gradients(
            lambda x, y, t: cmsa_loss(x, y, t, backend="triton", **options, **form), pairs, torch.float32, temperature
        )
        for i in range(3):
            mine[i] += (ours[i].double() - truth[i]).square().mean().cpu() / seeds
            other[i] += (plain[i].double() - truth[i]).square().mean().cpu() / seeds
            scale[i] += truth[i].square().mean().cpu() / seeds
    floor = torch.finfo(torch.float32).eps / 2 * scale.sqrt()
    # a scalar's error is known from a few draws only, to about a third
    factor = torch.tensor([2.0, 1.5, 2.0], dtype=torch.float64)
    assert (mine.sqrt() <= factor * other.sqrt() + floor).all(), (mine.sqrt(), other.sqrt(), floor)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_half_precision_without_sums_of_the_whole_batch(form):
    pairs = draw(150, 24, torch.float16)
    truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float64)
    ours = loss_and_gradients(
        lambda x, y, t: cmsa_loss(x, y, t, backend="triton", workspace_bytes=1, **form), pairs, torch.float16
    )
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(ours[2].double(), truth[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("likeness", [0.0, 0.9])
def test_error_is_no_larger_than_that_of_plain_pytorch_in_half_precision(dtype, form, likeness):
    mine, other, scale = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(2):
        pairs = draw(66 + seed, 24, torch.float32)
        pairs[1::2] = likeness * pairs[0::2] + (1 - likeness**2) ** 0.5 * pairs[1::2]
        pairs = pairs.to(dtype)
        truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float64, 3.0)
        plain = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, dtype, 3.0)
        ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, backend="triton", **form), pairs, dtype, 3.0)
        for i in range(3):
            mine[i] += (ours[i].double() - truth[i]).square().mean().cpu()
            other[i] += (plain[i].double() - truth[i]).square().mean().cpu()
            scale[i] += truth[i].square().mean().cpu()
    floor = torch.finfo(torch.float32).eps / 2 * scale.sqrt()
    assert (mine.sqrt() <= other.sqrt() + floor).all(), (mine.sqrt(), other.sqrt(), floor)


def test_vectors_with_strided_dimensions():
    x, y = draw(20, 12, torch.float32)[0::2], draw(20, 12, torch.float32)[1::2]
    expected = cmsa_loss(x, y, 2.0, backend="triton")
    assert cmsa_loss(x.T.contiguous().T, y.T.contiguous().T, 2.0, backend="triton") == expected


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("fill", [0.0, 1e4])
def test_equal_rows_give_log_of_the_batch_size(form, fill):
    x = torch.full((37, 8), fill, device=DEVICE)
    loss = cmsa_loss(x, x, 2.0, backend="triton", **form)
    spacing = torch.finfo(torch.float32).eps * 8 * fill**2
    torch.testing.assert_close(loss.cpu(), torch.tensor(37.0).log(), rtol=1e-6, atol=4 * spacing)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_huge_rows_and_zero_rows_are_finite_and_right(form):
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(-8, 9, (42, 16), generator=generator).float().to(DEVICE) * 1250
    pairs[12:14] = 0
    for temperature in (1.0, 1e3):
        truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), pairs, torch.float64, temperature)
        ours = loss_and_gradients(
            lambda x, y, t: cmsa_loss(x, y, t, backend="triton", **form), pairs, torch.float32, temperature
        )
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_nan_makes_the_loss_nan(form):
    pairs = draw(70, 6, torch.float32)
    pairs[100, 2] = torch.nan
    ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, backend="triton", **form), pairs, torch.float32)
    assert ours[0].isnan() and ours[1].isnan().any() and ours[2].isnan()


@pytest.mark.parametrize(("items", "rows"), [(100, 512), (4000, 512), (8192, 1024), (65536, 640)])
def test_blocks_are_small_beside_the_batch_and_fit_the_workspace(items, rows):
    x, temperature = torch.empty(items, 8, device=DEVICE), torch.ones((), device=DEVICE)
    tiles = cmsa.make_tiles(x, x, temperature, Form(True, False), "triton", 0, 512 * 2**20)
    assert tiles.block_size == rows and 3 * 4 * min(rows, items) * items <= 512 * 2**20


def test_equal_runs_give_equal_bits():
    pairs = draw(100, 16, torch.float32)
    first, second = (
        loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, backend="triton"), pairs, torch.float32) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 works on a GPU")
def test_bfloat16_in_the_interpreter_is_an_error_not_a_wrong_number():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter has no bfloat16"):
        infonce_loss(x, x, 1.0, backend="triton")
