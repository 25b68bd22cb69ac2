"""Forward and backward of one contrastive batch, at once or chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sda_fast.data.items import Item
from sda_fast.jobs.batches import Batch, BatchMaker, Chunk, image_area
from sda_fast.jobs.features import Tower
from sda_fast.losses.cached import (
    LossFunction,
    RandomState,
    cached_contrastive_step,
    failing_together,
    is_out_of_memory,
)
from sda_fast.losses.distributed import gather_integers, sharded_cmsa_loss
from sda_fast.losses.modules import CMSALoss, InfoNCELoss
from sda_fast.lvlm.encode import encode, reduce_buckets
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import attribute_text

CPU_CHUNK = 32


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
def training_mode(lvlm: LVLM, *, gradient_checkpointing: bool) -> Iterator[None]:
    """The decoder in training mode (dropout of the adapters), the frozen tower not; everything as before afterwards."""
    decoder = lvlm.language_model
    lvlm.model.eval()
    decoder.train()
    if gradient_checkpointing:
        renamed = hasattr(decoder, "activation_checkpointing_enable")
        enable = decoder.activation_checkpointing_enable if renamed else decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers makes the embeddings require a gradient, which only re-entrant checkpointing needs.
        decoder.disable_input_require_grads()
    try:
        yield
    finally:
        if gradient_checkpointing:
            renamed = hasattr(decoder, "activation_checkpointing_disable")
            (decoder.activation_checkpointing_disable if renamed else decoder.gradient_checkpointing_disable)()
        lvlm.model.eval()


def fitting_chunk_size(step: ContrastiveStep, maker: BatchMaker, items: Sequence[Item], batch_size: int) -> int | None:
    """The largest of batch_size, a half, a quarter ... items whose chunks fit into memory; None if a whole batch does.

    Tries a forward and a backward pass over the longest image sequences and the longest texts of `items`. On the CPU,
    where running out of memory ends the process, it starts from 32. Leaves gradients and random states as they were.
    """
    by_area = sorted(items, key=lambda item: -image_area(item, maker.image_options))
    by_length = sorted(items, key=lambda item: -len(attribute_text(item, maker.prompts)))
    largest = batch_size if step.lvlm.device.type == "cuda" else min(batch_size, CPU_CHUNK)
    random_state = RandomState.now()
    parameters = [parameter for parameter in step.lvlm.model.parameters() if parameter.requires_grad]
    size = largest
    while True:
        chunks = {"image": maker.image_chunk(by_area[:size]), "text": maker.text_chunk(by_length[:size])}
        fits = True
        try:
            step.tower.complete([chunks["image"]])
            for modality, chunk in chunks.items():
                torch.autograd.grad(step.encode(chunk, modality).sum(), parameters, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            fits = False
        random_state.restore()
        if fits:
            return None if size == batch_size else size
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = (size + 1) // 2


def agreed_chunk_size(step: ContrastiveStep, maker: BatchMaker, items: Sequence[Item], share: int) -> int | None:
    """`fitting_chunk_size` of this process's share of a batch, the smallest over the processes; None if all say None.

    All must encode in chunks or none: their collective operations differ. And it is one size because a checkpoint holds
    one.
    """
    with failing_together(step.across_ranks):
        size = fitting_chunk_size(step, maker, items, share)
    if not step.across_ranks:
        return size
    # A share that fits whole is no smaller than a size that is less than a share: they differ by one item at most.
    sizes = [size for size in gather_integers(size or 0, step.lvlm.device) if size]
    return min(sizes, default=None)
