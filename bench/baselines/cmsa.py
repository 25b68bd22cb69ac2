"""What CMSA and InfoNCE are measured against: written for the purpose, after how such losses are usually written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_cmsa(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """CMSA with every B x B matrix, autograd doing the rest."""
    logits = x @ y.T / temperature
    targets = torch.softmax((x @ x.T + y @ y.T) / 2 * temperature, dim=-1)
    image_to_text = -(targets * functional.log_softmax(logits, dim=-1)).sum(-1)
    text_to_image = -(targets.T * functional.log_softmax(logits.T, dim=-1)).sum(-1)
    return (image_to_text + text_to_image).mean() / 2


def compiled_cmsa() -> Loss:
    """`plain_cmsa` through torch.compile with its default settings."""
    return torch.compile(plain_cmsa)


def _image_to_text_rows(rows: slice, x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    targets = torch.softmax((x[rows] @ x.T + y[rows] @ y.T) / 2 * temperature, dim=-1)
    return -(targets * functional.log_softmax(x[rows] @ y.T / temperature, dim=-1)).sum()


def _teacher_lse_rows(rows: slice, x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    return torch.logsumexp((x[rows] @ x.T + y[rows] @ y.T) / 2 * temperature, dim=-1)


def _text_to_image_rows(rows: slice, x: Tensor, y: Tensor, temperature: Tensor, teacher_lse: Tensor) -> Tensor:
    scores = (x[rows] @ x.T + y[rows] @ y.T) / 2 * temperature
    transposed_targets = torch.exp(scores - teacher_lse)
    return -(transposed_targets * functional.log_softmax(y[rows] @ x.T / temperature, dim=-1)).sum()


def checkpointed_cmsa(x: Tensor, y: Tensor, temperature: Tensor, rows_per_chunk: int = 1024) -> Tensor:
    """CMSA by chunks of rows, each under torch.utils.checkpoint."""
    chunks = [slice(start, start + rows_per_chunk) for start in range(0, len(x), rows_per_chunk)]

    def recomputed(function, *arguments):
        return checkpoint(function, *arguments, use_reentrant=False)

    teacher_lse = torch.cat([recomputed(_teacher_lse_rows, rows, x, y, temperature) for rows in chunks])
    total = sum(recomputed(_image_to_text_rows, rows, x, y, temperature) for rows in chunks)
    total = total + sum(recomputed(_text_to_image_rows, rows, x, y, temperature, teacher_lse) for rows in chunks)
    return total / (2 * len(x))


def plain_infonce(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """InfoNCE as CLIP trainers write it: both directions' cross entropy of one B x B matrix of logits."""
    logits = x @ y.T / temperature
    labels = torch.arange(len(x), device=x.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
