"""The CUDA kernels themselves, run thread by thread on the host, against bitsandbytes' CPU decode and float64."""

import itertools

import pytest
import torch

from sda_fast.ops.cuda_library import CODE_MULTIPLIERS
from sda_fast.ops.quantized import QUANT_TYPES

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

# Half a unit in the last place, relative, at worst.
BFLOAT16_HALF_ULP = 2.0**-8
FLOAT16_HALF_ULP = 2.0**-11


@pytest.fixture(autouse=True)
def uncompiled():
    """bitsandbytes compiles its statistics' decode, which costs more than all these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantised(shape, *, quant_type="nf4", block_size=64, nested=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).add(0.05)
    return bitsandbytes.quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type=quant_type)


def decoded(packed, state, dtype):
    """bitsandbytes' decode of the flattened matrix: its CPU kernel is wrong where blocks straddle rows (0.50.2)."""
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.dequantize_blockwise(absmax, state.state2) + state.offset
    flat_shape = (1, state.shape.numel())
    flat = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, state.blocksize, state.quant_type, flat_shape, dtype)
    return flat.view(state.shape)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


SHAPES = [(1, 2), (3, 5), (1, 1023), (32, 32), (7, 147), (16, 64), (5, 1000), (33, 72), (17, 129), (9, 2048)]
TWO_TILES_A_WARP = (41, 2048)


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decode_equals_bitsandbytes_bit_for_bit(emulated_kernels, quant_type, block_size):
    for (seed, shape), nested, dtype in itertools.product(
        enumerate([*SHAPES, TWO_TILES_A_WARP]), [False, True], [torch.bfloat16, torch.float16]
    ):
        packed, state = quantised(shape, quant_type=quant_type, block_size=block_size, nested=nested, seed=seed)
        out = emulated_kernels.decode(packed, state, poisoned(*shape, dtype=dtype))
        torch.testing.assert_close(out, decoded(packed, state, dtype), rtol=0, atol=0)


def test_decode_of_misaligned_pointers_equals_bitsandbytes(emulated_kernels):
    packed, state = quantised((40, 64))
    shifted_packed = torch.cat([packed.new_zeros(1, 1), packed])[1:]
    shifted_out = poisoned(40 * 64 + 1, dtype=torch.bfloat16)[1:]
    emulated_kernels.decode(shifted_packed, state, shifted_out)
    torch.testing.assert_close(shifted_out.view(40, 64), decoded(packed, state, torch.bfloat16), rtol=0, atol=0)


# K a multiple of 32 takes the tensor cores.
FOLD_SHAPES = [(1, 32), (70, 288), (33, 72), (64, 256), (5, 992), (17, 129), (3, 5), (130, 160), (31, 544)]


def assert_fold_rounds_once(
    emulated_kernels, quantised_weight, rank, experts, lora_dtype, dtypes=(torch.bfloat16, torch.float16), seed=0
):
    packed, state = quantised_weight
    rows, columns = state.shape
    generator = torch.Generator().manual_seed(seed)
    lora_A = (torch.randn(rank, columns, generator=generator) * 0.1).to(lora_dtype)
    lora_B = (torch.randn(rows, rank, generator=generator) * 0.1).to(lora_dtype)
    gates = torch.softmax(torch.randn(experts, generator=generator), 0)
    scaled_B = lora_B.double() * (4.0 * gates.double()).repeat_interleave(rank // experts)
    exact = decoded(packed, state, torch.float32).double() + scaled_B @ lora_A.double()
    # Three tf32 products leave 2^-20 of the update's absolute sum; the output is then rounded once.
    slack = 2.0**-19 * (scaled_B.abs() @ lora_A.double().abs() + exact.abs())
    for dtype in dtypes:
        half_ulp = BFLOAT16_HALF_ULP if dtype == torch.bfloat16 else FLOAT16_HALF_ULP
        out = poisoned(rows, columns, dtype=dtype)
        emulated_kernels.decode_fold(packed, state, lora_A, lora_B, gates, 4.0, out)
        error = (out.double() - exact).abs()
        allowed = half_ulp * exact.abs() + slack + 2.0**-25
        assert (error <= allowed).all(), (rows, columns, rank, lora_dtype, dtype, (error / allowed).max())


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "experts"), [(8, 8), (8, 1), (16, 4), (6, 3), (21, 7)])
def test_fold_rounds_the_exact_sum_once(emulated_kernels, rank, experts, lora_dtype):
    for seed, shape in enumerate(FOLD_SHAPES):
        weight = quantised(shape, seed=seed, block_size=(32, 64, 128)[seed % 3], nested=seed % 2 == 0)
        assert_fold_rounds_once(emulated_kernels, weight, rank, experts, lora_dtype, seed=seed)


def test_fold_is_right_at_the_edges_of_its_tiles(emulated_kernels):
    """Rows by 32 and by the 64 to 256 of a CTA, columns by the halves of 32 and by the 64 to 256 of a CTA."""
    shapes = itertools.product((1, 33, 65), (32, 64, 96, 128, 160, 288))
    ranks = ((8, 4), (1, 1), (12, 2), (24, 8), (40, 5))
    kinds = list(itertools.product((torch.float32, torch.bfloat16), ranks, (64, 4096, 32)))
    for seed, shape in enumerate(shapes):
        lora_dtype, (rank, experts), block_size = kinds[7 * seed % len(kinds)]
        weight = quantised(shape, seed=seed, block_size=block_size, nested=seed % 2 == 0)
        dtypes = ((torch.bfloat16, torch.float16)[seed % 2],)
        assert_fold_rounds_once(emulated_kernels, weight, rank, experts, lora_dtype, dtypes, seed)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((2081, 160), 8), ((1100, 160), 16), ((4103, 32), 70)],
    ids=["one chunk of ranks", "two chunks", "more ranks than are laid out at once"],
)
def test_fold_is_right_where_a_cta_goes_down_several_tiles_of_rows(emulated_kernels, shape, rank):
    emulated_kernels.library.call("set_multiprocessors", 1)
    try:
        weight = quantised(shape, seed=rank)
        assert_fold_rounds_once(emulated_kernels, weight, rank, 2, torch.float32, (torch.bfloat16,))
    finally:
        emulated_kernels.library.call("set_multiprocessors", 2)


def test_fold_of_misaligned_pointers_rounds_once(emulated_kernels):
    packed, state = quantised((40, 64))
    shifted = torch.cat([packed.new_zeros(4, 1), packed])[4:]
    assert shifted.data_ptr() % 16
    assert_fold_rounds_once(emulated_kernels, (shifted, state), 8, 2, torch.float32)


def test_fold_of_a_zero_update_equals_plain_decode(emulated_kernels):
    for shape in FOLD_SHAPES:
        packed, state = quantised(shape)
        lora_A = torch.randn(8, shape[1])
        out = poisoned(*shape, dtype=torch.bfloat16)
        emulated_kernels.decode_fold(packed, state, lora_A, torch.zeros(shape[0], 8), torch.full((8,), 0.125), 4.0, out)
        torch.testing.assert_close(out, decoded(packed, state, torch.bfloat16), rtol=0, atol=0)


LINEAR_CASES = [
    # M, N, K, block size, fast path expected
    (1, 40, 256, 64, True),
    (1, 16, 64, 64, True),
    (3, 130, 320, 64, True),
    (8, 33, 96, 32, True),
    (9, 20, 512, 64, True),
    (17, 48, 384, 128, True),
    (32, 70, 128, 64, True),
    (33, 65, 256, 256, True),
    (64, 129, 640, 64, True),
    (64, 17, 64, 32, True),
    (12, 24, 1152, 4096, True),
    (2, 17, 129, 64, False),
    (65, 8, 64, 64, False),
    (5, 12, 96, 64, False),
]


@pytest.mark.parametrize(("M", "N", "K", "block_size", "fast"), LINEAR_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_is_no_less_accurate_than_decode_then_multiply(emulated_kernels, M, N, K, block_size, fast, dtype):
    for quant_type, nested, splits in (("nf4", True, 1), ("fp4", False, 3)):
        multiplier = CODE_MULTIPLIERS[QUANT_TYPES[quant_type], dtype]
        packed, state = quantised((N, K), quant_type=quant_type, block_size=block_size, nested=nested, seed=M + N)
        generator = torch.Generator().manual_seed(K)
        x = torch.randn(M, K, generator=generator).to(dtype)
        bias = torch.randn(N, generator=generator).to(dtype)
        hidden = torch.randn(M, 8, generator=generator)
        lora_B = torch.randn(N, 8, generator=generator)
        gates, scaling = torch.softmax(torch.randn(4, generator=generator), 0), 4.0
        out = poisoned(M, N, dtype=dtype)
        gated = {"gates": gates, "scaling": scaling}
        parts = emulated_kernels.linear(x, packed, state, bias, hidden, lora_B, multiplier, out, splits, **gated)
        assert bool(parts) == fast and parts <= splits
        weight = decoded(packed, state, torch.float32).double()
        hidden = hidden.double() * scaling * gates.double().repeat_interleave(2)
        update = bias.double() + hidden @ lora_B.double().T
        exact = x.double() @ weight.T + update
        rounded_weight = decoded(packed, state, dtype).double()
        reference = (x.double() @ rounded_weight.T + update).to(dtype)
        error = (out.double() - exact).square().mean().sqrt()
        reference_error = (reference.double() - exact).square().mean().sqrt()
        assert error <= 1.05 * reference_error + 1e-6 * exact.abs().max(), (error, reference_error)
        half_ulp = BFLOAT16_HALF_ULP if dtype == torch.bfloat16 else FLOAT16_HALF_ULP
        magnitude = x.double().abs() @ weight.abs().T
        assert ((out.double() - exact).abs() <= 2 * half_ulp * (magnitude + exact.abs()) + 1e-6).all()


def test_linear_without_bias_and_update(emulated_kernels):
    packed, state = quantised((24, 128))
    x = torch.randn(4, 128).bfloat16()
    out = poisoned(4, 24, dtype=torch.bfloat16)
    assert emulated_kernels.linear(x, packed, state, None, None, None, 1.4367, out)
    exact = x.double() @ decoded(packed, state, torch.float32).double().T
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=0.02)


# M, N, K, block size, splits asked for, splits made
SPLIT_CASES = [
    (1, 40, 1152, 64, 3, 3),
    (8, 17, 320, 64, 4, 3),
    (3, 33, 96, 32, 2, 2),
    (16, 24, 1152, 128, 7, 5),
    (20, 70, 512, 256, 5, 4),
    (64, 65, 640, 64, 99, 10),
    (40, 16, 160, 32, 2, 2),
]


@pytest.mark.parametrize(("M", "N", "K", "block_size", "wanted", "made"), SPLIT_CASES)
def test_parts_of_k_add_up_to_the_whole_and_always_to_the_same_bits(
    emulated_kernels, M, N, K, block_size, wanted, made
):
    generator = torch.Generator().manual_seed(M)
    packed, state = quantised((N, K), block_size=block_size, seed=N)
    x, bias = (torch.randn(*shape, generator=generator).half() for shape in ((M, K), (N,)))
    hidden, lora_B = torch.randn(M, 8, generator=generator), torch.randn(N, 8, generator=generator)

    def product(splits):
        out = poisoned(M, N, dtype=torch.float16)
        return emulated_kernels.linear(x, packed, state, bias, hidden, lora_B, 1.4367, out, splits), out

    (parts, split), (_, again), (_, whole) = product(wanted), product(wanted), product(1)
    assert parts == made
    assert torch.equal(split, again)
    # The order of float32 sums differs, and so at most the last place of the rounded result.
    magnitude = x.double().abs() @ decoded(packed, state, torch.float32).double().abs().T
    allowed = 2 * FLOAT16_HALF_ULP * whole.double().abs() + K * 2.0**-24 * magnitude + 2.0**-24
    assert ((split.double() - whole.double()).abs() <= allowed).all()


def test_k_is_split_only_where_rows_leave_multiprocessors_idle(emulated_kernels):
    # The emulated device has two multiprocessors: four CTAs are wanted, two of the largest kernel.
    def parts(M, N, K):
        packed, state = quantised((N, K))
        out = poisoned(M, N, dtype=torch.bfloat16)
        return emulated_kernels.linear(torch.ones(M, K).bfloat16(), packed, state, None, None, None, 1.0, out, 0)

    assert parts(1, 16, 64 * 256) == 4
    assert parts(1, 32, 64 * 256) == 2
    assert parts(1, 64, 64 * 256) == 1
    assert parts(33, 64, 64 * 16) == 2
    assert parts(1, 16, 64 * 64) == 1, "a part would have a single round of loads"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_code_multipliers_lower_the_rounding_error_of_nf4_and_make_fp4_exact(dtype):
    def rounding_error(quant_type, multiplier):
        code = bitsandbytes.get_4bit_type(quant_type, device="cpu").double()
        rounded = (code * multiplier).to(dtype).double() / multiplier
        return ((rounded - code).square().sum() / code.square().sum()).sqrt()

    assert rounding_error("nf4", CODE_MULTIPLIERS[QUANT_TYPES["nf4"], dtype]) < 0.65 * rounding_error("nf4", 1.0)
    assert rounding_error("fp4", CODE_MULTIPLIERS[QUANT_TYPES["fp4"], dtype]) < 1e-7
