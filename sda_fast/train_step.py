"""Forward and backward of one contrastive batch, at once or chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sda_fast.batches import Batch, Chunk
from sda_fast.losses.cached import cached_contrastive_step
from sda_fast.lvlm.encode import encode, reduce_buckets, tower_features
from sda_fast.lvlm.load import LVLM


@dataclass(frozen=True)
class ContrastiveStep:
    """Adds a batch's gradients to the adapters and the loss's temperature.

    Attributes:
        loss: ([B, D], [B, D]) -> scalar; with several processes it gathers the vectors itself.
        reduce_to: width of the vectors that the loss sees, by bucket means; None: the model's own.
    """

    lvlm: LVLM
    loss: nn.Module
    reduce_to: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's loss, detached. In chunks if the batch is cut into them, to rounding the same either way."""

        def loss_in_batch_order(images: Tensor, texts: Tensor) -> Tensor:
            return self.loss(batch.images.in_batch_order(images), batch.texts.in_batch_order(texts))

        if batch.chunk_size is not None:
            return cached_contrastive_step(
                self.encode_keeping_features, batch.images.chunks, batch.texts.chunks, loss_in_batch_order
            )
        images = torch.cat([self.encode(chunk, "image") for chunk in batch.images.chunks])
        texts = torch.cat([self.encode(chunk, "text") for chunk in batch.texts.chunks])
        loss = loss_in_batch_order(images, texts)
        loss.backward()
        return loss.detach()

    def encode(self, chunk: Chunk, modality: str) -> Tensor:
        """[b, reduce_to] float32 vectors of a chunk."""
        vectors = encode(self.lvlm, chunk.tensors, modality, image_features=chunk.image_features)
        return vectors if self.reduce_to is None else reduce_buckets(vectors, self.reduce_to)

    def encode_keeping_features(self, chunk: Chunk, modality: str) -> Tensor:
        """As `encode`; the tower's output stays with the chunk, in main memory, for the second visit."""
        if modality == "image" and chunk.image_features is None:
            features = tower_features(self.lvlm, chunk.tensors)
            chunk.image_features = [{name: part.cpu() for name, part in one.items()} for one in features]
        return self.encode(chunk, modality)


@contextlib.contextmanager
def training_mode(lvlm: LVLM, *, gradient_checkpointing: bool) -> Iterator[None]:
    """The decoder in training mode (dropout of the adapters), the frozen tower not; everything as before afterwards."""
    decoder = lvlm.language_model
    lvlm.model.eval()
    decoder.train()
    if gradient_checkpointing:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if gradient_checkpointing:
            decoder.gradient_checkpointing_disable()
        lvlm.model.eval()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (where PyTorch raises a plain RuntimeError)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
