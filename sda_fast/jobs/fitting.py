"""What fits into memory, found by trying: how many items are encoded at a time, how many layers are recomputed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from sda_fast.data.items import Item
from sda_fast.jobs.batches import BatchMaker, Chunk, image_area
from sda_fast.jobs.checkpointed_layers import CheckpointedLayers
from sda_fast.jobs.train_step import ContrastiveStep
from sda_fast.losses.cached import RandomState, failing_together, is_out_of_memory
from sda_fast.losses.chunking import FREE_MEMORY_SHARE, bytes_of_pass, free_memory
from sda_fast.losses.distributed import gather_integers
from sda_fast.lvlm.prompts import attribute_text

CPU_CHUNK = 32
# Of the free memory, what a step may plan to take where its peak is measured; the rest is for what fragments.
SHARE_OF_GPU = 0.85


@dataclass(frozen=True)
class LongestFirst:
    """A catalogue by the length of its sequences, of which the longest need the most memory."""

    maker: BatchMaker
    items: Sequence[Item]

    @cached_property
    def by_area(self) -> list[Item]:
        """By the size of the picture, which is read from every file's header."""
        return sorted(self.items, key=lambda item: -image_area(item, self.maker.image_options))

    @cached_property
    def by_length(self) -> list[Item]:
        return sorted(self.items, key=lambda item: -len(attribute_text(item, self.maker.prompts)))

    def chunks(self, size: int) -> dict[str, Chunk]:
        """The chunk of each modality that holds the `size` longest sequences."""
        return {
            "image": self.maker.image_chunk(self.by_area[:size]),
            "text": self.maker.text_chunk(self.by_length[:size]),
        }


def fitting_chunk_size(step: ContrastiveStep, longest: LongestFirst, batch_size: int) -> int | None:
    """The largest of batch_size, a half, a quarter ... items whose chunks fit into memory; None if a whole batch does.

    Tries a forward and a backward pass over the longest image sequences and the longest texts. On the CPU, where
    running out of memory ends the process, it starts from 32. Leaves gradients and random states as they were.
    """
    largest = batch_size if step.lvlm.device.type == "cuda" else min(batch_size, CPU_CHUNK)
    random_state = RandomState.now()
    parameters = [parameter for parameter in step.lvlm.model.parameters() if parameter.requires_grad]
    size = largest
    while True:
        chunks = longest.chunks(size)
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


def agreed_chunk_size(step: ContrastiveStep, longest: LongestFirst, share: int) -> int | None:
    """`fitting_chunk_size` of this process's share of a batch, the smallest over the processes; None if all say None.

    All must encode in chunks or none: their collective operations differ. And it is one size because a checkpoint holds
    one.
    """
    with failing_together(step.across_ranks):
        size = fitting_chunk_size(step, longest, share)
    if not step.across_ranks:
        return size
    # A share that fits whole is no smaller than a size that is less than a share: they differ by one item at most.
    sizes = [size for size in gather_integers(size or 0, step.lvlm.device) if size]
    return min(sizes, default=None)


def fewest_checkpointed_layers(
    step: ContrastiveStep, longest: LongestFirst, share: int, chunk_size: int | None, layers: CheckpointedLayers
) -> int:
    """The fewest layers whose recomputation makes the longest sequences fit into memory; `layers` is left at some.

    Measures what a step needs with all but the last layers checkpointed, concludes from it how many can keep their
    activations, and tries that. Leaves gradients and random states as they were.

    Args:
        share: items of a batch that this process encodes, in chunks of `chunk_size`, or at once if that is None.
        layers: of a decoder that is under gradient checkpointing.
    """
    chunks = longest.chunks(min(share, chunk_size or share))

    def encode(modalities: Sequence[str]) -> Tensor:
        return torch.cat([step.encode(chunks[modality], modality) for modality in modalities])

    passes = [tuple(chunks)] if chunk_size is None else [(modality,) for modality in chunks]
    random_state = RandomState.now()
    parameters = [parameter for parameter in step.lvlm.model.parameters() if parameter.requires_grad]

    def needed(count: int) -> float:
        """Bytes; infinitely many where memory runs out."""
        layers.limit(count)
        try:
            return max(bytes_of_pass(partial(encode, modalities))[0] for modalities in passes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            random_state.restore()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return math.inf

    step.tower.complete([chunks["image"]])
    total, device = len(layers), step.lvlm.device
    try:
        # Once more than is measured: the first pass also makes the gradients.
        needed(total)
        room = free_memory(device) * (SHARE_OF_GPU if device.type == "cuda" else FREE_MEMORY_SHARE)
        count = 0
        if total > 4:
            one, three = needed(total - 1), needed(total - 3)
            keep = 1 + int((room - one) / max(1.0, (three - one) / 2)) if one <= room else 0
            count = total - min(total, keep)
        if needed(count) <= room:
            while count > 0 and needed(count - 1) <= room:
                count -= 1
        else:
            count = min(count + 1, total)
            while count < total and needed(count) > room:
                count += 1
    finally:
        for parameter in parameters:
            parameter.grad = None
    return count


def agreed_checkpointed_layers(
    step: ContrastiveStep, longest: LongestFirst, share: int, chunk_size: int | None, layers: CheckpointedLayers
) -> int:
    """`fewest_checkpointed_layers` of this process, the most over the processes."""
    with failing_together(step.across_ranks):
        count = fewest_checkpointed_layers(step, longest, share, chunk_size, layers)
    return max(gather_integers(count, step.lvlm.device)) if step.across_ranks else count
