"""One contrastive batch over several processes: gathered vectors, and each rank its own rows of the B x B blocks.

Gradients are shares: summed over the ranks they are those of one process with the whole batch, for the encoder and for
the temperature alike. `sum_gradients` does that sum. DistributedDataParallel averages instead, so under it multiply the
loss by the number of ranks before the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sda_fast.ops.cmsa import (
    Backend,
    check_embeddings,
    check_ways,
    checked_form,
    cmsa_loss,
    make_tiles,
    normalized_rows,
    resolve_backend,
    temperature_tensor,
)
from sda_fast.ops.cmsa_blockwise import (
    add_target_statistics,
    blockwise_backward,
    item_statistics,
    row_statistics,
    row_target_sums,
    total_loss,
)

Group: TypeAlias = "dist.ProcessGroup | None"


def gather_integers(value: int, device: torch.device, group: Group = None) -> list[int]:
    """Every rank's value, in the order of ranks."""
    values = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    values[dist.get_rank(group)] = value
    dist.all_reduce(values, group=group)
    return values.tolist()


def gather_rows(rows: Tensor, sizes: list[int], group: Group = None) -> Tensor:
    """Concatenate every rank's [n, D] rows in the order of ranks, without gradient; n may differ between ranks."""
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in sizes]
    # as bytes: not every process group moves 16-bit floats
    dist.all_gather([piece.view(torch.uint8) for piece in pieces], padded.view(torch.uint8), group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def gather_embeddings(embeddings: Tensor, group: Group = None) -> Tensor:
    """All ranks' vectors, for losses of your own; the backward pass sums the ranks' gradients of each vector.

    Args:
        embeddings: [b, D]; b may differ between ranks, D and the dtype may not.
        group: the process group; the default one if None.

    Returns:
        [sum of b, D], the ranks' rows one after the other, the same on every rank; `embeddings` itself without an
        initialised process group.
    """
    if not dist.is_initialized():
        return embeddings
    return _Gather.apply(embeddings, gather_integers(len(embeddings), embeddings.device, group), group)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, temperature: Tensor, options: dict[str, Any], group: Group) -> Tensor:
        sizes = gather_integers(len(x), x.device, group)
        starts = (0, *itertools.accumulate(sizes[:-1]))
        start = starts[dist.get_rank(group)]
        own = (start, start + len(x))
        x_all, y_all = gather_rows(x, sizes, group), gather_rows(y, sizes, group)
        check_embeddings(x_all, y_all)

        def completed(partial: Tensor) -> Tensor:
            return gather_rows(partial[:, slice(*own)].T.contiguous(), sizes, group).T.contiguous()

        form = options["form"]
        tiles = make_tiles(x_all, y_all, temperature, form, *options["tiles"])
        tiles.starts = starts
        statistics = item_statistics(tiles, completed(row_statistics(tiles, own, symmetric=False)))
        if form.needs_target_sums:
            add_target_statistics(statistics, completed(row_target_sums(tiles, own, statistics, symmetric=False)))
        ctx.save_for_backward(x_all, y_all, temperature, statistics)
        ctx.options, ctx.own, ctx.starts = options, own, starts
        return total_loss(tiles, statistics)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, y, temperature, statistics = ctx.saved_tensors
        tiles = make_tiles(x, y, temperature, ctx.options["form"], *ctx.options["tiles"])
        tiles.starts = ctx.starts
        gradients = blockwise_backward(
            tiles,
            statistics,
            ctx.own,
            grad_outputs[0] / (2 * len(x)),
            symmetric=False,
            through_teacher=ctx.options["through_teacher"],
            needs_x=ctx.needs_input_grad[0],
            needs_y=ctx.needs_input_grad[1],
        )
        return gradients.x, gradients.y, gradients.temperature.to(temperature.dtype), None, None


def sharded_cmsa_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    *,
    detach_teacher: bool = False,
    normalize: bool = False,
    row_normalized_targets: bool = False,
    targets: Literal["soft", "hard"] = "soft",
    backend: Backend = "auto",
    block_size: int | None = None,
    workspace_bytes: int | None = None,
    group: Group = None,
) -> Tensor:
    """`cmsa_loss` of the items of all ranks together, each rank computing its own rows of every B x B block.

    Vectors and a few numbers per item are gathered; no gradient travels, since each rank's rows give the complete
    gradient of its own vectors. The order of the items is the order of ranks.

    Args:
        image_embeddings: [b, D], this rank's items; b may differ between ranks and be 0.
        text_embeddings: [b, D], same dtype and device.
        temperature: the same value on every rank; its gradient is this rank's share.
        detach_teacher, normalize, row_normalized_targets, targets, backend, block_size, workspace_bytes: as in
            `cmsa_loss`, the same on every rank.
        group: the process group; the default one if None.

    Returns:
        Scalar, the loss of the whole batch, the same on every rank; without an initialised process group that of
        `cmsa_loss`.

    Raises:
        TypeError, ValueError: as in `cmsa_loss`.
    """
    if not dist.is_initialized():
        return cmsa_loss(
            image_embeddings,
            text_embeddings,
            temperature,
            detach_teacher=detach_teacher,
            normalize=normalize,
            row_normalized_targets=row_normalized_targets,
            targets=targets,
            backend=backend,
            block_size=block_size,
            workspace_bytes=workspace_bytes,
        )
    check_embeddings(image_embeddings, text_embeddings, fewest_items=0)
    check_ways(backend, block_size, workspace_bytes)
    form = checked_form(targets, row_normalized_targets, detach_teacher)
    if normalize:
        image_embeddings, text_embeddings = normalized_rows(image_embeddings), normalized_rows(text_embeddings)
    options = {
        "form": form,
        "tiles": (resolve_backend(backend, image_embeddings), block_size or 0, workspace_bytes or 0),
        "through_teacher": not detach_teacher,
    }
    return _ShardedLoss.apply(
        image_embeddings, text_embeddings, temperature_tensor(temperature, image_embeddings), options, group
    )


def sum_gradients(parameters: Iterable[torch.nn.Parameter], group: Group = None) -> None:
    """Add up the ranks' `.grad` of each parameter in place; a missing one counts as zero. Same order on every rank."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
