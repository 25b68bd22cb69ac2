"""Properties of the losses that hold for every batch, in PyTorch and, with a few examples, in the Triton kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_fast import cmsa_loss, infonce_loss
from sda_fast.ops.cmsa_products import forced_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
batches = st.tuples(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.2, 5.0))
forms = st.sampled_from([{}, {"detach_teacher": True}, {"row_normalized_targets": True}, {"targets": "hard"}])
ways = st.sampled_from(["in kernel", "library"])
quick = settings(max_examples=25, deadline=None)
few = settings(max_examples=4, deadline=None)
# float32 sums beside scores of some tens
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def draw(batch):
    items, dimensions, seed, temperature = batch
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, dimensions, generator=generator, dtype=torch.float64)
    y = torch.randn(items, dimensions, generator=generator, dtype=torch.float64)
    return x, y, temperature, torch.randperm(items, generator=generator)


def draw_for_kernels(batch):
    x, y, temperature, order = draw(batch)
    return x.float().to(DEVICE), y.float().to(DEVICE), temperature, order.to(DEVICE)


def triton_loss(way, *arguments, **options):
    with forced_products(way):
        return cmsa_loss(*arguments, backend="triton", **options)


def loss_and_gradients(function, x, y):
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@quick
@given(batches, forms)
def test_permuting_the_items_leaves_the_loss_unchanged(batch, form):
    x, y, temperature, order = draw(batch)
    options = {"block_size": 7, **form}
    torch.testing.assert_close(
        cmsa_loss(x[order], y[order], temperature, **options), cmsa_loss(x, y, temperature, **options)
    )


@few
@given(batches, forms, ways)
def test_permuting_the_items_leaves_the_kernels_loss_unchanged(batch, form, way):
    x, y, temperature, order = draw_for_kernels(batch)
    permuted = triton_loss(way, x[order], y[order], temperature, block_size=16, **form)
    torch.testing.assert_close(permuted, triton_loss(way, x, y, temperature, block_size=16, **form), **CLOSE)


@quick
@given(batches)
def test_swapping_the_sides_leaves_the_row_normalised_loss_and_infonce_unchanged(batch):
    x, y, temperature, _ = draw(batch)
    options = {"row_normalized_targets": True, "block_size": 7}
    torch.testing.assert_close(cmsa_loss(x, y, temperature, **options), cmsa_loss(y, x, temperature, **options))
    torch.testing.assert_close(infonce_loss(x, y, temperature), infonce_loss(y, x, temperature))


@few
@given(batches, st.sampled_from([{"row_normalized_targets": True}, {"targets": "hard"}]), ways)
def test_swapping_the_sides_leaves_the_kernels_symmetric_losses_unchanged(batch, form, way):
    x, y, temperature, _ = draw_for_kernels(batch)
    swapped = triton_loss(way, y, x, temperature, block_size=16, **form)
    torch.testing.assert_close(swapped, triton_loss(way, x, y, temperature, block_size=16, **form), **CLOSE)


@pytest.mark.parametrize("loss", [cmsa_loss, lambda *a: triton_loss("library", *a)], ids=["torch", "triton"])
def test_swapping_the_sides_changes_the_published_loss(loss):
    x, y, temperature, _ = draw_for_kernels((12, 5, 0, 1.0))
    assert abs(loss(x, y, temperature) - loss(y, x, temperature)) > 1e-2


@quick
@given(batches, st.integers(1, 64), forms)
def test_the_block_size_changes_nothing_but_rounding(batch, block_size, form):
    x, y, temperature, _ = draw(batch)
    expected = loss_and_gradients(lambda x, y: cmsa_loss(x, y, temperature, **form), x, y)
    for options in ({"block_size": block_size}, {"workspace_bytes": 64 * block_size}):
        ours = loss_and_gradients(lambda x, y, o=options: cmsa_loss(x, y, temperature, **o, **form), x, y)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@few
@given(batches, st.integers(4, 64), forms, ways)
def test_the_block_size_of_the_kernels_changes_nothing_but_rounding(batch, block_size, form, way):
    x, y, temperature, _ = draw_for_kernels(batch)
    expected = loss_and_gradients(lambda x, y: triton_loss(way, x, y, temperature, **form), x, y)
    for options in ({"block_size": block_size}, {"workspace_bytes": 1}):
        ours = loss_and_gradients(lambda x, y, o=options: triton_loss(way, x, y, temperature, **o, **form), x, y)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@quick
@given(batches)
def test_a_float_and_a_tensor_temperature_agree(batch):
    x, y, temperature, _ = draw(batch)
    assert cmsa_loss(x, y, temperature) == cmsa_loss(x, y, torch.tensor([temperature], dtype=torch.float64))


@few
@given(batches, ways)
def test_a_float_and_a_tensor_temperature_agree_in_the_kernels(batch, way):
    x, y, temperature, _ = draw_for_kernels(batch)
    assert triton_loss(way, x, y, temperature) == triton_loss(way, x, y, torch.tensor([temperature], device=DEVICE))
