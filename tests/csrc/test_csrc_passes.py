"""The CUDA kernels of the low-rank passes, run thread by thread on the host, against PyTorch in float64."""

import pytest
import torch

from sda_fast.kernels import moda_naive as naive
from sda_fast.ops.cuda_passes import dx_pass, dy_pass, expand, expand_add, project
from sda_fast.ops.dropout import dropout_scale, keep_mask

# M, K, N, R, E
SHAPES = [
    (1, 8, 8, 8, 8),
    (17, 72, 520, 8, 4),
    (129, 296, 264, 16, 8),
    (70, 40, 600, 24, 8),
    (33, 1064, 32, 32, 16),
    (67, 328, 136, 48, 16),
    (40, 64, 1032, 64, 1),
    (35, 24, 16, 3, 1),
]
DTYPES = [torch.bfloat16, torch.float16]
LAYOUTS = ["per_sequence", "per_row", "row_gates"]
SCALING = 4.0
SEED = -7234567890123456789
ROUNDING = 8 * torch.finfo(torch.float32).eps

pytestmark = pytest.mark.usefixtures("cuda_passes_on_host")


def framed(values, margin=8):
    """The values as a window of a larger matrix full of NaN, so that reading or writing past it shows."""
    rows, columns = values.shape
    # 16-byte aligned rows, wherever the frame lies.
    row = -(-(columns + 2 * margin) // 8) * 8
    frame = torch.full(((rows + 2) * row + 8,), float("nan"), dtype=values.dtype)
    skip = -frame.data_ptr() % 16 // values.element_size()
    window = frame[skip : skip + (rows + 2) * row].view(rows + 2, row)[1 : rows + 1, margin : margin + columns]
    window.copy_(values)
    return window


def is_frame_untouched(window):
    frame = window.new_empty(0).set_(window.untyped_storage())
    return int(frame.isnan().sum()) == frame.numel() - window.numel()


def random(*shape, dtype=torch.float32, scale=1.0):
    return framed((torch.randn(*shape) * scale).to(dtype))


def adapter(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 0.1).to(dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def random_gates(layout, M, E):
    """Gates, ids and rows per id in one of the three layouts."""
    if layout == "row_gates":
        return torch.rand(M, E), None, 1
    rows_per_id = 5 if layout == "per_sequence" else 1
    dtype = torch.int32 if layout == "per_sequence" else torch.int64
    return torch.rand(3, E), torch.randint(0, 3, (-(-M // rows_per_id),), dtype=dtype), rows_per_id


def assert_as_good_as(actual, function, *inputs, output=None):
    """`actual` may be off the float64 value of function(*inputs) by no more than the same function in plain PyTorch.

    A norm over a handful of numbers is a matter of luck: up to 16 of them may instead keep to the bound derived from
    three roundings of the terms that they are the sum of.
    """

    def value(convert):
        result = function(
            *(convert(t.contiguous()) if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs)
        )
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


def mask_of(M, K, dropout):
    return (keep_mask(M, K, dropout, SEED) if dropout else None), dropout_scale(dropout)


def dropping(dropout):
    return {"dropout_p": dropout, "seed": torch.tensor([SEED])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_is_dropout_and_a_product(shape, dropout, dtype):
    M, K, _, R, _ = shape
    x = random(M, K, dtype=dtype)
    for lora_A, parts in ((adapter(R, K), 0), (adapter(R, K, dtype=dtype), 3)):
        h = project(x, lora_A, **dropping(dropout), out=framed(torch.zeros(M, R), 1), parts=parts)
        assert_as_good_as(h, naive.naive_project, x, lora_A, *mask_of(M, K, dropout))
        assert is_frame_untouched(h)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-5, 0.99999, 1.0])
def test_dropout_mask_equals_pytorch_element_by_element(dropout):
    M, K = 37, 64
    ones = torch.ones(M, K, dtype=torch.float16)
    expected = keep_mask(M, K, dropout, SEED) * dropout_scale(dropout)
    torch.testing.assert_close(project(ones, torch.eye(K), **dropping(dropout)), expected, rtol=1e-6, atol=0)
    # Backward drops the same elements, in one kernel and, above 32 ranks, in two.
    for R in (32, 64):
        dh, lora_A, dx = torch.zeros(M, R), torch.zeros(R, K), torch.zeros(M, K).half()
        dh[:, 0] = lora_A[0] = 1
        dA = dx_pass(ones, dh, lora_A, dx, **dropping(dropout))
        assert torch.equal(dx, expected.half())
        torch.testing.assert_close(dA[0], expected.sum(0), rtol=1e-5, atol=0)
        assert not dA[1:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand_adds_in_place_or_overwrites(shape, layout, dtype):
    M, _, N, R, E = shape
    y, h, lora_B = random(M, N, dtype=dtype), framed(torch.randn(M, R), 1), adapter(N, R)
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_sequence)
    before = y.clone()
    assert expand_add(y, h, lora_B, gates, ids, SCALING, rows_per_sequence=rows_per_sequence) is y
    assert_as_good_as(y, naive.naive_expand_add, before, h, lora_B, gate)
    assert is_frame_untouched(y)
    bias, narrow, out = torch.randn(N).to(dtype), lora_B.to(dtype), random(M, N, dtype=dtype)
    options = {"rows_per_sequence": rows_per_sequence, "bias": bias, "out": out}
    assert expand(h, narrow, gates, ids, SCALING, **options) is out
    assert_as_good_as(out, naive.naive_expand_add, bias.expand(M, N), h, narrow, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dy_pass_gives_all_three_gradients(shape, layout, dtype):
    M, _, N, R, E = shape
    dy, h = random(M, N, dtype=dtype), framed(torch.randn(M, R), 1)
    gates, ids, rows_per_sequence = random_gates(layout, M, E)
    for lora_B, parts in ((adapter(N, R), 0), (adapter(N, R, dtype=dtype), 2)):
        inputs = (dy, h, lora_B, gates, ids, SCALING)
        dh_out = framed(torch.zeros(M, R), 1)
        results = dy_pass(*inputs, rows_per_sequence=rows_per_sequence, dh_out=dh_out, parts=parts)
        assert results[0] is dh_out
        for output, actual in enumerate(results):
            assert_as_good_as(actual, naive.naive_dy_pass, *inputs, rows_per_sequence, output=output)
        assert is_frame_untouched(dh_out)


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_dy_pass_gives_only_what_is_asked_for(rank):
    M, N, E = 70, 136, 8
    gates, ids, _ = random_gates("per_row", M, E)
    inputs = (random(M, N, dtype=torch.float16), torch.randn(M, rank), adapter(N, rank), gates, ids, SCALING)
    full, names = dy_pass(*inputs), ("needs_dh", "needs_dB", "needs_gates")
    for index, name in enumerate(names):
        some = dy_pass(*inputs, **{other: other == name for other in names})
        assert torch.equal(some[index], full[index])
        assert [result is None for result in some] == [other != name for other in names]


def test_one_line_of_gates_serves_all_rows():
    M, N, R, E = 45, 40, 16, 4
    dy, h, lora_B, gates = random(M, N, dtype=torch.bfloat16), torch.randn(M, R), adapter(N, R), torch.rand(1, E)
    ids = torch.zeros(M, dtype=torch.int64)
    for output, actual in enumerate(dy_pass(dy, h, lora_B, gates, None, SCALING)):
        assert_as_good_as(actual, naive.naive_dy_pass, dy, h, lora_B, gates, ids, SCALING, output=output)
    y = expand(h, lora_B, gates, None, SCALING, out=dy.clone())
    assert torch.equal(y, expand(h, lora_B, gates, ids, SCALING, out=dy.clone()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dx_pass_gives_dA_and_adds_to_dx(shape, dropout, dtype):
    M, K, _, R, _ = shape
    x, dh, before = random(M, K, dtype=dtype), framed(torch.randn(M, R), 1), random(M, K, dtype=dtype)
    drop = dropping(dropout)
    for lora_A, parts in ((adapter(R, K), 0), (adapter(R, K, dtype=dtype), 2)):
        dx, written, apart = framed(before.clone()), before.clone(), before.clone()
        inputs = (x, dh, lora_A, before, *mask_of(M, K, dropout))
        dA = dx_pass(x, dh, lora_A, dx, **drop, parts=parts)
        for output, actual in enumerate((dA, dx)):
            assert_as_good_as(actual, naive.naive_dx_pass, *inputs, output=output)
        assert is_frame_untouched(dx)
        assert_as_good_as(dx_pass(x, dh, lora_A, None, **drop), naive.naive_dx_pass, *inputs, output=0)
        assert torch.equal(dx_pass(x, dh, lora_A, written, adds=False, **drop, parts=parts), dA)
        zeros = (x, dh, lora_A, torch.zeros_like(before), *mask_of(M, K, dropout))
        assert_as_good_as(written, naive.naive_dx_pass, *zeros, output=1)
        assert dx_pass(None, dh, lora_A, apart, needs_dA=False, **drop) is None
        assert torch.equal(apart, dx)


def test_without_rows_gradients_are_zero():
    N, R = 40, 16
    empty, h, gates = torch.empty(0, N).half(), torch.empty(0, R), torch.rand(2, 4)
    ids, lora = torch.empty(0, dtype=torch.int32), adapter(N, R)
    assert project(empty, lora.t().contiguous()).shape == (0, R)
    assert expand_add(empty, h, lora, gates, ids, SCALING).shape == (0, N)
    dh, dB, dgates = dy_pass(empty, h, lora, gates, ids, SCALING)
    assert dh.shape == (0, R) and dB.shape == (N, R) and dgates.shape == (2, 4)
    _, _, only_dgates = dy_pass(empty, h, lora, gates, ids, SCALING, needs_dh=False, needs_dB=False)
    dA = dx_pass(empty, h, lora.t().contiguous(), empty.clone())
    assert not any(gradient.any() for gradient in (dB, dgates, only_dgates, dA))


def test_rows_and_columns_are_summed_in_many_parts(cuda_passes_on_host):
    M, N, R = 300, 4096 + 8, 8
    x, h, lora_B = random(M, N, dtype=torch.float16), torch.randn(M, R), adapter(N, R)
    gates, ids, rows_per_sequence = random_gates("per_sequence", M, 4)
    lora_A = lora_B.t().contiguous()
    assert_as_good_as(project(x, lora_A, parts=7), naive.naive_project, x, lora_A)
    assert cuda_passes_on_host.parts == 7
    inputs = (x, h, lora_B, gates, ids, SCALING)
    results = dy_pass(*inputs, rows_per_sequence=rows_per_sequence, parts=5)
    assert cuda_passes_on_host.parts == 5
    for output, actual in enumerate(results):
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, rows_per_sequence, output=output)
    dA = dx_pass(x, h, lora_A, None, parts=4)
    assert cuda_passes_on_host.parts == 4
    assert_as_good_as(dA, naive.naive_dx_pass, x, h, lora_A, torch.zeros_like(x), output=0)


def test_rows_may_lie_further_apart_than_32_bits_count():
    M, K, R, stride = 34, 16, 8, 2**26
    x = torch.empty(M * stride, dtype=torch.float16).as_strided((M, K), (stride, 1))
    x.copy_(torch.randn(M, K))
    lora_A, low_rank, gates, ids = adapter(R, K), torch.randn(M, R), torch.rand(2, 4), torch.arange(M) % 2
    assert (M - 1) * stride > 2**31
    assert_as_good_as(project(x, lora_A), naive.naive_project, x, lora_A)
    inputs = (x, low_rank, lora_A.t(), gates, ids, SCALING)
    for output, actual in enumerate(dy_pass(*inputs)):
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)
    dA = dx_pass(x, low_rank, lora_A, None)
    assert_as_good_as(dA, naive.naive_dx_pass, x, low_rank, lora_A, torch.zeros(M, K).half(), output=0)


def test_a_row_that_is_not_finite_spoils_no_other():
    M, N, R, E = 40, 40, 8, 4
    values = torch.randn(M, N).half()
    h, lora_B, gates = torch.randn(M, R), adapter(N, R), torch.rand(2, E)
    ids = torch.zeros(M, dtype=torch.int32)
    ids[7] = 1
    spoilt, spoilt_h = values.clone(), h.clone()
    spoilt[7], spoilt_h[7] = float("nan"), float("inf")
    others = torch.arange(M) != 7

    def results(x, low_rank):
        expanded = expand_add(x.clone(), low_rank, lora_B, gates, ids, SCALING)
        dh, _, dgates = dy_pass(x, low_rank, lora_B, gates, ids, SCALING)
        dx = x.clone()
        dx_pass(x, low_rank, lora_B.t(), dx)
        projected = project(x, lora_B.t())
        return projected[others], expanded[others], dh[others], dx[others], dgates[:1]

    for one, other in zip(results(spoilt, spoilt_h), results(values, h), strict=True):
        assert torch.equal(one, other)


def test_what_is_dropped_is_not_read_as_a_number():
    M, K, R = 33, 64, 8
    x, keep = torch.randn(M, K).half(), keep_mask(M, K, 0.5, SEED)
    spoilt = torch.where(keep, x, float("nan"))
    lora_A, dh, drop = adapter(R, K), torch.randn(M, R), dropping(0.5)
    assert torch.equal(project(spoilt, lora_A, **drop), project(x, lora_A, **drop))
    assert torch.equal(dx_pass(spoilt, dh, lora_A, None, **drop), dx_pass(x, dh, lora_A, None, **drop))


def test_what_the_kernels_cannot_take_is_refused():
    x, h, lora = torch.zeros(4, 16).half(), torch.zeros(4, 8), torch.zeros(8, 16)
    gates, ids = torch.zeros(2, 4), torch.zeros(4, dtype=torch.int32)
    for wrong, message in (
        (x.float(), "float16 or bfloat16, got torch.float32"),
        (torch.zeros(4, 12).half(), "a multiple of 8 columns, got 12"),
        (torch.zeros(4, 20).half()[:, :16], "16-byte aligned rows"),
        (torch.zeros(4, 24).half()[:, 1:17], "16-byte aligned rows"),
    ):
        with pytest.raises(ValueError, match=message):
            project(wrong, lora[:, : wrong.shape[1]])
    with pytest.raises(ValueError, match="rank must be 1 to 64, got 65"):
        project(x, torch.zeros(65, 16))
    with pytest.raises(ValueError, match=r"lora_A must be \[8, 16\], got \[8, 8\]"):
        project(x, lora[:, :8])
    with pytest.raises(ValueError, match="needs a seed"):
        project(x, lora, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"h must be \[4, 8\], got \[3, 8\]"):
        expand_add(x, h[:3], lora.t(), gates, ids, SCALING)
    with pytest.raises(ValueError, match="not a multiple of 3 experts"):
        expand_add(x, h, lora.t(), torch.zeros(2, 3), ids, SCALING)
    with pytest.raises(ValueError, match="must have 1 or 4 lines, got 2"):
        dy_pass(x, h, lora.t(), gates, None, SCALING)
    with pytest.raises(ValueError, match="3 entries for 4 rows of 1 a sequence"):
        dy_pass(x, h, lora.t(), gates, ids[:3], SCALING)
    with pytest.raises(ValueError, match="differ in dtype"):
        dx_pass(x, h, lora, x.bfloat16())
