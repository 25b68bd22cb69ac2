"""MoDA written out with every intermediate in memory: slow, plain, and what the kernels are compared with.

Every function computes in the dtype of its activations (float64 gives the truth), whatever the dtype of the rest.
Sizes as in `moda_forward`; `keep` is a bool [M, K] mask or None, `keep_scale` the factor of a kept element.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_gate(
    gates: Tensor, modality_ids: Tensor | None, scaling: float, rows: int, rank: int, rows_per_sequence: int = 1
) -> Tensor:
    """G [M, R] = scaling * gates[which(row), expert(rank)]."""
    which = torch.arange(rows, device=gates.device)
    if modality_ids is not None:
        which = modality_ids.long()[which // rows_per_sequence]
    return scaling * gates[which].repeat_interleave(rank // gates.shape[1], dim=1)


def naive_dropout(x: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    """x with dropped elements at zero and kept ones scaled."""
    return x if keep is None else torch.where(keep, x * keep_scale, 0.0)


def naive_project(x: Tensor, lora_A: Tensor, keep: Tensor | None = None, keep_scale: float = 1.0) -> Tensor:
    """h = dropout(x) A^T."""
    return naive_dropout(x, keep, keep_scale) @ lora_A.to(x.dtype).t()


def naive_expand_add(y: Tensor, h: Tensor, lora_B: Tensor, gate: Tensor) -> Tensor:
    """y + (h * G) B^T."""
    return y + (h * gate).to(y.dtype) @ lora_B.to(y.dtype).t()


def naive_gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, lora_B: Tensor, gate: Tensor
) -> Tensor:
    """x W^T + bias + (h * G) B^T."""
    return naive_expand_add(torch.nn.functional.linear(x, weight, bias), h, lora_B, gate)


def naive_dy_pass(
    dy: Tensor,
    h: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    modality_ids: Tensor | None,
    scaling: float,
    rows_per_sequence: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dB, dgates) of y = ... + (h * G) B^T."""
    rows, rank = h.shape
    gate = naive_gate(gates, modality_ids, scaling, rows, rank, rows_per_sequence).to(dy.dtype)
    h = h.to(dy.dtype)
    dhg = dy @ lora_B.to(dy.dtype)
    dB = dy.t() @ (h * gate)
    dgates = scaling * (dhg * h).view(rows, gates.shape[1], -1).sum(dim=2)
    if modality_ids is not None:
        which = modality_ids.long()[torch.arange(rows, device=dy.device) // rows_per_sequence]
        dgates = torch.zeros(gates.shape, dtype=dy.dtype, device=dy.device).index_add_(0, which, dgates)
    return dhg * gate, dB, dgates


def naive_dx_pass(
    x: Tensor, dh: Tensor, lora_A: Tensor, dx: Tensor, keep: Tensor | None = None, keep_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(dA, dx + mask / (1 - p) * (dh A))."""
    dh = dh.to(x.dtype)
    return dh.t() @ naive_dropout(x, keep, keep_scale), dx + naive_dropout(dh @ lora_A.to(x.dtype), keep, keep_scale)


def naive_input_gradient(
    dy: Tensor, weight: Tensor, dh: Tensor, lora_A: Tensor, keep: Tensor | None = None, keep_scale: float = 1.0
) -> Tensor:
    """dy W + mask / (1 - p) * (dh A)."""
    return dy @ weight + naive_dropout(dh.to(dy.dtype) @ lora_A.to(dy.dtype), keep, keep_scale)
