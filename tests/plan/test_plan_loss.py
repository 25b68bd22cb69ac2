"""What the planner counts of a step of the losses, beside what an H200 took and what a step must not take."""

from __future__ import annotations

import pytest
import torch

from sda_fast import infonce_loss
from sda_fast.ops import cmsa
from sda_fast.ops.cmsa_products import forced_products
from sda_fast.planning.cards import card_named
from sda_fast.planning.ledger import OTHER, PRODUCT, TRITON
from sda_fast.planning.loss import LossCount, count_loss

CARD = card_named("H200 SXM")
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def large() -> LossCount:
    return count_loss(65536, 3584, torch.bfloat16, CARD)


def test_a_step_of_65536_items_takes_less_than_a_gibibyte_beside_vectors_and_gradients(large: LossCount) -> None:
    assert large.extra_bytes < 1024 * MEBIBYTE
    assert large.peak_bytes - large.extra_bytes == 2 * 2 * 65536 * 3584


def test_operations_of_a_large_batch_are_near_16_or_by_halves_14(large: LossCount) -> None:
    with forced_products("halves"):
        by_halves = count_loss(65536, 3584, torch.bfloat16, CARD)
    # three sweeps and three gradient products; a block against itself takes other numbers
    for count, operations in ((large, 16), (by_halves, 14)):
        assert count.operations / (65536**2 * 3584) == pytest.approx(operations, rel=0.02)
        assert count.extra_bytes < 1024 * MEBIBYTE


def test_a_batch_of_8192_is_one_block_of_few_launches_whose_products_are_formed_once() -> None:
    count = count_loss(8192, 3584, torch.bfloat16, CARD)
    assert sum(count.launches.values()) <= 90 and count.extra_bytes < 960 * MEBIBYTE
    # L, five eighths of S, three gradient products
    assert count.operations == (2 + 2.5 + 6) * 8192**2 * 3584


@pytest.mark.parametrize("items", [2000, 9000, 12000, 30000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_counted_is_what_the_cut_allows(items: int, dtype: torch.dtype) -> None:
    vectors = torch.empty(items, 3584, dtype=dtype, device="meta")
    count = count_loss(items, 3584, dtype, CARD)
    third_bytes = 2 * vectors.numel() if dtype != torch.float32 else 0
    allowed = max(cmsa.GPU_WORKSPACE_BYTES, cmsa.gpu_workspace(vectors, "library"))
    # statistics by item, and the parts that the kernels leave of one visit
    assert count.extra_bytes < allowed + third_bytes + 1200 * items + 64 * MEBIBYTE


def test_a_card_with_fewer_multiprocessors_has_other_blocks() -> None:
    small = count_loss(30000, 3584, torch.bfloat16, card_named("RTX 3090"))
    assert small.operations != count_loss(30000, 3584, torch.bfloat16, CARD).operations


def test_the_gpu_way_for_long_vectors_is_what_is_counted(large: LossCount) -> None:
    short = count_loss(300, 64, torch.bfloat16, CARD)
    assert large.launches[PRODUCT] > large.launches[TRITON] > 0
    # the kernels form the logits' products themselves; the library has those of the gradients
    assert 0 < short.operations < 300**2 * 64 * 9 and short.launches[OTHER] > 0


def test_infonce_needs_its_products_twice_and_the_gradients_once() -> None:
    count = count_loss(65536, 3584, torch.bfloat16, CARD, infonce_loss)
    assert count.operations / (65536**2 * 3584) == pytest.approx(8, rel=0.01)
