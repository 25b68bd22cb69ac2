"""The MoDA kernels against float64: no worse than plain PyTorch at the same dtype, at every shape and gate layout."""

from __future__ import annotations

import pytest
import torch

from sda_fast.kernels import moda_gemm_tma
from sda_fast.kernels import moda_naive as naive
from sda_fast.kernels.configs import LaunchConfig
from sda_fast.kernels.moda_backward import dx_pass, dy_pass, dy_pass_of_group
from sda_fast.kernels.moda_forward import expand, expand_add, expand_group, project
from sda_fast.kernels.moda_gemm import gated_linear, input_gradient
from sda_fast.kernels.philox import dropout_scale
from sda_fast.ops.dropout import keep_mask

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter computes wrongly in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
LAYOUTS = ["per_sequence", "per_row", "row_gates"]
# M, K, N, R, E
SHAPES = [(1, 17, 129, 1, 1), (17, 129, 70, 24, 8), (129, 64, 33, 66, 33), (40, 129, 17, 256, 64), (3, 1, 1, 9, 3)]
SCALING = 4.0
SEED = -7234567890123456789
ROUNDING = 8 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def contractions_are_at_least_16(monkeypatch):
    """The compiler refuses a shorter contraction, the interpreter does not: look at every product it computes."""
    if ON_GPU:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    lengths = []
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *args):
        lengths.append(a.data.shape[-1])
        return original(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield
    assert min(lengths, default=16) >= 16


def random(*shape, dtype=torch.float32, scale=1.0, strided=True):
    """Random values; strided ones are a window of a larger NaN-filled matrix, so that reading past it shows."""
    values = (torch.randn(*shape) * scale).to(dtype).to(DEVICE)
    if not strided:
        return values
    rows, columns = shape
    frame = torch.full((rows + 2, columns + 3), float("nan"), dtype=dtype, device=DEVICE)
    window = frame[1 : rows + 1, 2 : columns + 2]
    window.copy_(values)
    return window


def random_gates(layout, M, E):
    """Gates, ids and rows per sequence in one of the three layouts."""
    if layout == "row_gates":
        return torch.rand(M, E, device=DEVICE), None, 1
    rows_per_sequence = 5 if layout == "per_sequence" else 1
    ids = torch.randint(0, 3, (-(-M // rows_per_sequence),), dtype=torch.int32, device=DEVICE)
    return torch.rand(3, E, device=DEVICE), ids, rows_per_sequence


def assert_as_good_as(actual, function, *inputs, output=None):
    """`actual` may be off the float64 value of function(*inputs) by no more than the same function in plain PyTorch.

    A norm over a handful of numbers is a matter of luck: up to 16 of them may instead keep to the bound derived from
    three roundings of the terms that they are the sum of.
    """

    def value(convert):
        result = function(*(convert(t) if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs))
        return (result if output is None else result[output]).double()

    truth, plain = value(torch.Tensor.double), value(lambda tensor: tensor)
    assert torch.isfinite(actual).all()
    error = (actual.double() - truth).abs()
    allowed = 1.05 * torch.linalg.norm(plain - truth) + ROUNDING * torch.linalg.norm(truth)
    if actual.numel() <= 16 and torch.linalg.norm(error) > allowed:
        terms = value(lambda tensor: tensor.double().abs())
        half_step = torch.finfo(inputs[0].dtype).eps / 2
        assert (error <= (3 * half_step + ROUNDING) * terms).all()
    else:
        assert torch.linalg.norm(error) <= allowed


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split_k", [None, 3])
def test_project_is_dropout_and_a_product(shape, dropout, dtype, split_k):
    M, K, _, R, _ = shape
    x, lora_A = random(M, K, dtype=dtype), random(R, K, scale=0.1)
    keep = keep_mask(M, K, dropout, SEED, DEVICE) if dropout else None
    h = project(
        x,
        lora_A,
        dropout_p=dropout,
        seed=torch.tensor([SEED], device=DEVICE),
        out=poisoned(M, R),
        split_k=split_k,
        config=LaunchConfig(32, 32, 4, 2) if split_k else None,
    )
    assert_as_good_as(h, naive.naive_project, x, lora_A, keep, dropout_scale(dropout))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-5, 0.99999])
@pytest.mark.parametrize("K", [8, 17, 129])
def test_dropout_mask_equals_pytorch_element_by_element(dropout, K):
    M = 37
    ones = torch.ones(M, K, device=DEVICE)
    h = project(ones, torch.eye(K, device=DEVICE), dropout_p=dropout, seed=torch.tensor([SEED], device=DEVICE))
    keep = keep_mask(M, K, dropout, SEED, DEVICE)
    torch.testing.assert_close(h, keep * dropout_scale(dropout), rtol=1e-6, atol=0)


def test_backward_drops_the_same_elements_as_forward():
    M, K = 37, 129
    seed = torch.tensor([SEED], device=DEVICE)
    eye, ones = torch.eye(K, device=DEVICE), torch.ones(M, K, device=DEVICE)
    dx = torch.zeros(M, K, device=DEVICE)
    dA = dx_pass(ones, ones, eye, dx, dropout_p=0.3, seed=seed)
    h = project(ones, eye, dropout_p=0.3, seed=seed)
    torch.testing.assert_close(dx, h, rtol=1e-6, atol=0)
    torch.testing.assert_close(dA, h.sum(0).expand(K, K), rtol=1e-5, atol=0)


def test_project_takes_a_group_whose_rank_exceeds_one_block():
    x, lora_A = random(17, 40), random(300, 40)
    h = project(x, lora_A)
    assert_as_good_as(h, naive.naive_project, x, lora_A)
    dx = random(17, 40)
    before = dx.clone()
    dA = dx_pass(x, h, lora_A, dx)
    for output, actual in enumerate((dA, dx)):
        assert_as_good_as(actual, naive.naive_dx_pass, x, h, lora_A, before, output=output)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_expand_add_updates_in_place(shape, layout, dtype):
    M, _, N, R, E = shape
    y, h, lora_B = random(M, N, dtype=dtype), random(M, R), random(N, R, scale=0.1)
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_sequence)
    before = y.clone()
    assert expand_add(y, h, lora_B, gates, ids, SCALING, rows_per_sequence=rows_per_sequence) is y
    assert_as_good_as(y, naive.naive_expand_add, before, h, lora_B, gate)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_expand_overwrites_its_output(shape, dtype, with_bias):
    M, _, N, R, E = shape
    h, lora_B = random(M, R), random(N, R, scale=0.1)
    gates, ids, rows_per_sequence = random_gates("per_sequence", M, E)
    bias = random(N, 1, dtype=dtype, strided=False)[:, 0] if with_bias else None
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_sequence)
    out = poisoned(M, N, dtype=dtype)
    options = {"rows_per_sequence": rows_per_sequence, "bias": bias, "out": out}
    assert expand(h, lora_B, gates, ids, SCALING, **options) is out
    before = torch.zeros(M, N, dtype=dtype, device=DEVICE) if bias is None else bias.expand(M, N)
    assert_as_good_as(out, naive.naive_expand_add, before, h, lora_B, gate)


def test_expand_add_reads_a_slice_of_a_groups_h():
    h_all, lora_B = random(17, 48), random(9, 16)
    gates, ids, rows_per_sequence = random_gates("per_sequence", 17, 4)
    member = h_all[:, 16:32]
    gate = naive.naive_gate(gates, ids, SCALING, 17, 16, rows_per_sequence)
    y = random(17, 9)
    before = y.clone()
    expand_add(y, member, lora_B, gates, ids, SCALING, rows_per_sequence=rows_per_sequence)
    assert_as_good_as(y, naive.naive_expand_add, before, member, lora_B, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear_is_one_product_with_the_update(shape, layout, dtype, bias):
    M, K, N, R, E = shape
    x, weight = random(M, K, dtype=dtype), random(N, K, dtype=dtype, scale=0.1)
    h, lora_B = random(M, R), random(N, R, scale=0.1)
    offset = random(N, dtype=dtype, strided=False) if bias else None
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_sequence)
    y = gated_linear(
        x,
        weight,
        offset,
        h,
        lora_B,
        gates,
        ids,
        SCALING,
        rows_per_sequence=rows_per_sequence,
        out=poisoned(M, N, dtype=dtype),
    )
    assert_as_good_as(y, naive.naive_gated_linear, x, weight, offset, h, lora_B, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_is_one_product_with_the_masked_update(shape, dropout, dtype):
    M, K, N, R, _ = shape
    dy, weight = random(M, N, dtype=dtype), random(N, K, dtype=dtype, scale=0.1)
    dh, lora_A = random(M, R), random(R, K, scale=0.1)
    options = {"dropout_p": dropout, "seed": torch.tensor([SEED], device=DEVICE)}
    keep = keep_mask(M, K, dropout, SEED, DEVICE) if dropout else None
    frame = poisoned(M, K + 2, dtype=dtype)
    dx = input_gradient(dy, weight, dh, lora_A, out=frame[:, 1 : K + 1], **options)
    assert_as_good_as(dx, naive.naive_input_gradient, dy, weight, dh, lora_A, keep, dropout_scale(dropout))
    assert frame[:, 0].isnan().all() and frame[:, K + 1].isnan().all()


@pytest.fixture
def copy_engine(monkeypatch):
    """Makes every GEMM with an update in it go through the copy engine, where there is one to go through."""
    if ON_GPU and not moda_gemm_tma.has_copy_engine(torch.device("cuda")):
        pytest.skip("this GPU has no copy engine for tiles that the kernel uses")
    served = []

    def serves(*arguments):
        assert all(map(moda_gemm_tma.is_described, (arguments[0], arguments[2])))
        served.append(True)
        return True

    monkeypatch.setattr(moda_gemm_tma, "serves", serves)
    yield
    assert served


def described(*shape, dtype, scale=1.0):
    """Random values in a NaN-filled frame whose rows start at multiples of 16 bytes."""
    rows, columns = shape
    frame = poisoned(rows + 2, -(-columns // 8) * 8 + 16, dtype=dtype)
    window = frame[1 : rows + 1, 8 : columns + 8]
    window.copy_((torch.randn(*shape) * scale).to(dtype))
    return window


# M, K, N, R, E: tiles are 128 x 256, and steps of 64; two programs run where there is no GPU.
DESCRIBED_SHAPES = [(1, 8, 16, 1, 1), (130, 72, 264, 8, 4), (300, 200, 40, 24, 8), (257, 64, 520, 32, 32)]
HALVES = [dtype for dtype in DTYPES if dtype.itemsize == 2]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", DESCRIBED_SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear_through_the_copy_engine(shape, layout, dtype, bias, copy_engine):
    M, K, N, R, E = shape
    x, weight = described(M, K, dtype=dtype), described(N, K, dtype=dtype, scale=0.1)
    h, lora_B = random(M, R), random(N, R, scale=0.1)
    offset = torch.randn(N, device=DEVICE).to(dtype) if bias else None
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_sequence)
    y = described(M, N, dtype=dtype, scale=float("nan"))
    given = (x, weight, offset, h, lora_B, gates, ids, SCALING)
    assert gated_linear(*given, rows_per_sequence=rows_per_sequence, out=y) is y
    assert_as_good_as(y, naive.naive_gated_linear, x, weight, offset, h, lora_B, gate)
    assert y._base.isnan().sum() == y._base.numel() - y.numel()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", DESCRIBED_SHAPES)
def test_input_gradient_through_the_copy_engine(shape, dropout, dtype, copy_engine):
    M, K, N, R, _ = shape
    dy, weight = described(M, N, dtype=dtype), described(N, K, dtype=dtype, scale=0.1)
    dh, lora_A = random(M, R), random(R, K, scale=0.1)
    options = {"dropout_p": dropout, "seed": torch.tensor([SEED], device=DEVICE)}
    keep = keep_mask(M, K, dropout, SEED, DEVICE) if dropout else None
    dx = input_gradient(dy, weight, dh, lora_A, **options)
    assert_as_good_as(dx, naive.naive_input_gradient, dy, weight, dh, lora_A, keep, dropout_scale(dropout))
    if dropout:
        only_update = input_gradient(dy, torch.zeros_like(weight), dh, lora_A, **options)
        assert not only_update[~keep].any() and (only_update[keep] != 0).float().mean() > 0.99


def test_a_launch_by_the_copy_engine_leaves_tritons_allocator_alone(copy_engine):
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    x, weight = described(4, 8, dtype=torch.float16), described(16, 8, dtype=torch.float16)
    input_gradient(x, weight.t().contiguous(), random(4, 8), random(8, 16))
    assert _allocation._allocator.get() is before
    if ON_GPU:
        assert moda_gemm_tma.scratch(384, 128, None).is_cuda


def test_the_copy_engine_serves_only_what_it_can_fetch(monkeypatch):
    monkeypatch.setattr(moda_gemm_tma, "generation", lambda device: generation)
    monkeypatch.setattr(moda_gemm_tma, "multiprocessors", lambda device: 4)
    x, weight, y = (torch.zeros(shape, dtype=torch.float16) for shape in ((256, 64), (512, 64), (256, 512)))
    for generation, expected in ((9, True), (10, True), (8, False), (12, False), (0, False)):  # noqa: B007
        assert moda_gemm_tma.serves(x, weight, y, 8) is expected
    generation = 9
    assert moda_gemm_tma.serves(x, weight.t().contiguous().t(), y, 32)
    wide = torch.zeros(256, 68, dtype=torch.float16)
    for unfit in (wide[:, :64], wide.view(-1)[1 : 1 + 256 * 64].view(256, 64), x[:, ::2]):
        assert not moda_gemm_tma.serves(unfit, weight, y, 8)
    assert not moda_gemm_tma.serves(x, weight[:, ::2], y, 8)
    assert not moda_gemm_tma.serves(x.float(), weight.float(), y.float(), 8)
    assert not moda_gemm_tma.serves(x, weight, y, 33)
    assert not moda_gemm_tma.serves(x, weight, y[:128], 8), "three of four multiprocessors would have no tile"
    assert not moda_gemm_tma.serves(x[:, :0], weight[:, :0], y, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dy_pass_gives_all_three_gradients(shape, layout, dtype):
    M, _, N, R, E = shape
    dy, h, lora_B = random(M, N, dtype=dtype), random(M, R), random(N, R, scale=0.1)
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    frame = poisoned(M, R + 2)
    dh, dB, dgates = dy_pass(
        dy, h, lora_B, gates, ids, SCALING, rows_per_sequence=rows_per_sequence, dh_out=frame[:, 1 : R + 1]
    )
    inputs = (dy, h, lora_B, gates, ids, SCALING, rows_per_sequence)
    for output, actual in enumerate((dh, dB, dgates)):
        assert actual.dtype == torch.float32
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)
    assert frame[:, 0].isnan().all() and frame[:, R + 1].isnan().all()


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_dy_pass_gives_only_what_is_asked_for(rank, wanted):
    dy, h, lora_B = random(17, 33), random(17, rank), random(33, rank)
    gates, ids, _ = random_gates("per_row", 17, 8)
    full = dy_pass(dy, h, lora_B, gates, ids, SCALING)
    flags = dict(zip(("needs_dh", "needs_dB", "needs_gates"), wanted, strict=True))
    for is_wanted, part, whole in zip(wanted, dy_pass(dy, h, lora_B, gates, ids, SCALING, **flags), full, strict=True):
        if is_wanted:
            assert torch.equal(part, whole)
        else:
            assert part is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_dx_pass_gives_dA_and_adds_to_dx(shape, dropout, dtype):
    M, K, _, R, _ = shape
    x, dh, lora_A = random(M, K, dtype=dtype), random(M, R), random(R, K, scale=0.1)
    dx = random(M, K, dtype=dtype)
    keep = keep_mask(M, K, dropout, SEED, DEVICE) if dropout else None
    inputs = (x, dh, lora_A, dx.clone(), keep, dropout_scale(dropout))
    options = {"dropout_p": dropout, "seed": torch.tensor([SEED], device=DEVICE)}
    only_dA = dx_pass(x, dh, lora_A, None, **options)
    only_dx = dx.clone()
    assert dx_pass(None, dh, lora_A, only_dx, needs_dA=False, **options) is None
    dA = dx_pass(x, dh, lora_A, dx, **options)
    for output, actual in enumerate((dA, dx)):
        assert_as_good_as(actual, naive.naive_dx_pass, *inputs, output=output)
    assert torch.equal(only_dA, dA)
    assert torch.equal(only_dx, dx)
    written = poisoned(M, K, dtype=dtype)
    assert torch.equal(dx_pass(x, dh, lora_A, written, adds=False, **options), dA)
    zeros = (x, dh, lora_A, torch.zeros_like(dx), keep, dropout_scale(dropout))
    assert_as_good_as(written, naive.naive_dx_pass, *zeros, output=1)


def test_rows_are_summed_in_many_chunks_when_the_device_has_many_processors(monkeypatch):
    import sda_fast.kernels.moda_backward as backward

    monkeypatch.setattr(backward, "programs_wanted", lambda device: 6)
    dy, h, lora_B = random(129, 33), random(129, 8), random(33, 8)
    gates, ids, _ = random_gates("per_row", 129, 4)
    inputs = (dy, h, lora_B, gates, ids, SCALING)
    for output, actual in enumerate(dy_pass(*inputs)):
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)
    x, lora_A = random(129, 40), random(8, 40)
    inputs = (x, h, lora_A, torch.zeros_like(x))
    assert_as_good_as(dx_pass(x, h, lora_A, None), naive.naive_dx_pass, *inputs, output=0)


def test_no_rows_are_fine():
    empty, h = torch.empty(0, 17, device=DEVICE), torch.empty(0, 8, device=DEVICE)
    lora = torch.randn(17, 8, device=DEVICE)
    gates, ids = torch.rand(2, 4, device=DEVICE), torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert project(empty, lora.t().contiguous()).shape == (0, 8)
    assert expand_add(empty, h, lora, gates, ids, SCALING).shape == (0, 17)
    assert gated_linear(empty, torch.randn(5, 17, device=DEVICE), None, h, lora[:5], gates, ids, SCALING).shape == (
        0,
        5,
    )
    assert input_gradient(empty, torch.randn(17, 5, device=DEVICE), h, lora[:5].t().contiguous()).shape == (0, 5)
    dh, dB, dgates = dy_pass(empty, h, lora, gates, ids, SCALING)
    assert dh.shape == (0, 8) and not dB.any() and not dgates.any() and dgates.shape == (2, 4)
    dA = dx_pass(empty, h, lora.t().contiguous(), empty.clone())
    assert dA.shape == (8, 17) and not dA.any()


def test_a_gradient_expanded_from_one_number_is_read_right():
    dy = torch.ones(1, 1, device=DEVICE).expand(17, 33)
    h, lora_B = random(17, 8), random(33, 8)
    gates, ids, _ = random_gates("per_row", 17, 8)
    inputs = (dy, h, lora_B, gates, ids, SCALING)
    for output, actual in enumerate(dy_pass(*inputs)):
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)


def random_group(layers, layout, M, R, E, dtype):
    """h of all layers, and each layer's B, gates and gate of every row; ids and rows per sequence."""
    h = random(M, layers * R)
    lora_B = [random(N, R, scale=0.1, strided=False) for N in (17, 129, 40)[:layers]]
    gates, ids, rows_per_sequence = zip(*(random_gates(layout, M, E) for _ in range(layers)), strict=True)
    ids, rows_per_sequence = ids[0], rows_per_sequence[0]
    which = torch.arange(M, device=DEVICE) if ids is None else ids.repeat_interleave(rows_per_sequence)[:M]
    gate = [one[which.long()].repeat_interleave(R // E, 1) * SCALING for one in gates]
    return h, lora_B, list(gates), gate, ids, rows_per_sequence


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("layers", "M", "R", "E", "has_bias"), [(3, 129, 24, 8, True), (2, 37, 8, 2, False), (3, 5, 64, 4, False)]
)
def test_a_group_is_expanded_in_one_launch_as_layer_by_layer(layers, M, R, E, has_bias, layout, dtype):
    h, lora_B, gates, gate, ids, rows_per_sequence = random_group(layers, layout, M, R, E, dtype)
    outs = [poisoned(M, one.shape[0], dtype=dtype) for one in lora_B]
    biases = [torch.randn(one.shape[0], device=DEVICE).to(dtype) if has_bias else None for one in lora_B]
    options = {"rows_per_sequence": rows_per_sequence}
    assert expand_group(h, lora_B, gates, ids, SCALING, biases=biases, outs=outs, **options) is outs
    for layer, out in enumerate(outs):
        of_layer = h[:, layer * R : (layer + 1) * R]
        before = torch.zeros_like(out) if biases[layer] is None else biases[layer].expand_as(out)
        assert_as_good_as(out, naive.naive_expand_add, before, of_layer, lora_B[layer], gate[layer])
        alone = expand(
            of_layer,
            lora_B[layer],
            gates[layer],
            ids,
            SCALING,
            bias=biases[layer],
            out=torch.empty_like(out),
            **options,
        )
        assert torch.equal(out, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layers", "M", "R", "E"), [(3, 129, 24, 8), (2, 37, 8, 2), (3, 5, 32, 1)])
def test_a_group_s_dy_are_read_in_one_launch_as_layer_by_layer(layers, M, R, E, layout, dtype):
    h, lora_B, gates, _, ids, rows_per_sequence = random_group(layers, layout, M, R, E, dtype)
    dys = [random(M, one.shape[0], dtype=dtype) for one in lora_B]
    options = {"rows_per_sequence": rows_per_sequence}
    dh_out = poisoned(M, layers * R)
    dh, dB, dgates = dy_pass_of_group(dys, h, lora_B, gates, ids, SCALING, dh_out=dh_out, **options)
    assert dh is dh_out
    for layer, dy in enumerate(dys):
        of_layer = slice(layer * R, (layer + 1) * R)
        inputs = (dy, h[:, of_layer], lora_B[layer], gates[layer], ids, SCALING)
        for output, actual in enumerate((dh[:, of_layer], dB[layer], dgates[layer])):
            assert_as_good_as(actual, lambda *tensors: naive.naive_dy_pass(*tensors, **options), *inputs, output=output)


@pytest.mark.parametrize("wanted", ["dh", "dB", "dgates", "dh dB", "dB dgates"])
def test_of_a_group_only_what_is_needed_is_given(wanted):
    h, lora_B, gates, _, ids, rows_per_sequence = random_group(3, "per_sequence", 37, 8, 4, torch.float32)
    dys = [random(37, one.shape[0]) for one in lora_B]
    options = {"rows_per_sequence": rows_per_sequence}
    whole = dy_pass_of_group(dys, h, lora_B, gates, ids, SCALING, **options)
    flags = {
        f"needs_{name.removeprefix('d') if name == 'dgates' else name}": name in wanted.split()
        for name in ("dh", "dB", "dgates")
    }
    dh, dB, dgates = dy_pass_of_group(dys, h, lora_B, gates, ids, SCALING, **options, **flags)
    for name, actual, expected in (("dh", [dh], [whole[0]]), ("dB", dB, whole[1]), ("dgates", dgates, whole[2])):
        for one, other in zip(actual, expected, strict=True):
            assert one is None if name not in wanted.split() else torch.equal(one, other)


def test_a_group_of_no_rows_or_with_a_layer_of_no_columns():
    h, lora_B, gates, _, ids, _ = random_group(2, "per_row", 6, 8, 4, torch.float32)
    empty = [torch.empty(0, one.shape[0], device=DEVICE) for one in lora_B]
    dh, dB, dgates = dy_pass_of_group(empty, h[:0], lora_B, gates, ids[:0], SCALING)
    assert dh.shape == (0, 16) and all(one.abs().sum() == 0 for one in (*dB, *dgates))
    dys = [random(6, 17), torch.empty(6, 0, device=DEVICE)]
    narrow = [lora_B[0], lora_B[1][:0]]
    dh, dB, dgates = dy_pass_of_group(dys, h, narrow, gates, ids, SCALING)
    alone = dy_pass(dys[0], h[:, :8], lora_B[0], gates[0], ids, SCALING)
    assert torch.equal(dh[:, :8], alone[0]) and dh[:, 8:].abs().sum() == 0 and dB[1].shape == (0, 8)
    assert dgates[1].abs().sum() == 0
