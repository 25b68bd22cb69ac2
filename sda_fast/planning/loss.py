"""What one step of a contrastive loss takes on a GPU: the real code on fake tensors, counted and not timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.ops.cmsa import cmsa_loss
from sda_fast.planning.cards import Card
from sda_fast.planning.gpu import as_on_a_gpu
from sda_fast.planning.ledger import Ledger


@dataclass(frozen=True)
class LossCount:
    """Forward and backward of one loss.

    Attributes:
        peak_bytes: most memory at once beyond the vectors, gradients included, in the allocator's multiples of 512.
        extra_bytes: the same without the gradients.
        operations: of matrix products, two per multiply-add.
        launches: by kind, see `Ledger.launches`.
    """

    peak_bytes: int
    extra_bytes: int
    operations: float
    launches: Mapping[str, int]


def count_loss(
    items: int, dimensions: int, dtype: torch.dtype, card: Card, loss: Callable[..., Tensor] = cmsa_loss
) -> LossCount:
    """Count one step of `loss(x, y, temperature)` for vectors [items, dimensions], all three with gradients."""
    fake_mode = FakeTensorMode()
    ledger = Ledger(fake_mode)
    with fake_mode, ledger, as_on_a_gpu(ledger, card):
        vectors = [torch.empty(items, dimensions, dtype=dtype, requires_grad=True) for _ in range(2)]
        temperature = torch.empty((), requires_grad=True)
        gc.collect()
        held = sum(ledger.live.values())
        ledger.reset_peak()
        ledger.launches.clear()
        loss(*vectors, temperature).backward()
        gradients = sum(-(-one.nbytes // ledger.rounding) * ledger.rounding for one in map(_gradient, vectors))
    peak = ledger.peak - held
    return LossCount(peak, peak - gradients, sum(ledger.flops.values()), dict(ledger.launches))


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("the loss gives its vectors no gradient")
    return leaf.grad
