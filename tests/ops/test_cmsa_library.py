"""The Triton path of CMSA with the matrix library's products: how it cuts a batch, adds up and accumulates."""

import pytest
import torch

from sda_fast import cmsa_loss
from sda_fast.ops import cmsa, cmsa_blocks, cmsa_library, cmsa_products
from sda_fast.ops.cmsa_blockwise import (
    add_target_statistics,
    blockwise_backward,
    blockwise_forward,
    item_statistics,
    row_statistics,
    row_target_sums,
)
from sda_fast.ops.cmsa_naive import naive_cmsa_loss
from sda_fast.ops.cmsa_tiles import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RUNNING_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
FORMS = [Form(True, False), Form(True, True), Form(False, False)]
MEBIBYTE = 2**20


def normal(*shape, dtype=torch.float32, scale=0.5):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("beta", "alpha"), [(0, 1.0), (1, 1.0), (1, -0.5)])
def test_products_are_added_in_float32(dtype, beta, alpha):
    left, right = normal(33, 70, dtype=dtype), normal(17, 70, dtype=dtype).T
    memory = torch.full((33, 40), torch.nan, device=DEVICE)
    total = memory[:, 3:20]
    if beta:
        total.copy_(normal(33, 17))
    before = total.double().clone()
    cmsa_products.add_product(total, left, right, beta=beta, alpha=alpha)
    expected = alpha * (left.double() @ right.double()) + (before if beta else 0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert memory[:, :3].isnan().all() and memory[:, 20:].isnan().all()


@pytest.mark.parametrize("items", [1, 63, 128, 200, 300])
@pytest.mark.parametrize("large", [200, 1000])
def test_the_teacher_of_items_against_themselves_is_symmetric(items, large, monkeypatch):
    monkeypatch.setattr(cmsa_products, "LARGE_BLOCK", large)
    x, y = normal(items, 24), normal(items, 24, scale=0.3)
    out = torch.full((items, items), torch.nan, device=DEVICE)
    cmsa_products.write_symmetric_teacher(out, (x, y))
    expected = x.double() @ x.double().T + y.double() @ y.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_pairs_in_one_piece_of_memory_are_seen_as_one_vector():
    pairs = normal(20, 6)
    joined = cmsa_products.side_by_side(pairs[0::2], pairs[1::2])
    assert joined.data_ptr() == pairs.data_ptr() and torch.equal(joined, pairs.view(10, 12))
    assert cmsa_products.side_by_side(pairs[1::2], pairs[0::2]) is None
    assert cmsa_products.side_by_side(pairs[:10], pairs[10:]) is None
    assert cmsa_products.side_by_side(normal(10, 6), normal(10, 6)) is None
    halves = normal(10, 12)
    assert torch.equal(cmsa_products.side_by_side(halves[:, :6], halves[:, 6:]), halves)


def test_long_vectors_go_through_the_library_unless_forced():
    assert cmsa_products.way_of_products(normal(2, cmsa_products.LIBRARY_DIMENSIONS)) == "library"
    assert cmsa_products.way_of_products(normal(2, cmsa_products.LIBRARY_DIMENSIONS - 1)) == "in kernel"
    with cmsa_products.forced_products("library"):
        assert cmsa_products.way_of_products(normal(2, 8)) == "library"
    with pytest.raises(ValueError, match=r"must be one of .*got 'cublas'"), cmsa_products.forced_products("cublas"):
        pass


@pytest.mark.parametrize("workspace_bytes", [1, None])
@pytest.mark.parametrize("dtype", RUNNING_DTYPES, ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_are_right_whatever_is_kept_and_needed(workspace_bytes, dtype, needs):
    pairs = normal(2 * 150, 20, dtype=dtype)
    sides = [pairs[0::2].detach(), pairs[1::2].detach()]
    leaves = [side.requires_grad_(needed) for side, needed in zip(sides, needs, strict=True)]
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    wanted = [i for i in range(2) if needs[i]]
    truth = torch.autograd.grad(naive_cmsa_loss(*exact, 1.3), [exact[i] for i in wanted])
    with cmsa_products.forced_products("library"):
        loss = cmsa_loss(*leaves, 1.3, backend="triton", block_size=64, workspace_bytes=workspace_bytes)
    ours = torch.autograd.grad(loss, [leaves[i] for i in wanted])
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=torch.finfo(dtype).eps, atol=2e-6)


LOSSES = [{}, {"detach_teacher": True}, {"row_normalized_targets": True}, {"targets": "hard"}]


@pytest.mark.parametrize("dtype", RUNNING_DTYPES, ids=str)
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_strips_of_one_block_and_many_blocks_give_what_one_strip_does(dtype, options, monkeypatch):
    pairs = normal(2 * 150, 20, dtype=dtype).requires_grad_()
    temperature = torch.tensor(1.3, device=DEVICE, requires_grad=True)

    def at(strip, block_size, workspace_bytes=None):
        monkeypatch.setattr(cmsa_blocks, "strips", lambda items: range(strip, strip + 1))
        with cmsa_products.forced_products("library"):
            loss = cmsa_loss(
                pairs[0::2],
                pairs[1::2],
                temperature,
                backend="triton",
                block_size=block_size,
                workspace_bytes=workspace_bytes,
                **options,
            )
        return [loss.detach(), *torch.autograd.grad(loss, (pairs, temperature))]

    whole = at(150, 150)
    for strip, block_size, workspace_bytes in (
        (64, 150, None),
        (7, 200, None),
        (150, 150, 1),
        (1, 64, None),
        (1, 40, 1),
    ):
        for mine, one_strip in zip(at(strip, block_size, workspace_bytes), whole, strict=True):
            if dtype == torch.bfloat16:
                # tiles of gradients are bfloat16 as well, which an element cannot be held to
                assert (mine - one_strip).float().norm() <= torch.finfo(dtype).eps * one_strip.float().norm()
            else:
                torch.testing.assert_close(mine, one_strip, rtol=4 * torch.finfo(mine.dtype).eps, atol=4e-6)


def test_strips_leave_what_is_kept_for_a_second_backward_pass(monkeypatch):
    monkeypatch.setattr(cmsa_blocks, "strips", lambda items: range(64, 65))
    pairs = normal(2 * 150, 20, dtype=torch.float16).requires_grad_()
    with cmsa_products.forced_products("library"):
        loss = cmsa_loss(pairs[0::2], pairs[1::2], 1.3, backend="triton", block_size=150)
    first, second = (torch.autograd.grad(loss, pairs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", RUNNING_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_share_of_the_rows_gives_their_statistics_and_gradients(dtype, form):
    x, y = normal(140, 20, dtype=dtype), normal(140, 21, dtype=dtype)[:, :20]
    temperature = torch.tensor(1.3, device=DEVICE)
    scale = torch.tensor(1 / 280, device=DEVICE)
    options = {"through_teacher": True, "needs_x": True, "needs_y": True}
    tiles = cmsa.make_tiles(x, y, temperature, form, "library", 64, 0)
    _, statistics = blockwise_forward(tiles)
    whole = blockwise_backward(tiles, statistics, (0, 140), scale, symmetric=True, **options)
    rows = (30, 110)
    of_share = item_statistics(tiles, row_statistics(tiles, rows, symmetric=False))
    if form.needs_target_sums:
        of_share[2:6] = statistics[2:6]
        add_target_statistics(of_share, row_target_sums(tiles, rows, of_share, symmetric=False))
    pairs = (one[:10, 30:110].double().view(5, 2, 80).sum(1) for one in (of_share, statistics))
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_share[10, 30:110], statistics[10, 30:110], rtol=1e-6, atol=1e-6)
    share = blockwise_backward(tiles, statistics, rows, scale, symmetric=False, **options)
    for mine, all_of_them in ((share.x, whole.x), (share.y, whole.y)):
        torch.testing.assert_close(mine, all_of_them[30:110], rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_products_of_a_small_batch_are_formed_once(monkeypatch):
    formed = []
    add_product = cmsa_products.add_product

    def counting(total, left, right, **options):
        formed.append((total.shape, left.shape[1]))
        add_product(total, left, right, **options)

    monkeypatch.setattr(cmsa_library, "add_product", counting)
    monkeypatch.setattr(cmsa_products, "add_product", counting)
    items, dimensions = 128, 16
    pairs = normal(2 * items, dimensions, dtype=torch.float16).requires_grad_()
    with cmsa_products.forced_products("library"):
        cmsa_loss(pairs[0::2], pairs[1::2], 2.0, backend="triton").backward()
    operations = sum(2 * shape[0] * shape[1] * contracted for shape, contracted in formed)
    # L, three quarters of S, and three products of gradients
    assert len(formed) == 1 + 2 + 3
    assert operations == (2 + 3 + 6) * items**2 * dimensions


def test_a_loss_with_the_way_forced_has_a_backward_pass_outside_of_the_block():
    x = normal(9, 8).requires_grad_()
    with cmsa_products.forced_products("library"):
        loss = cmsa_loss(x, 2 * x, 1.0, backend="triton")
    (ours,) = torch.autograd.grad(loss, x)
    (plain,) = torch.autograd.grad(naive_cmsa_loss(x, 2 * x, 1.0), x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
