"""Sums in 24 bits, split over a 16-bit result and a byte: against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sda_fast.kernels import cmsa_merge, split_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SPACING = 2.0**-16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def memory(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    result = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    return result, torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 129), (3, 2048)], ids=str)
def test_many_pieces_are_rounded_once_each_and_once_at_the_end(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    result, low = memory(*shape, dtype=dtype)
    pieces = [(normal(*shape, seed=2 * i), normal(*shape, seed=2 * i + 1)) for i in range(10)]
    total, allowed = torch.zeros(shape, dtype=torch.float64, device=DEVICE), 0.0
    for number, (first, second) in enumerate(pieces):
        split_sums.add(result, low, first, second if number % 3 else None, (1.0, -1.0), from_zero=number == 0)
        total += first.double() - (second.double() if number % 3 else 0)
        allowed = allowed + SPACING * total.abs()
    split_sums.finish(result, low, torch.tensor(0.25, device=DEVICE))
    error = (result.double() - total / 4).abs()
    resolution = torch.finfo(dtype).eps / 2
    assert (error <= 1.01 * allowed / 4 + resolution * (total / 4).abs() + torch.finfo(dtype).smallest_normal).all()


def test_a_sum_of_24_bits_is_kept_exactly() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 1 + 2.0**-15, 2.0**-120, 3e38, torch.inf, -torch.inf], device=DEVICE)
    bits = values.view(torch.int32) & ~0xFF
    values = bits.view(torch.float32)[None]
    result, low = memory(*values.shape, dtype=torch.float16)
    split_sums.add(result, low, values, None, (1.0, 1.0), from_zero=True)
    stored = (result.view(torch.int16).int() << 16) | (low.int() << 8)
    assert torch.equal(stored.view(torch.float32), values)


def test_nan_of_any_bits_stays_nan() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32, device=DEVICE)
    values = bits.view(torch.float32)[None]
    result, low = memory(*values.shape, dtype=torch.float16)
    split_sums.add(result, low, values, None, (1.0, 1.0), from_zero=True)
    split_sums.add(result, low, torch.ones_like(values), None, (1.0, 1.0), from_zero=False)
    split_sums.finish(result, low, torch.ones((), device=DEVICE))
    assert result.isnan().all()


@pytest.mark.parametrize(("parts", "length"), [(1, 1), (16, 33), (37, 70)])
def test_parts_of_statistics_merge_into_running_ones(parts: int, length: int) -> None:
    made = normal(parts, 8, length)
    made[:, 1:6:2] = made[:, 1:6:2].abs() + 1
    made[:, 0:6:2] *= 30
    temperature = torch.tensor(1.7, device=DEVICE)
    running = torch.zeros(7, length + 3, dtype=torch.float64, device=DEVICE)
    running[:6:2] = -torch.inf
    for chosen in (made, made[: 1 + parts // 2].contiguous()):
        cmsa_merge.merge_statistics(running[:, 2:-1], chosen, temperature, soft=True)
    every = torch.cat([made, made[: 1 + parts // 2]]).double()
    own, own_sums, other, other_sums, teacher, teacher_sums, mean, reference = every.unbind(1)
    for_logits = 1 / (1.7 * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    for_teacher = 1.7**2 / 2 * for_logits
    merged = []
    for scale, largest, sums in (
        (for_logits, own, own_sums),
        (for_logits, other, other_sums),
        (for_teacher, teacher, teacher_sums),
    ):
        weights = torch.exp2(scale * (largest - largest.amax(0))) * sums
        merged += [largest.amax(0), weights.sum(0)]
    merged.append((weights * (mean + reference)).sum(0))
    torch.testing.assert_close(running[:, 2:-1], torch.stack(merged), rtol=1e-6, atol=1e-6)
    assert running[:6:2, [0, 1, -1]].isneginf().all() and not running[1::2, [0, 1, -1]].any()


@pytest.mark.parametrize(("parts", "length"), [(1, 1), (16, 33), (37, 70)])
def test_parts_of_target_sums_are_added_in_float64(parts: int, length: int) -> None:
    made = normal(parts, 4, length)
    running = normal(4, length + 3).double()
    before = running.clone()
    cmsa_merge.add_target_sums(running[:, 2:-1], made)
    received, given, reference, relative = made.double().unbind(1)
    expected = before.clone()
    expected[:, 2:-1] += torch.stack([received, given, given * reference, relative]).sum(1)
    torch.testing.assert_close(running, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(running[:, [0, 1, -1]], before[:, [0, 1, -1]])


@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize("with_second", [True, False])
def test_a_result_written_at_once_is_rounded_once(dtype: torch.dtype, with_second: bool) -> None:
    first, second, scale = normal(17, 129), normal(17, 129, seed=1), torch.tensor(0.25, device=DEVICE)
    result, _ = memory(17, 129, dtype=dtype)
    split_sums.write(result, first, second if with_second else None, (1.0, -1.0), scale)
    assert torch.equal(result, ((first - second if with_second else first) * scale).to(dtype))
