"""Properties of the losses that hold for every batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_fast import cmsa_loss, infonce_loss

batches = st.tuples(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.2, 5.0))
quick = settings(max_examples=25, deadline=None)


def draw(batch):
    items, dimensions, seed, temperature = batch
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, dimensions, generator=generator, dtype=torch.float64)
    y = torch.randn(items, dimensions, generator=generator, dtype=torch.float64)
    return x, y, temperature, torch.randperm(items, generator=generator)


@quick
@given(batches, st.booleans(), st.sampled_from(["soft", "hard"]))
def test_permuting_the_items_leaves_the_loss_unchanged(batch, row_normalized, targets):
    x, y, temperature, order = draw(batch)
    options = {"row_normalized_targets": row_normalized and targets == "soft", "targets": targets, "block_size": 7}
    torch.testing.assert_close(
        cmsa_loss(x[order], y[order], temperature, **options), cmsa_loss(x, y, temperature, **options)
    )


@quick
@given(batches)
def test_swapping_the_sides_leaves_the_row_normalised_loss_and_infonce_unchanged(batch):
    x, y, temperature, _ = draw(batch)
    options = {"row_normalized_targets": True, "block_size": 7}
    torch.testing.assert_close(cmsa_loss(x, y, temperature, **options), cmsa_loss(y, x, temperature, **options))
    torch.testing.assert_close(infonce_loss(x, y, temperature), infonce_loss(y, x, temperature))


def test_swapping_the_sides_changes_the_published_loss():
    x, y, temperature, _ = draw((12, 5, 0, 1.0))
    assert abs(cmsa_loss(x, y, temperature) - cmsa_loss(y, x, temperature)) > 1e-2


@quick
@given(batches, st.integers(1, 64), st.booleans())
def test_the_block_size_changes_nothing_but_rounding(batch, block_size, row_normalized):
    x, y, temperature, _ = draw(batch)
    results = []
    for options in ({}, {"block_size": block_size}, {"workspace_bytes": 64 * block_size}):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = cmsa_loss(*leaves, temperature, row_normalized_targets=row_normalized, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@quick
@given(batches)
def test_a_float_and_a_tensor_temperature_agree(batch):
    x, y, temperature, _ = draw(batch)
    assert cmsa_loss(x, y, temperature) == cmsa_loss(x, y, torch.tensor([temperature], dtype=torch.float64))
