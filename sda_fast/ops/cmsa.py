"""CMSA (arXiv 2512.06883) and InfoNCE: the public functions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sda_fast.ops.cmsa_naive import naive_cmsa_loss, naive_infonce_loss


def cmsa_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    *,
    detach_teacher: bool = False,
    normalize: bool = False,
    row_normalized_targets: bool = False,
    targets: Literal["soft", "hard"] = "soft",
    backend: Literal["auto", "torch", "triton"] = "auto",
    block_size: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Cross-modal structural alignment loss (arXiv 2512.06883)."""
    if targets == "hard":
        return naive_infonce_loss(image_embeddings, text_embeddings, temperature, normalize=normalize)
    return naive_cmsa_loss(
        image_embeddings,
        text_embeddings,
        temperature,
        detach_teacher=detach_teacher,
        normalize=normalize,
        row_normalized_targets=row_normalized_targets,
    )


def infonce_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    *,
    normalize: bool = False,
    backend: Literal["auto", "torch", "triton"] = "auto",
    block_size: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE: `cmsa_loss` with `targets="hard"`."""
    return cmsa_loss(
        image_embeddings,
        text_embeddings,
        temperature,
        normalize=normalize,
        targets="hard",
        backend=backend,
        block_size=block_size,
        workspace_bytes=workspace_bytes,
    )
