"""A contrastive step over a large batch in the memory of one chunk (gradient caching, arXiv 2101.06983)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Encode = Callable[[Any, str], Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class RandomState(NamedTuple):
    """The states of torch's generators: the CPU's, and every CUDA device's once CUDA is in use."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class OutOfMemoryOnAnotherRank(MemoryError):
    """This rank's part of the step went well, another's did not: all have to start the step again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (where PyTorch raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "can't allocate memory"))


def on_any_rank(happened: bool) -> bool:
    """Whether it happened on any rank of the default process group; every rank must ask."""
    if not dist.is_initialized():
        return happened
    flag = torch.tensor(happened, dtype=torch.int32, device="cuda" if torch.cuda.is_initialized() else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


@contextlib.contextmanager
def failing_together(across_ranks: bool) -> Iterator[None]:
    """Where one rank's memory runs out in the block, every rank leaves it with an error that `is_out_of_memory`.

    Nothing in the block may wait for another rank. Any other error is raised at once.
    """
    if not (across_ranks and dist.is_initialized()):
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    failed = on_any_rank(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise OutOfMemoryOnAnotherRank("another rank ran out of memory in this step")


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Autocast off: a backward pass must run in the dtypes that its forward pass recorded."""
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def cached_contrastive_step(
    encode: Encode,
    image_chunks: Sequence[Any],
    text_chunks: Sequence[Any],
    loss_fn: LossFunction,
    *,
    backward: Callable[[Tensor], None] | None = None,
    across_ranks: bool = False,
) -> Tensor:
    """Forward and backward of `loss_fn(images, texts)` over all chunks, holding the graph of one chunk at a time.

    Every chunk is encoded without a graph; the loss gives the gradient of every vector; then each chunk is encoded
    again with a graph, from the same random state, and its slice of the gradients is sent back. Gradients are added to
    the `.grad` of whatever `encode` and `loss_fn` depend on: the same numbers, to rounding, as

        loss_fn(torch.cat([encode(c, "image") for c in image_chunks]),
                torch.cat([encode(c, "text") for c in text_chunks])).backward()

    with dropout, checkpointing and autocast (around this call) included, as long as `encode` treats the items of a
    chunk independently of each other (no batch normalisation in training mode) and draws its random numbers from
    torch's default generators. Memory: one chunk's graph, plus the vectors and their gradients.

    Under DistributedDataParallel call this inside `model.no_sync()` and reduce the gradients afterwards
    (`sda_fast.losses.distributed.sum_gradients`): each chunk is one backward pass.

    Args:
        encode: (chunk, "image" or "text") -> [b, D] vectors of the chunk's b items.
        image_chunks: the batch's image side, in pieces of any size; each is handed to `encode` as it is, twice.
        text_chunks: the text side; the pieces may be cut elsewhere, the items must come in the same order.
        loss_fn: ([B, D], [B, D]) -> scalar.
        backward: called with the loss instead of `loss.backward()`, to scale it (`accelerator.backward`,
            `lambda loss: scaler.scale(loss).backward()`); the scale carries over to every gradient.
        across_ranks: `loss_fn` waits for the other ranks of the default process group, which all make this call. Then
            all of them raise when one runs out of memory, so that all can start again; chunks may differ between ranks.

    Returns:
        The loss, detached.

    Raises:
        ValueError: no chunks, or the two sides have different numbers of items.
        OutOfMemoryOnAnotherRank: with `across_ranks`, another rank ran out of memory while encoding.
        RuntimeError: memory ran out in `loss_fn`, which smaller chunks do not change.
    """
    sides = (("image", list(image_chunks)), ("text", list(text_chunks)))
    for modality, chunks in sides:
        if not chunks:
            raise ValueError(f"cached_contrastive_step got no {modality} chunks")

    states: dict[str, list[RandomState]] = {}
    sizes: dict[str, list[int]] = {}
    vectors: list[Tensor] = []
    with failing_together(across_ranks), torch.no_grad():
        for modality, chunks in sides:
            states[modality], pieces = [], []
            for chunk in chunks:
                states[modality].append(RandomState.now())
                pieces.append(encode(chunk, modality).detach())
            sizes[modality] = [len(piece) for piece in pieces]
            vectors.append(torch.cat(pieces))
    images, texts = (side.requires_grad_() for side in vectors)
    if len(images) != len(texts):
        raise ValueError(f"the image chunks hold {len(images)} items but the text chunks {len(texts)}")

    try:
        with torch.enable_grad():
            loss = loss_fn(images, texts)
        with _without_autocast():
            if backward is None:
                loss.backward()
            else:
                backward(loss)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise RuntimeError("memory ran out in the loss, not in a chunk: no smaller chunk would help") from error
        raise
    state_after = RandomState.now()

    with failing_together(across_ranks):
        for (modality, chunks), side in zip(sides, (images, texts), strict=True):
            if side.grad is None:
                continue
            for chunk, state, gradient in zip(chunks, states[modality], side.grad.split(sizes[modality]), strict=True):
                state.restore()
                with torch.enable_grad():
                    chunk_vectors = encode(chunk, modality)
                if chunk_vectors.requires_grad:
                    with _without_autocast():
                        chunk_vectors.backward(gradient)
    state_after.restore()
    return loss.detach()
