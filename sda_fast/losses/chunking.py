"""The cached step with its chunk size chosen from free memory, and halved when memory runs out all the same."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sda_fast.losses.cached import (
    Encode,
    LossFunction,
    OutOfMemoryOnAnotherRank,
    RandomState,
    cached_contrastive_step,
    failing_together,
    is_out_of_memory,
    on_any_rank,
)

logger = logging.getLogger(__name__)

FREE_MEMORY_SHARE = 0.6


def split_batch(batch: Any, chunk_size: int) -> list[Any]:
    """Cut a batch into chunks of at most `chunk_size` items.

    Args:
        batch: a tensor (cut along its first dimension), a mapping whose values are all cut alike, or a sequence.
        chunk_size: items per chunk.

    Returns:
        The chunks; a batch without items is one chunk without items.

    Raises:
        TypeError, ValueError: as in `batch_length`.
    """
    length = batch_length(batch)
    if isinstance(batch, Tensor):
        return list(batch.split(chunk_size))
    if isinstance(batch, Mapping):
        columns = {name: split_batch(values, chunk_size) for name, values in batch.items()}
        return [dict(zip(columns, pieces, strict=True)) for pieces in zip(*columns.values(), strict=True)]
    return [batch[start : start + chunk_size] for start in range(0, max(1, length), chunk_size)]


def batch_length(batch: Any) -> int:
    """How many items a batch that `split_batch` can cut holds.

    Raises:
        TypeError: the batch, or a value of a mapping, is no tensor with rows, mapping or sequence.
        ValueError: a mapping is empty, or its values have different lengths.
    """
    if isinstance(batch, Mapping):
        if not batch:
            raise ValueError("a batch must hold at least one column, got an empty mapping")
        lengths = {}
        for name, values in batch.items():
            try:
                lengths[name] = batch_length(values)
            except (TypeError, ValueError) as error:
                raise type(error)(f"column {name!r}: {error}") from error
        if len(set(lengths.values())) > 1:
            named = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ValueError(f"the columns of a batch must have the same length, got {named}")
        return next(iter(lengths.values()))
    if isinstance(batch, Sequence) or (isinstance(batch, Tensor) and batch.dim() > 0):
        return len(batch)
    came = "a tensor without dimensions" if isinstance(batch, Tensor) else type(batch).__name__
    raise TypeError(f"a batch must be a tensor with a row per item, a mapping or a sequence, got {came}")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; on a GPU the blocks that the allocator holds idle count."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


class CachedContrastiveStep:
    """`cached_contrastive_step` over whole batches: cuts them into chunks and survives a chunk that is too large.

    Args:
        encode: (chunk, "image" or "text") -> [b, D], as in `cached_contrastive_step`.
        loss_fn: ([B, D], [B, D]) -> scalar.
        parameters: all whose gradients the step adds to (the encoder's and the loss's); needed to undo half a step.
        chunk_size: items per chunk, or "auto": measured at the first batch of two items or more from the memory that
            an item's forward and backward pass takes and `FREE_MEMORY_SHARE` of the memory that is free.
        backward, across_ranks: as in `cached_contrastive_step`.

    When memory runs out in `encode` the gradients and the random state are put back, the chunk size is halved for good,
    a warning is logged and the step starts anew; with chunks of one item the error is raised. The attribute
    `chunk_size` holds the size in use. With `across_ranks` each rank has its own size: all start anew and only the one
    that ran out takes smaller chunks; where that one cannot, all raise.

    Raises:
        ValueError: chunk_size is neither "auto" nor a positive integer.
    """

    def __init__(
        self,
        encode: Encode,
        loss_fn: LossFunction,
        parameters: Iterable[torch.nn.Parameter],
        *,
        chunk_size: int | Literal["auto"] = "auto",
        backward: Callable[[Tensor], None] | None = None,
        across_ranks: bool = False,
    ) -> None:
        if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise ValueError(f"chunk_size must be 'auto' or a positive integer, got {chunk_size!r}")
        self.encode, self.loss_fn, self.backward, self.across_ranks = encode, loss_fn, backward, across_ranks
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.chunk_size: int | Literal["auto"] = chunk_size

    def __call__(self, images: Any, texts: Any) -> Tensor:
        """One step over a batch; gradients are added to the parameters'.

        Args:
            images: the image side of B items: a tensor, a mapping of tensors or lists, or a sequence.
            texts: the text side, of the same items in the same order.

        Returns:
            The loss, detached.

        Raises:
            torch.OutOfMemoryError, MemoryError or RuntimeError: memory runs out even with chunks of one item, or in
                `loss_fn`.
            OutOfMemoryOnAnotherRank: with `across_ranks`, another rank's memory does.
            TypeError, ValueError: a side of the batch cannot be cut, as in `batch_length`.
        """
        length = max(1, batch_length(images))
        with failing_together(self.across_ranks):
            size = min(self._size(images, texts), length)
        while True:
            chunks = split_batch(images, size), split_batch(texts, size)
            before = RandomState.now()
            # gradients from before the step are set aside: adding to them in place could not be undone
            earlier = self._take_gradients()
            try:
                loss = cached_contrastive_step(
                    self.encode, *chunks, self.loss_fn, backward=self.backward, across_ranks=self.across_ranks
                )
            except BaseException as error:
                self._put_gradients(earlier, add=False)
                if not is_out_of_memory(error):
                    raise
                here = not isinstance(error, OutOfMemoryOnAnotherRank)
                stuck = here and size == 1
                if on_any_rank(stuck) if self.across_ranks else stuck:
                    raise
                failure = _first_line(error) if here else None
            else:
                self._put_gradients(earlier, add=True)
                return loss
            before.restore()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            if failure is None:
                logger.warning("starting the step again: another rank ran out of memory")
                continue
            logger.warning("out of memory with chunks of %d items, going on with %d: %s", size, size // 2, failure)
            size = self.chunk_size = size // 2

    def _take_gradients(self) -> list[Tensor | None]:
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def _put_gradients(self, earlier: list[Tensor | None], add: bool) -> None:
        for parameter, gradient in zip(self.parameters, earlier, strict=True):
            if add and gradient is not None and parameter.grad is not None:
                gradient += parameter.grad
            if gradient is not None or not add:
                parameter.grad = gradient

    def _size(self, images: Any, texts: Any) -> int:
        if self.chunk_size != "auto":
            return self.chunk_size
        if batch_length(images) < 2:
            return 1
        before, earlier = RandomState.now(), self._take_gradients()
        try:
            self.chunk_size = choose_chunk_size(self.encode, images, texts)
        finally:
            self._put_gradients(earlier, add=False)
            before.restore()
        logger.info("chunks of %d items", self.chunk_size)
        return self.chunk_size


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def choose_chunk_size(encode: Encode, images: Any, texts: Any, *, free_bytes: int | None = None) -> int:
    """How many items fit `FREE_MEMORY_SHARE` of the free memory, by encoding one item and two with their backward pass.

    On a GPU the peak of allocated memory is measured; elsewhere the bytes kept for backward are counted, which is an
    upper bound where activations are recomputed. Gradients are added to the parameters on the way.

    Args:
        encode: as in `cached_contrastive_step`.
        images, texts: a batch as in `CachedContrastiveStep`.
        free_bytes: taken as the free memory; asked of the device if None.

    Returns:
        Items per chunk, from 1 to the batch's length; 1 if memory runs out with two.

    Raises:
        torch.OutOfMemoryError, MemoryError or RuntimeError: memory runs out with one item.
    """
    needed = 1
    device = torch.device("cpu")
    for batch, modality in ((images, "image"), (texts, "text")):
        if batch_length(batch) < 2:
            return 1
        first, both = split_batch(batch, 1)[0], split_batch(batch, 2)[0]
        # once more than is measured: the first pass also allocates the parameters' gradients
        bytes_of_pass(partial(encode, first, modality))
        one, device = bytes_of_pass(partial(encode, first, modality))
        try:
            two, _ = bytes_of_pass(partial(encode, both, modality))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return 1
        needed = max(needed, two - one)
    free = free_memory(device) if free_bytes is None else free_bytes
    return max(1, min(batch_length(images), int(FREE_MEMORY_SHARE * free / needed)))


def bytes_of_pass(encode: Callable[[], Tensor]) -> tuple[int, torch.device]:
    """Bytes that a forward and backward pass needs beyond what was there, and the vectors' device.

    On a GPU the peak, elsewhere what is kept for backward. Gradients are added to the parameters on the way.
    """
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        vectors = encode()
        if vectors.requires_grad:
            vectors.float().sum().backward()
    if on_gpu and vectors.device.type == "cuda":
        return torch.cuda.max_memory_allocated() - start, vectors.device
    return sum(kept.values()), vectors.device
