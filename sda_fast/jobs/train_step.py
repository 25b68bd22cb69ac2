"""Forward and backward of one contrastive batch, at once or chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sda_fast.jobs.batches import Batch, Chunk
from sda_fast.jobs.checkpointed_layers import CheckpointedLayers
from sda_fast.jobs.features import Tower
from sda_fast.losses.cached import LossFunction, cached_contrastive_step, failing_together
from sda_fast.losses.distributed import sharded_cmsa_loss
from sda_fast.losses.modules import CMSALoss, InfoNCELoss
from sda_fast.lvlm.encode import encode, reduce_buckets
from sda_fast.lvlm.load import LVLM


@dataclass(frozen=True)
class ContrastiveStep:
    """Adds a batch's gradients to the adapters and the loss's temperature.

    Attributes:
        loss: ([B, D], [B, D]) -> scalar.
        reduce_to: width of the vectors that the loss sees, by bucket means; None: the model's own.
        tower: makes the features that the batch lacks, before anything is encoded.
        across_ranks: as in `cached_contrastive_step`; for batches in chunks.
    """

    lvlm: LVLM
    loss: LossFunction
    reduce_to: int | None
    tower: Tower
    across_ranks: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's loss, detached. In chunks if the batch is cut into them, to rounding the same either way."""

        def loss_in_batch_order(images: Tensor, texts: Tensor) -> Tensor:
            return self.loss(batch.images.in_batch_order(images), batch.texts.in_batch_order(texts))

        with failing_together(self.across_ranks and batch.chunk_size is not None):
            self.tower.complete(batch.images.chunks)
        if batch.chunk_size is not None:
            return cached_contrastive_step(
                self.encode,
                batch.images.chunks,
                batch.texts.chunks,
                loss_in_batch_order,
                across_ranks=self.across_ranks,
            )
        images = torch.cat([self.encode(chunk, "image") for chunk in batch.images.chunks])
        texts = torch.cat([self.encode(chunk, "text") for chunk in batch.texts.chunks])
        loss = loss_in_batch_order(images, texts)
        loss.backward()
        return loss.detach()

    def encode(self, chunk: Chunk, modality: str) -> Tensor:
        """[b, reduce_to] float32 vectors of a chunk whose features are complete."""
        features = chunk.image_features if modality == "image" else None
        vectors = encode(self.lvlm, chunk.tensors, modality, image_features=features, packed=chunk.packed)
        return vectors if self.reduce_to is None else reduce_buckets(vectors, self.reduce_to)


def loss_across_processes(loss: CMSALoss | InfoNCELoss) -> LossFunction:
    """`loss` over the items of all processes, each giving its own; gradients are then shares, to be summed."""

    options: dict[str, Any] = {"normalize": loss.normalize, "targets": "hard"}
    if isinstance(loss, CMSALoss):
        options = {
            "normalize": loss.normalize,
            "detach_teacher": loss.detach_teacher,
            "row_normalized_targets": loss.row_normalized_targets,
        }

    def sharded(images: Tensor, texts: Tensor) -> Tensor:
        return sharded_cmsa_loss(images, texts, loss.temperature, **options)

    return sharded


@contextlib.contextmanager
def training_mode(
    lvlm: LVLM, *, gradient_checkpointing: bool, checkpointed_layers: int | Literal["auto"] | None = None
) -> Iterator[CheckpointedLayers]:
    """The decoder in training mode (dropout of the adapters), the frozen tower not; everything as before afterwards.

    Args:
        checkpointed_layers: with `gradient_checkpointing`, how many layers from the first on; None, or "auto" until
            the number is found: all.
    Yields:
        The layers, of which others can be checkpointed on the way.
    """
    decoder = lvlm.language_model
    layers = CheckpointedLayers(decoder, enabled=gradient_checkpointing)
    lvlm.model.eval()
    decoder.train()
    if gradient_checkpointing:
        renamed = hasattr(decoder, "activation_checkpointing_enable")
        enable = decoder.activation_checkpointing_enable if renamed else decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers makes the embeddings require a gradient, which only re-entrant checkpointing needs.
        decoder.disable_input_require_grads()
    try:
        if gradient_checkpointing and isinstance(checkpointed_layers, int):
            layers.limit(checkpointed_layers)
        yield layers
    finally:
        if gradient_checkpointing:
            renamed = hasattr(decoder, "activation_checkpointing_disable")
            (decoder.activation_checkpointing_disable if renamed else decoder.gradient_checkpointing_disable)()
        lvlm.model.eval()
