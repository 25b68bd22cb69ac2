"""What the planner counts of a step of the losses, beside what an H200 took and what a step must not take."""

from __future__ import annotations

import pytest
import torch

from sda_fast import infonce_loss
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


def test_the_gpu_way_for_long_vectors_is_what_is_counted(large: LossCount) -> None:
    short = count_loss(300, 64, torch.bfloat16, CARD)
    assert large.launches[PRODUCT] > large.launches[TRITON] > 0
    # the kernels form the logits' products themselves; the library has those of the gradients
    assert 0 < short.operations < 300**2 * 64 * 9 and short.launches[OTHER] > 0


def test_infonce_needs_its_products_twice_and_the_gradients_once() -> None:
    count = count_loss(65536, 3584, torch.bfloat16, CARD, infonce_loss)
    assert count.operations / (65536**2 * 3584) == pytest.approx(8, rel=0.01)
