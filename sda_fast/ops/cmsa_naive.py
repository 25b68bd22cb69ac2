"""CMSA and InfoNCE written out with all B x B matrices: slow, large, and what every other path is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_normalize(embeddings: Tensor) -> Tensor:
    """Divide each row by its Euclidean norm; a zero row stays zero and receives no gradient."""
    squares = embeddings.square().sum(dim=-1, keepdim=True)
    is_zero = squares == 0
    return embeddings * torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).rsqrt())


def naive_cmsa_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    *,
    detach_teacher: bool = False,
    normalize: bool = False,
    row_normalized_targets: bool = False,
) -> Tensor:
    """CMSA from its definition: cross entropies against the batch's own similarities, by autograd.

    Args:
        image_embeddings: [B, D], any floating dtype; everything is computed in it.
        text_embeddings: [B, D], same dtype.
        temperature: positive scalar.
        detach_teacher: send no gradient through the targets (to the embeddings or to the temperature).
        normalize: divide every row by its norm first.
        row_normalized_targets: use the softmax of the transposed teacher, instead of the transposed softmax, as
            targets of the text-to-image direction.

    Returns:
        Scalar of the embeddings' dtype.
    """
    x, y = image_embeddings, text_embeddings
    if normalize:
        x, y = naive_normalize(x), naive_normalize(y)
    logits = x @ y.T / temperature
    teacher = temperature * (x @ x.T + y @ y.T) / 2
    if detach_teacher:
        teacher = teacher.detach()
    targets = teacher.softmax(dim=1)
    transposed_targets = teacher.T.softmax(dim=1) if row_normalized_targets else targets.T
    image_to_text = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    text_to_image = -(transposed_targets * logits.T.log_softmax(dim=1)).sum(dim=1)
    return (image_to_text + text_to_image).mean() / 2


def naive_infonce_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, temperature: Tensor | float, *, normalize: bool = False
) -> Tensor:
    """Symmetric InfoNCE: the mean of both directions' cross entropies against the diagonal, by autograd.

    Args:
        image_embeddings: [B, D], any floating dtype; everything is computed in it.
        text_embeddings: [B, D], same dtype.
        temperature: positive scalar.
        normalize: divide every row by its norm first.

    Returns:
        Scalar of the embeddings' dtype.
    """
    x, y = image_embeddings, text_embeddings
    if normalize:
        x, y = naive_normalize(x), naive_normalize(y)
    logits = x @ y.T / temperature
    items = torch.arange(len(x), device=x.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, items) + cross_entropy(logits.T, items)) / 2
