"""CMSA of bfloat16 vectors from three products for a pair of blocks: scaled sums and differences, the loss by them.

Triton's interpreter has no bfloat16 arithmetic. There float16 vectors that hold bfloat16 numbers take the way of
bfloat16 ones, which leaves out nothing of it but bfloat16's gradient tiles.
"""

import pytest
import torch

from sda_fast import cmsa_loss
from sda_fast.kernels.cmsa_halves import described, write_halves
from sda_fast.ops import cmsa_blocks, cmsa_library
from sda_fast.ops.cmsa_naive import naive_cmsa_loss
from sda_fast.ops.cmsa_products import forced_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
FORMS = [{}, {"detach_teacher": True}, {"row_normalized_targets": True}]


def vectors(items, dimensions, *, seed=0, size=0.5, likeness=0.0):
    """Rows x_0, y_0, x_1, y_1 of bfloat16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = size * torch.randn(2 * items, dimensions, generator=generator)
    pairs[1::2] = likeness * pairs[0::2] + (1 - likeness**2) ** 0.5 * pairs[1::2]
    return pairs.bfloat16().to(DEVICE, DTYPE)


def halves(x, y, span=None):
    span = span or (0, len(x))
    sums, differences = (
        torch.full((span[1] - span[0], x.shape[1]), torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(2)
    )
    items = described(x, y)
    write_halves(x, y, items, span, sums, differences)
    return sums, differences, items


@pytest.mark.parametrize("dimensions", [1, 17, 1500])
def test_sums_and_differences_are_rounded_once_to_float16(dimensions):
    pairs = vectors(9, dimensions)
    x, y = pairs[0::2], pairs[1::2]
    sums, differences, items = halves(x, y, (2, 7))
    scales = items[2:7, :1].double()
    assert torch.equal(scales.log2(), scales.log2().round())
    for half, exact in ((sums, x.double() + y.double()), (differences, x.double() - y.double())):
        assert torch.equal(half.double(), (exact[2:7] / scales).half().double())
    largest = (x.double().abs() + y.double().abs())[2:7].amax(1, keepdim=True) / scales
    assert (largest >= 2**14).all() and (largest < 2**15).all()


def test_rows_of_zeros_of_ends_of_the_range_and_of_nan():
    x = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [2e38, -2e38], [1.0, torch.nan], [torch.inf, 1.0]], device=DEVICE)
    sums, differences, items = halves(x, -x / 2)
    scales = items[:, 0]
    assert not sums[0].any() and not differences[0].any() and scales.isfinite().all() and (scales > 0).all()
    assert sums[:3].isfinite().all() and differences[:3].isfinite().all()
    assert sums[3, 1].isnan() and not sums[4, 0].isfinite()


def test_three_products_give_what_four_do():
    pairs = vectors(40, 30)
    x, y = pairs[0::2].double(), pairs[1::2].double()
    sums, differences, items = (one.double() for one in halves(pairs[0::2], pairs[1::2]))
    scales, of_teacher, of_logits = items.unbind(1)
    factors = scales[:, None] * scales / 2
    of_sums, of_differences = factors * (sums @ sums.T), factors * (differences @ differences.T)
    teacher = (of_sums + of_differences) - (of_teacher[:, None] + of_teacher)
    both = (of_sums - of_differences) - (of_logits[:, None] + of_logits)
    # an element's rounding is 2^-11 of it at most, in both factors, and is taken off once
    allowed = 2.0**-9 * (x.abs() + y.abs()) @ (x.abs() + y.abs()).T
    assert (teacher - (x @ x.T + y @ y.T)).abs().le(allowed).all()
    assert (both - (x @ y.T + y @ x.T)).abs().le(allowed).all()
    size = (x.square() + y.square()).sum(1)
    assert (teacher.diagonal() - size).abs().le(2.0**-20 * size).all()
    assert (both.diagonal() - 2 * (x * y).sum(1)).abs().le(2.0**-20 * size).all()


@pytest.fixture
def by_halves(monkeypatch):
    """Vectors of DTYPE go by halves, as bfloat16 ones may; counts the calls that form them."""
    formed = []

    def counted(x, y, items, span, *memory):
        formed.append(span)
        write_halves(x, y, items, span, *memory)

    monkeypatch.setattr(cmsa_library.cmsa_halves, "write_halves", counted)
    monkeypatch.setattr(cmsa_blocks.Batch, "uses_halves", property(lambda batch: batch.halves and batch.dtype == DTYPE))
    with forced_products("halves"):
        yield formed


def loss_and_gradients(function, pairs, dtype, temperature=3.0):
    pairs = pairs.to(dtype).requires_grad_()
    temperature = torch.tensor(temperature, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    temperature.requires_grad_()
    loss = function(pairs[0::2], pairs[1::2], temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (pairs, temperature))]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("likeness", [0.0, 0.9])
@pytest.mark.parametrize(("temperature", "size"), [(3.0, 0.5), (1.0, 2.0), (10.0, 1e3), (3.0, 1e4)])
def test_error_is_no_larger_than_that_of_plain_pytorch_in_bfloat16(form, likeness, temperature, size, by_halves):
    mine, other, scale = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(2):
        pairs = vectors(66, 24, seed=seed, size=size, likeness=likeness)
        truth = loss_and_gradients(lambda x, y, t: naive_cmsa_loss(x, y, t, **form), pairs, torch.float64, temperature)
        plain = loss_and_gradients(lambda x, y, t: naive_cmsa_loss(x, y, t, **form), pairs, torch.bfloat16, temperature)
        ours = loss_and_gradients(
            lambda x, y, t: cmsa_loss(x, y, t, backend="triton", block_size=32, **form), pairs, DTYPE, temperature
        )
        for i in range(3):
            mine[i] += (ours[i].double() - truth[i]).square().mean().cpu()
            other[i] += (plain[i].double() - truth[i]).square().mean().cpu()
            scale[i] += truth[i].square().mean().cpu()
    floor = torch.finfo(torch.float32).eps / 2 * scale.sqrt()
    assert by_halves and (mine.sqrt() <= other.sqrt() + floor).all(), (mine.sqrt(), other.sqrt(), floor)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, None])
def test_cuts_agree_to_the_rounding_of_halves(form, workspace_bytes, by_halves):
    pairs = vectors(150, 40)

    def at(block_size):
        return loss_and_gradients(
            lambda x, y, t: cmsa_loss(
                x, y, t, backend="triton", block_size=block_size, workspace_bytes=workspace_bytes, **form
            ),
            pairs,
            DTYPE,
        )

    whole = at(150)
    assert not by_halves
    for block_size in (64, 100):
        for mine, one_block in zip(at(block_size), whole, strict=True):
            # bfloat16's gradient tiles round too, those of other dtypes are float32
            allowed = 2.0**-9 if DEVICE == "cpu" else 2.0**-7
            assert (mine.double() - one_block.double()).norm() <= allowed * one_block.double().norm()
    assert by_halves


@pytest.mark.parametrize("size", [1.0, 3.0, 100.0])
def test_equal_rows_in_two_blocks_share_a_target(size, by_halves):
    pairs = vectors(64, 16, size=size)
    pairs[64:] = pairs[:64]
    truth = loss_and_gradients(naive_cmsa_loss, pairs, torch.float64, temperature=1.0)
    plain = loss_and_gradients(naive_cmsa_loss, pairs, torch.bfloat16, temperature=1.0)
    ours = loss_and_gradients(
        lambda x, y, t: cmsa_loss(x, y, t, backend="triton", block_size=32), pairs, DTYPE, temperature=1.0
    )
    assert by_halves and all(one.isfinite().all() for one in ours)
    for number, (mine, other, true) in enumerate(zip(ours, plain, truth, strict=True)):
        # losses of 1e5 nats turn a rounding of L_ji, which L_ij does not have, into another share of the gradient
        if number != 1 or size < 100:
            assert (mine.double() - true).norm() <= (other.double() - true).norm()


def test_one_nan_makes_the_loss_nan(by_halves):
    pairs = vectors(70, 6)
    pairs[100, 2] = torch.nan
    ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, backend="triton", block_size=32), pairs, DTYPE)
    assert by_halves and ours[0].isnan() and ours[1].isnan().any() and ours[2].isnan()
