"""CMSA and InfoNCE tile by tile in PyTorch, against the formulas written out."""

import itertools

import pytest
import torch

from sda_fast import cmsa_loss, infonce_loss
from sda_fast.ops.cmsa_naive import naive_cmsa_loss, naive_infonce_loss
from sda_fast.ops.cmsa_tiles import LEAST_BLOCK_SIZE, TorchTiles, block_size_within, kept_shape

SHAPES = [(2, 1), (7, 5), (17, 8), (129, 17)]
FORMS = [
    {},
    {"detach_teacher": True},
    {"row_normalized_targets": True},
    {"row_normalized_targets": True, "detach_teacher": True},
    {"normalize": True},
    {"targets": "hard"},
    {"targets": "hard", "normalize": True},
]

UNNORMALISED = [{}, {"detach_teacher": True}, {"row_normalized_targets": True}, {"targets": "hard"}]
# scores of 1e9 bits and more
HUGE = [(10.0, 1e3), (1.0, 1e4), (3.0, 1e4), (10.0, 1e4), (3.0, 1e10)]


def naive(x, y, temperature, form):
    form = dict(form)
    if form.pop("targets", "soft") == "hard":
        return naive_infonce_loss(x, y, temperature, **form)
    return naive_cmsa_loss(x, y, temperature, **form)


def embeddings(items, dimensions, dtype=torch.float64, seed=0, likeness=0.0):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(2 * items, dimensions, dtype=torch.float64, generator=generator)
    pairs[1::2] = likeness * pairs[0::2] + (1 - likeness**2) ** 0.5 * pairs[1::2]
    pairs = pairs.to(dtype)
    return pairs[0::2], pairs[1::2]


def loss_and_gradients(function, x, y, temperature, dtype):
    leaves = [x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()]
    temperature_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves.append(torch.tensor(temperature, dtype=temperature_dtype, requires_grad=True))
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def largest_errors(results, truth):
    return [float((a.double() - b.double()).abs().max()) for a, b in zip(results, truth, strict=True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [None, 4, 50])
def test_float64_loss_and_all_gradients_equal_the_formula(form, shape, block_size):
    x, y = embeddings(*shape)
    for temperature in (0.3, 3.0):
        ours = loss_and_gradients(
            lambda x, y, t: cmsa_loss(x, y, t, block_size=block_size, **form), x, y, temperature, torch.float64
        )
        truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), x, y, temperature, torch.float64)
        scale = [max(1.0, float(value.abs().max())) for value in truth]
        errors = largest_errors(ours, truth)
        assert all(e <= 1e-10 * s for e, s in zip(errors, scale, strict=True)), errors


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form):
    x, y = embeddings(5, 4)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(1.7).double().requires_grad_()
    if form.get("detach_teacher"):
        pytest.skip("finite differences see through a detached teacher")
    assert torch.autograd.gradcheck(lambda *args: cmsa_loss(*args, block_size=2, **form), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("shape", "temperature", "size"),
    # a teacher certain of its targets, a spread one, a flat one; a temperature that scales nothing, and a small one
    [((33, 24), 3.0, 1.0), ((66, 65), 3.0, 0.3), ((66, 65), 3.0, 0.1), ((33, 24), 1.0, 3.0), ((66, 24), 0.3, 0.5)],
    ids=str,
)
def test_error_is_no_larger_than_that_of_plain_pytorch_in_the_same_dtype(dtype, form, shape, temperature, size):
    batches = [[(side * size).to(dtype) for side in embeddings(*shape, seed=seed)] for seed in range(6)]
    assert_errors_like_plain(batches, temperature, form, block_size=48)


@pytest.mark.parametrize("form", UNNORMALISED, ids=str)
@pytest.mark.parametrize("likeness", [0.0, 0.9])
@pytest.mark.parametrize(("temperature", "size"), HUGE, ids=str)
def test_gradients_of_huge_rows_err_no_more_than_those_of_plain_pytorch(form, likeness, temperature, size):
    batches = [
        [(side * size).float() for side in embeddings(32, 16, seed=seed, likeness=likeness)] for seed in range(6)
    ]
    for block_size in (None, 12):
        assert_errors_like_plain(batches, temperature, form, block_size=block_size)


def assert_errors_like_plain(batches, temperature, form, **options):
    """The root mean square over batches: the largest of many rounding errors, or one scalar's, is a matter of luck."""
    dtype, seeds = batches[0][0].dtype, len(batches)
    mine, other, scale = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in batches:
        truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), x, y, temperature, torch.float64)
        plain = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), x, y, temperature, dtype)
        ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, **options, **form), x, y, temperature, dtype)
        for i in range(4):
            mine[i] += (ours[i].double() - truth[i]).square().mean() / seeds
            other[i] += (plain[i].double() - truth[i]).square().mean() / seeds
            scale[i] += truth[i].square().mean() / seeds
    # the result's own rounding to float32, at most half of its last place
    floor = torch.finfo(torch.float32).eps / 2 * scale.sqrt()
    # a scalar's error is known from a few draws only, to about a third
    factor = torch.tensor([2.0, 1.5, 1.5, 2.0], dtype=torch.float64)
    assert (mine.sqrt() <= factor * other.sqrt() + floor).all(), (mine.sqrt(), other.sqrt(), floor)


@pytest.mark.parametrize("workspace_bytes", [None, 7 * 4 * 16**2])
def test_half_precision_gradients_with_and_without_sums_of_the_whole_batch(workspace_bytes):
    x, y = embeddings(77, 24, torch.bfloat16)
    truth = loss_and_gradients(naive_cmsa_loss, x, y, 1.0, torch.float64)
    ours = loss_and_gradients(
        lambda x, y, t: cmsa_loss(x, y, t, workspace_bytes=workspace_bytes), x, y, 1.0, torch.bfloat16
    )
    for mine, true in zip(ours[1:3], truth[1:3], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2**-8, atol=1e-6)


def test_strided_views_give_what_copies_give_and_gradients_reach_the_pairs():
    pairs = torch.randn(26, 9, dtype=torch.float64, requires_grad=True)
    loss = cmsa_loss(pairs[0::2], pairs[1::2], 2.0, block_size=5)
    (gradient,) = torch.autograd.grad(loss, pairs)
    x, y = pairs[0::2].detach().clone().requires_grad_(), pairs[1::2].detach().clone().requires_grad_()
    dx, dy = torch.autograd.grad(cmsa_loss(x, y, 2.0, block_size=5), (x, y))
    torch.testing.assert_close(gradient[0::2], dx)
    torch.testing.assert_close(gradient[1::2], dy)
    columns = pairs.detach()[0::2].T.contiguous().T
    torch.testing.assert_close(cmsa_loss(columns, y, 2.0), cmsa_loss(x, y, 2.0))


@pytest.mark.parametrize(
    ("needed", "form"), list(itertools.product([(0,), (1,), (2,), (0, 2)], [{}, {"targets": "hard"}])), ids=str
)
def test_gradients_only_for_what_needs_them(needed, form):
    x, y = embeddings(9, 6)
    leaves = [x.clone(), y.clone(), torch.tensor(1.5, dtype=torch.float64)]
    wanted = [leaves[i].requires_grad_() for i in needed]
    ours = torch.autograd.grad(cmsa_loss(*leaves, block_size=4, **form), wanted)
    truth = torch.autograd.grad(naive(*leaves, form), wanted)
    assert max(largest_errors(ours, truth)) < 1e-10


@pytest.mark.parametrize("form", [{}, {"row_normalized_targets": True}, {"targets": "hard"}], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_extreme_inputs_are_finite_and_right(form, temperature):
    # integers times powers of two: every product and sum is exact in float32, so the truth is the same problem
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-8, 9, (21, 16), generator=generator).float() * 1250
    y = torch.randint(-8, 9, (21, 16), generator=generator).float() * 1250
    x[3] = x[4] = x[5]
    y[3] = y[4] = y[5]
    x[6] = 0
    y[6] = y[7] = 0
    truth = loss_and_gradients(lambda x, y, t: naive(x, y, t, form), x, y, temperature, torch.float64)
    for block_size in (None, 6):
        ours = loss_and_gradients(
            lambda x, y, t, b=block_size: cmsa_loss(x, y, t, block_size=b, **form), x, y, temperature, torch.float32
        )
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4])
def test_equal_rows_give_log_of_the_batch_size(form, fill):
    x = torch.full((19, 8), fill)
    ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, block_size=7, **form), x, x, 2.0, torch.float32)
    # a log-sum-exp of float32 logits cannot be closer than their own spacing
    spacing = torch.finfo(torch.float32).eps * (0 if form.get("normalize") else 8 * fill**2)
    torch.testing.assert_close(ours[0], torch.tensor(19.0).log(), rtol=1e-6, atol=4 * spacing)
    assert all(torch.isfinite(value).all() for value in ours)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_nan_makes_the_loss_nan(form):
    x, y = embeddings(13, 6, torch.float32)
    x = x.clone()
    x[11, 2] = torch.nan
    ours = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, block_size=5, **form), x, y, 2.0, torch.float32)
    assert ours[0].isnan() and ours[1].isnan().any() and ours[3].isnan()


def test_a_zero_row_stays_zero_and_gets_no_gradient_when_normalised():
    x, y = embeddings(6, 4, torch.float32)
    x = x.clone()
    x[2] = 0
    results = loss_and_gradients(lambda x, y, t: cmsa_loss(x, y, t, normalize=True), x, y, 1.0, torch.float32)
    assert torch.isfinite(results[0]) and (results[1][2] == 0).all() and (results[1][1] != 0).any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tiles", [0, 1, 3, 100])
def test_products_kept_between_sweeps_change_no_bit_and_survive_a_backward_pass(form, tiles):
    x, y = embeddings(27, 6)
    soft = form.get("targets") != "hard"
    workspace = 8 * 8**2 * (TorchTiles.BUFFERS + tiles * (3 if soft else 2))
    kept = kept_shape(workspace, 27, torch.float64, 8, soft)
    assert kept[0] == min(tiles, 10) and 8 * (kept[0] * kept[1] + TorchTiles.BUFFERS * 64) <= workspace
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(1.5).double().requires_grad_()
    without = cmsa_loss(*leaves, block_size=8, workspace_bytes=1, **form)
    loss = cmsa_loss(*leaves, block_size=8, workspace_bytes=workspace, **form)
    assert loss == without
    expected = torch.autograd.grad(without, leaves)
    for _ in range(2):
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves, retain_graph=True), expected))


def test_scaled_incoming_gradient_scales_all_gradients():
    x, y = embeddings(9, 6)
    once = loss_and_gradients(cmsa_loss, x, y, 1.5, torch.float64)
    thrice = loss_and_gradients(lambda *args: 3 * cmsa_loss(*args), x, y, 1.5, torch.float64)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_autocast_does_not_touch_the_arithmetic():
    x, y = embeddings(15, 12, torch.float32)
    plain = loss_and_gradients(cmsa_loss, x, y, 2.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradients(cmsa_loss, x, y, 2.0, torch.float32)
    for a, b in zip(plain, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_infonce_is_hard_cmsa():
    x, y = embeddings(11, 6)
    assert infonce_loss(x, y, 0.5) == cmsa_loss(x, y, 0.5, targets="hard")


def test_operations_pass_opcheck_and_compile_without_graph_breaks():
    x, y = (side.float().clone().requires_grad_() for side in embeddings(9, 6))
    temperature = torch.tensor(2.0, requires_grad=True)
    arguments = (x, y, temperature, True, False, False, "torch", 4, 0)
    torch.library.opcheck(torch.ops.sda_fast.cmsa_forward.default, arguments)
    compiled = torch.compile(lambda *a: cmsa_loss(*a, block_size=4), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(x, y, temperature), (x, y, temperature)),
        torch.autograd.grad(cmsa_loss(x, y, temperature, block_size=4), (x, y, temperature)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 5), 1.0), r"\(3, 4\) and \(3, 5\)"),
        ((torch.zeros(1, 4), torch.zeros(1, 4), 1.0), "at least 2 items"),
        ((torch.zeros(3, 4), torch.zeros(3, 4).double(), 1.0), "float32 and torch.float64"),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 4).long(), 1.0), "int64"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), 0.0), "positive and finite, got 0"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor(-1.0)), "positive and finite, got -1"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor(torch.nan)), "positive and finite, got nan"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor(torch.inf)), "positive and finite, got inf"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2)), r"got shape \(2,\)"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cmsa_loss(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[0.0]], torch.zeros(3, 4), 1.0), {}, "must be tensors, got list and Tensor"),
        ((torch.zeros(3, 4), torch.zeros(3, 4).numpy(), 1.0), {}, "must be tensors, got Tensor and ndarray"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), None), {}, "temperature must be a number or a tensor, got None"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), "2"), {}, "temperature must be a number or a tensor, got '2'"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), 1.0), {"block_size": 2.5}, "block_size must be an integer .*got 2.5"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), 1.0), {"workspace_bytes": 1e6}, "workspace_bytes must be an integer"),
    ],
    ids=str,
)
def test_wrong_types_are_named(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        cmsa_loss(*arguments, **options)


@pytest.mark.parametrize("option", ["row_normalized_targets", "detach_teacher"])
def test_options_of_the_teacher_are_refused_with_hard_targets(option):
    with pytest.raises(ValueError, match=f"{option} has no meaning"):
        cmsa_loss(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, targets="hard", **{option: True})


def test_tiles_of_a_tiny_workspace_have_a_least_edge():
    assert block_size_within(32, 300, torch.float32, "cpu") == LEAST_BLOCK_SIZE
    x, y = embeddings(70, 6)
    torch.testing.assert_close(cmsa_loss(x, y, 1.0, workspace_bytes=32), cmsa_loss(x, y, 1.0))


@pytest.mark.parametrize(
    "options", [{"targets": "soggy"}, {"backend": "cuda"}, {"block_size": 0}, {"workspace_bytes": -1}], ids=str
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        cmsa_loss(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, **options)


def test_triton_that_cannot_run_is_an_error_not_a_fallback():
    with pytest.raises(RuntimeError, match="float64"):
        cmsa_loss(torch.zeros(3, 4).double(), torch.zeros(3, 4).double(), 1.0, backend="triton")
