"""The dropout mask: one specification, a plain version and packed ones (the host library's: test_host_library)."""

from __future__ import annotations

import pytest
import torch

from sda_fast.ops.dropout import (
    drop,
    dropout_scale,
    dropout_threshold,
    keep_bits,
    keep_mask,
    packed_by_numpy,
    packed_by_pytorch,
    philox_words,
)

pytestmark = pytest.mark.usefixtures("without_host_library")

SHAPES = [(1, 1), (1, 17), (17, 8), (3, 129), (129, 40), (0, 16)]


def philox_in_plain_integers(counter: int, seed: int) -> list[int]:
    """Philox4x32-7 (Salmon et al. 2011) in Python integers."""
    c, key = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_1 ^ c[1] ^ key[0], low_1, high_0 ^ c[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 2**45 + 12345])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_words_follow_philox4x32_7(counter: int, seed: int) -> None:
    words = philox_words(torch.tensor([counter]), seed)
    assert words.tolist() == [philox_in_plain_integers(counter, seed)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.999])
def test_packed_bits_equal_the_plain_mask(rows: int, columns: int, dropout: float) -> None:
    seed = 2**40 + 3
    bits = keep_bits(rows, columns, dropout, torch.tensor([seed]))
    assert bits.shape == (rows, -(-columns // 8))
    unpacked = (bits[:, :, None] >> torch.arange(8)) & 1
    assert torch.equal(
        unpacked.view(rows, bits.shape[1] * 8)[:, :columns].bool(), keep_mask(rows, columns, dropout, seed)
    )


def test_bits_do_not_depend_on_how_the_counters_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_bits(50, 129, 0.3, torch.tensor([9]))
    monkeypatch.setattr("sda_fast.ops.dropout.COUNTERS_PER_CHUNK", 64)
    assert torch.equal(keep_bits(50, 129, 0.3, torch.tensor([9])), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_drop_keeps_values_bit_for_bit_and_zeroes_the_rest(dtype: torch.dtype, rows: int, columns: int) -> None:
    values = torch.randn(columns, rows).to(dtype).t()
    kept = keep_mask(rows, columns, 0.4, 5)
    expected = torch.where(kept, values, torch.zeros((), dtype=dtype))
    assert torch.equal(drop(values, keep_bits(rows, columns, 0.4, torch.tensor([5]))), expected)


def test_the_share_of_dropped_elements_is_the_probability() -> None:
    share = 1 - keep_mask(500, 1000, 0.1, 1).double().mean().item()
    standard_error = (0.1 * 0.9 / 500_000) ** 0.5
    assert abs(share - 0.1) < 5 * standard_error


def test_scale_makes_the_expectation_exact() -> None:
    assert dropout_threshold(0.1) == 6554
    assert dropout_scale(0.1) * (1 - 6554 / 65536) == pytest.approx(1, abs=1e-15)
    assert dropout_scale(0.999999) == 0.0
    assert not keep_bits(3, 9, 0.999999, torch.tensor([1])).any()


@pytest.mark.parametrize("first", [0, 2**32 - 64, 2**32, 2**45 + 64])
@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 - 1])
def test_both_ways_of_packing_follow_the_plain_words(first: int, seed: int) -> None:
    words = philox_words(torch.arange(first, first + 64), seed)
    samples = torch.stack((words & 0xFFFF, words >> 16), dim=2).view(64, 8)
    packed = ((samples >= 30000) << torch.arange(8)).sum(1)
    assert packed_by_numpy(first, 64, 30000, seed).tolist() == packed.tolist()
    assert packed_by_pytorch(first, 64, 30000, torch.tensor(seed)).tolist() == packed.tolist()
