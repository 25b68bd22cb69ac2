"""CMSA and InfoNCE as modules that own their temperature."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sda_fast.losses.distributed import sharded_cmsa_loss
from sda_fast.ops.cmsa import check_temperature, check_ways, cmsa_loss


class _ContrastiveLoss(nn.Module):
    """The temperature, kept as its logarithm so that no optimiser step can make it zero or negative."""

    log_temperature: Tensor

    def __init__(
        self,
        temperature: float = 3.0,
        learnable: bool = True,
        *,
        normalize: bool = False,
        backend: Literal["auto", "torch", "triton"] = "auto",
        block_size: int | None = None,
        workspace_bytes: int | None = None,
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature.item() if isinstance(temperature, Tensor) else temperature)
        check_ways(backend, block_size, workspace_bytes)
        log_temperature = torch.tensor(math.log(temperature), dtype=torch.float32)
        if learnable:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.normalize = normalize
        self.backend = backend
        self.block_size = block_size
        self.workspace_bytes = workspace_bytes
        self.across_ranks = across_ranks

    @property
    def temperature(self) -> Tensor:
        """The temperature now: a positive scalar tensor, with gradient when it is learnable."""
        return self.log_temperature.float().exp()

    def form(self) -> dict[str, Any]:
        """The arguments of `cmsa_loss` that say which loss it is."""
        raise NotImplementedError

    def forward(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Image and text vectors [B, D] of one batch of items -> scalar float32 loss."""
        loss = sharded_cmsa_loss if self.across_ranks else cmsa_loss
        return loss(
            image_embeddings,
            text_embeddings,
            self.temperature,
            normalize=self.normalize,
            backend=self.backend,
            block_size=self.block_size,
            workspace_bytes=self.workspace_bytes,
            **self.form(),
        )

    def extra_repr(self) -> str:
        shown = {
            "temperature": f"{float(self.temperature.detach()):.4g}",
            "learnable": isinstance(self.log_temperature, nn.Parameter),
            "normalize": self.normalize,
            **self.form(),
            "across_ranks": self.across_ranks,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class CMSALoss(_ContrastiveLoss):
    """Cross-modal structural alignment with a learnable temperature; see :func:`sda_fast.cmsa_loss`.

    Args:
        temperature: where it starts; the published value is 3.
        learnable: train the temperature (a parameter named `log_temperature`) or keep it.
        detach_teacher, normalize, row_normalized_targets, backend, block_size, workspace_bytes: as in `cmsa_loss`.
        across_ranks: the batch is all ranks' items; see :func:`sda_fast.losses.distributed.sharded_cmsa_loss`.

    Raises:
        TypeError, ValueError: temperature, backend, block_size or workspace_bytes, as in `cmsa_loss`.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        learnable: bool = True,
        *,
        detach_teacher: bool = False,
        normalize: bool = False,
        row_normalized_targets: bool = False,
        backend: Literal["auto", "torch", "triton"] = "auto",
        block_size: int | None = None,
        workspace_bytes: int | None = None,
        across_ranks: bool = False,
    ) -> None:
        super().__init__(
            temperature,
            learnable,
            normalize=normalize,
            backend=backend,
            block_size=block_size,
            workspace_bytes=workspace_bytes,
            across_ranks=across_ranks,
        )
        self.detach_teacher = detach_teacher
        self.row_normalized_targets = row_normalized_targets

    def form(self) -> dict[str, Any]:
        return {"detach_teacher": self.detach_teacher, "row_normalized_targets": self.row_normalized_targets}


class InfoNCELoss(_ContrastiveLoss):
    """Symmetric InfoNCE with a learnable temperature: CMSA with the identity as targets (the ablation).

    Args:
        temperature: where it starts; 3 like CMSA's. For normalised vectors something like 0.07 is usual.
        learnable: train the temperature (a parameter named `log_temperature`) or keep it.
        normalize, backend, block_size, workspace_bytes: as in `cmsa_loss`.
        across_ranks: the batch is all ranks' items; see :func:`sda_fast.losses.distributed.sharded_cmsa_loss`.

    Raises:
        TypeError, ValueError: temperature, backend, block_size or workspace_bytes, as in `cmsa_loss`.
    """

    def form(self) -> dict[str, Any]:
        return {"targets": "hard"}
