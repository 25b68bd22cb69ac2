"""MoDA written down plainly, expert by expert: what every other path is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def moda_linear_naive(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    row_gates: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_scale: float = 1.0,
) -> Tensor:
    """y = x W^T + bias + scaling * sum_e g_e * B_e A_e dropout(x), one expert after the other.

    Args:
        x: [M, K].
        weight: [N, K], decoded.
        lora_A, lora_B: [R, K] and [N, R], experts stacked.
        row_gates: [M, E], the gates of every row.
        scaling: alpha / r.
        bias: [N] or None.
        kept: bool [M, K], the elements that dropout keeps; None is no dropout.
        dropout_scale: factor of the kept elements.
    Returns:
        [M, N]; gradients come from autograd.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    dropped = x if kept is None else x * kept * dropout_scale
    num_experts = row_gates.shape[1]
    rank = lora_A.shape[0] // num_experts
    for expert in range(num_experts):
        own = slice(expert * rank, (expert + 1) * rank)
        update = dropped @ lora_A[own].t() @ lora_B[:, own].t()
        y = y + scaling * row_gates[:, expert, None] * update
    return y
