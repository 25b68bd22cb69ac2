"""The CUDA kernels of the low-rank passes, run thread by thread on the host, against PyTorch in float64."""

import ctypes
from ctypes import Structure, c_float, c_int, c_int64, c_void_p

import pytest
import torch

from sda_fast.kernels import moda_naive as naive
from sda_fast.ops.dropout import dropout_scale, dropout_threshold, keep_mask

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
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCALING = 4.0
SEED = -7234567890123456789
ROUNDING = 8 * torch.finfo(torch.float32).eps


class Dropout(Structure):
    _fields_ = (("seed", c_void_p), ("threshold", c_int), ("scale", c_float))


class Gate(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("gates", "ids")),
        *((name, c_int) for name in ("ids_are_64bit", "rows_per_id", "lines", "num_experts")),
        ("scaling", c_float),
    )


class Project(Structure):
    _fields_ = (
        *(("x", c_void_p), ("x_stride", c_int64), ("lora_A", c_void_p), ("kind", c_int), ("lora_kind", c_int)),
        *(("h", c_void_p), ("h_stride", c_int64), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "K", "R", "splits")),
        ("parts", c_void_p),
    )


class Expand(Structure):
    _fields_ = (
        *(("y", c_void_p), ("y_stride", c_int64), ("bias", c_void_p), ("h", c_void_p), ("h_stride", c_int64)),
        *(("lora_B", c_void_p), ("stride_column", c_int64), ("stride_rank", c_int64)),
        *(("kind", c_int), ("lora_kind", c_int), ("gate", Gate), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "N", "R", "adds")),
    )


class Dy(Structure):
    _fields_ = (
        *(("dy", c_void_p), ("dy_stride", c_int64), ("h", c_void_p), ("h_stride", c_int64)),
        *(("lora_B", c_void_p), ("kind", c_int), ("lora_kind", c_int), ("gate", Gate)),
        *(("dh", c_void_p), ("dh_stride", c_int64), ("dB", c_void_p), ("dgates", c_void_p)),
        *((name, c_int) for name in ("M", "N", "R", "chunks")),
        *((name, c_void_p) for name in ("dhg_parts", "dB_parts", "dgates_parts")),
    )


class Dx(Structure):
    _fields_ = (
        *(("x", c_void_p), ("x_stride", c_int64), ("dh", c_void_p), ("dh_stride", c_int64)),
        *(("lora_A", c_void_p), ("kind", c_int), ("lora_kind", c_int)),
        *(("dx", c_void_p), ("dx_stride", c_int64), ("dA", c_void_p), ("dropout", Dropout)),
        *((name, c_int) for name in ("M", "K", "R", "adds", "chunks")),
        ("dA_parts", c_void_p),
    )


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def rows_of(tensor):
    """Pointer and row stride of a matrix."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


class Passes:
    """The launchers on CPU tensors, in the manner of the Triton kernels' functions."""

    def __init__(self, library):
        self.library = library
        self.parts = 0  # how many the last call had
        self.seed = torch.tensor([SEED])

    def dropout(self, probability):
        if dropout_threshold(probability) == 0:
            return Dropout(None, 0, 1.0)
        return Dropout(pointer(self.seed), dropout_threshold(probability), dropout_scale(probability))

    def gate(self, gates, ids, rows_per_id):
        if gates is None:
            return Gate()
        wide = ids is not None and ids.dtype == torch.int64
        return Gate(pointer(gates), pointer(ids), wide, rows_per_id, *gates.shape, SCALING)

    def project(self, x, lora_A, *, dropout=0.0, out, parts=0):
        kinds = KINDS[x.dtype], KINDS[lora_A.dtype]
        sizes = *x.shape, lora_A.shape[0]
        arguments = Project(*rows_of(x), pointer(lora_A), *kinds, *rows_of(out), self.dropout(dropout), *sizes)
        self.parts = self.library.emulated_project(ctypes.byref(arguments), parts)
        return out

    def expand(self, y, h, lora_B, gates, ids, rows_per_id=1, *, bias=None, adds=True, dropout=0.0):
        arguments = Expand(
            *(*rows_of(y), pointer(bias), *rows_of(h), pointer(lora_B), *lora_B.stride()),
            *(KINDS[y.dtype], KINDS[lora_B.dtype], self.gate(gates, ids, rows_per_id), self.dropout(dropout)),
            *(*y.shape, h.shape[1], adds),
        )
        self.library.emulated_expand(ctypes.byref(arguments))
        return y

    def dy_pass(self, dy, h, lora_B, gates, ids, rows_per_id=1, *, dh, dB, dgates, parts=0):
        arguments = Dy(
            *(*rows_of(dy), *rows_of(h), pointer(lora_B), KINDS[dy.dtype], KINDS[lora_B.dtype]),
            *(self.gate(gates, ids, rows_per_id), *rows_of(dh), pointer(dB), pointer(dgates)),
            *(*dy.shape, h.shape[1]),
        )
        self.parts = self.library.emulated_dy_pass(ctypes.byref(arguments), parts)
        return dh, dB, dgates

    def dx_pass(self, x, dh, lora_A, dx, *, dA, adds=True, dropout=0.0, parts=0):
        arguments = Dx(
            *(*rows_of(x), *rows_of(dh), pointer(lora_A), KINDS[x.dtype], KINDS[lora_A.dtype]),
            *(*rows_of(dx), pointer(dA), self.dropout(dropout), *x.shape, dh.shape[1], adds),
        )
        self.parts = self.library.emulated_dx_pass(ctypes.byref(arguments), parts)
        return dA, dx


@pytest.fixture
def passes(emulated_kernels):
    torch.manual_seed(0)
    return Passes(emulated_kernels.library)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_is_dropout_and_a_product(passes, shape, dropout, dtype):
    M, K, _, R, _ = shape
    x = random(M, K, dtype=dtype)
    for lora_A, parts in ((adapter(R, K), 0), (adapter(R, K, dtype=dtype), 3)):
        h = passes.project(x, lora_A, dropout=dropout, out=framed(poisoned(M, R), 1), parts=parts)
        assert_as_good_as(h, naive.naive_project, x, lora_A, *mask_of(M, K, dropout))
        assert is_frame_untouched(h)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-5, 0.99999, 1.0])
def test_dropout_mask_equals_pytorch_element_by_element(passes, dropout):
    M, K = 37, 64
    ones, eye = torch.ones(M, K, dtype=torch.float16), torch.eye(K)
    expected = keep_mask(M, K, dropout, SEED) * dropout_scale(dropout)
    h = passes.project(ones, eye, dropout=dropout, out=poisoned(M, K))
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=0)
    # Two passes of backward and what is expanded apart drop the same elements.
    for R in (32, 64):
        dh = torch.zeros(M, R)
        dh[:, 0] = 1
        lora_A = torch.zeros(R, K)
        lora_A[0] = 1
        dA, dx = passes.dx_pass(ones, dh, lora_A, torch.zeros(M, K).half(), dA=poisoned(R, K), dropout=dropout)
        torch.testing.assert_close(dx, expected.half(), rtol=1e-3, atol=0)
        torch.testing.assert_close(dA[0], expected.sum(0), rtol=1e-5, atol=0)
        assert not dA[1:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand_adds_in_place_or_overwrites(passes, shape, layout, dtype):
    M, _, N, R, E = shape
    y, h, lora_B = random(M, N, dtype=dtype), framed(torch.randn(M, R), 1), adapter(N, R)
    gates, ids, rows_per_id = random_gates(layout, M, E)
    gate = naive.naive_gate(gates, ids, SCALING, M, R, rows_per_id)
    before = y.clone()
    passes.expand(y, h, lora_B, gates, ids, rows_per_id)
    assert_as_good_as(y, naive.naive_expand_add, before, h, lora_B, gate)
    assert is_frame_untouched(y)
    bias, narrow = torch.randn(N).to(dtype), lora_B.to(dtype)
    written = passes.expand(
        framed(poisoned(M, N, dtype=dtype)), h, narrow, gates, ids, rows_per_id, bias=bias, adds=False
    )
    assert_as_good_as(written, naive.naive_expand_add, bias.expand(M, N), h, narrow, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dy_pass_gives_all_three_gradients(passes, shape, layout, dtype):
    M, _, N, R, E = shape
    dy, h = random(M, N, dtype=dtype), framed(torch.randn(M, R), 1)
    gates, ids, rows_per_id = random_gates(layout, M, E)
    for lora_B, parts in ((adapter(N, R), 0), (adapter(N, R, dtype=dtype), 2)):
        outputs = {"dh": framed(poisoned(M, R), 1), "dB": poisoned(N, R), "dgates": poisoned(*gates.shape)}
        results = passes.dy_pass(dy, h, lora_B, gates, ids, rows_per_id, **outputs, parts=parts)
        inputs = (dy, h, lora_B, gates, ids, SCALING, rows_per_id)
        for output, actual in enumerate(results):
            assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)
        assert is_frame_untouched(outputs["dh"])


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_dy_pass_gives_only_what_is_asked_for(passes, rank):
    M, N, E = 70, 136, 8
    dy, h, lora_B = random(M, N, dtype=torch.float16), torch.randn(M, rank), adapter(N, rank)
    gates, ids, _ = random_gates("per_row", M, E)
    shapes = {"dh": (M, rank), "dB": (N, rank), "dgates": (3, E)}
    full = passes.dy_pass(dy, h, lora_B, gates, ids, **{name: poisoned(*shape) for name, shape in shapes.items()})
    for wanted, whole in zip(shapes, full, strict=True):
        outputs = {name: poisoned(*shape) if name == wanted else None for name, shape in shapes.items()}
        passes.dy_pass(dy, h, lora_B, gates, ids, **outputs)
        assert torch.equal(outputs[wanted], whole)


def test_one_line_of_gates_serves_all_rows(passes):
    M, N, R, E = 45, 40, 16, 4
    dy, h, lora_B, gates = random(M, N, dtype=torch.bfloat16), torch.randn(M, R), adapter(N, R), torch.rand(1, E)
    outputs = {"dh": poisoned(M, R), "dB": poisoned(N, R), "dgates": poisoned(1, E)}
    results = passes.dy_pass(dy, h, lora_B, gates, None, **outputs)
    ids = torch.zeros(M, dtype=torch.int64)
    for output, actual in enumerate(results):
        assert_as_good_as(actual, naive.naive_dy_pass, dy, h, lora_B, gates, ids, SCALING, output=output)
    y = passes.expand(poisoned(M, N, dtype=torch.bfloat16), h, lora_B, gates, None, adds=False)
    assert torch.equal(y, passes.expand(torch.zeros_like(y), h, lora_B, gates, ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dx_pass_gives_dA_and_adds_to_dx(passes, shape, dropout, dtype):
    M, K, _, R, _ = shape
    x, dh, before = random(M, K, dtype=dtype), framed(torch.randn(M, R), 1), random(M, K, dtype=dtype)
    for lora_A, parts in ((adapter(R, K), 0), (adapter(R, K, dtype=dtype), 2)):
        dx = framed(before.clone())
        inputs = (x, dh, lora_A, before, *mask_of(M, K, dropout))
        results = passes.dx_pass(x, dh, lora_A, dx, dA=poisoned(R, K), dropout=dropout, parts=parts)
        for output, actual in enumerate(results):
            assert_as_good_as(actual, naive.naive_dx_pass, *inputs, output=output)
        assert is_frame_untouched(dx)
        only_dA, _ = passes.dx_pass(x, dh, lora_A, None, dA=poisoned(R, K), dropout=dropout, parts=1)
        assert_as_good_as(only_dA, naive.naive_dx_pass, *inputs, output=0)
        written = poisoned(M, K, dtype=dtype)
        again, _ = passes.dx_pass(x, dh, lora_A, written, dA=poisoned(R, K), dropout=dropout, adds=False, parts=parts)
        assert torch.equal(again, results[0])
        zeros = (x, dh, lora_A, torch.zeros_like(before), *mask_of(M, K, dropout))
        assert_as_good_as(written, naive.naive_dx_pass, *zeros, output=1)
        # dx alone is the expanding pass with A for B.
        apart = passes.expand(before.clone(), dh, lora_A.t(), None, None, dropout=dropout)
        assert torch.equal(apart, dx)


def test_without_rows_gradients_are_zero(passes):
    N, R, E = 40, 16, 4
    empty, h, gates = torch.empty(0, N).half(), torch.empty(0, R), torch.rand(2, E)
    ids, lora = torch.empty(0, dtype=torch.int32), adapter(N, R)
    passes.project(empty, lora.t().contiguous(), out=h)
    passes.expand(empty, h, lora, gates, ids)
    _, dB, dgates = passes.dy_pass(empty, h, lora, gates, ids, dh=h, dB=poisoned(N, R), dgates=poisoned(2, E))
    dA, _ = passes.dx_pass(empty, h, lora.t().contiguous(), empty, dA=poisoned(R, N))
    assert not dB.any() and not dgates.any() and not dA.any()


def test_rows_and_columns_are_summed_in_many_parts(passes):
    M, N, R = 300, 4096 + 8, 8
    x, h, lora_B = random(M, N, dtype=torch.float16), torch.randn(M, R), adapter(N, R)
    gates, ids, rows_per_id = random_gates("per_sequence", M, 4)
    lora_A = lora_B.t().contiguous()
    assert_as_good_as(passes.project(x, lora_A, out=poisoned(M, R), parts=7), naive.naive_project, x, lora_A)
    assert passes.parts == 7
    outputs = {"dh": poisoned(M, R), "dB": poisoned(N, R), "dgates": poisoned(3, 4)}
    results = passes.dy_pass(x, h, lora_B, gates, ids, rows_per_id, **outputs, parts=5)
    assert passes.parts == 5
    for output, actual in enumerate(results):
        inputs = (x, h, lora_B, gates, ids, SCALING, rows_per_id)
        assert_as_good_as(actual, naive.naive_dy_pass, *inputs, output=output)
    dA, _ = passes.dx_pass(x, h, lora_A, None, dA=poisoned(R, N), parts=4)
    assert passes.parts == 4
    assert_as_good_as(dA, naive.naive_dx_pass, x, h, lora_A, torch.zeros_like(x), output=0)


def test_a_row_that_is_not_finite_spoils_no_other(passes):
    M, N, R, E = 40, 40, 8, 4
    values = torch.randn(M, N).half()
    h, lora_B, gates = torch.randn(M, R), adapter(N, R), torch.rand(2, E)
    ids = torch.zeros(M, dtype=torch.int32)
    ids[7] = 1
    spoilt, spoilt_h = values.clone(), h.clone()
    spoilt[7], spoilt_h[7] = float("nan"), float("inf")
    others = torch.arange(M) != 7

    def results(x, low_rank):
        projected = passes.project(x, lora_B.t().contiguous(), out=poisoned(M, R))
        expanded = passes.expand(x.clone(), low_rank, lora_B, gates, ids)
        outputs = {"dh": poisoned(M, R), "dB": None, "dgates": poisoned(2, E)}
        dh, _, dgates = passes.dy_pass(x, low_rank, lora_B, gates, ids, **outputs)
        return projected[others], expanded[others], dh[others], dgates[:1]

    for one, other in zip(results(spoilt, spoilt_h), results(values, h), strict=True):
        assert torch.equal(one, other)
