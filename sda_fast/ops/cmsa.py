"""CMSA (arXiv 2512.06883) and InfoNCE: the public functions, their checks, and the operations behind them."""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sda_fast.ops.cmsa_blocks import SPLIT_DTYPES, Batch, Cut, block_of, cut_within
from sda_fast.ops.cmsa_blockwise import Tiles, blockwise_backward, blockwise_forward
from sda_fast.ops.cmsa_products import THROUGH_MEMORY, way_of_products
from sda_fast.ops.cmsa_tiles import Form, TorchTiles, block_size_within, compute_dtype, kept_shape

Backend = Literal["auto", "torch", "triton"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CPU_WORKSPACE_BYTES = 32 * 2**20
GPU_WORKSPACE_BYTES = 512 * 2**20
GPU_EXTRA_BYTES = 960 * 2**20
H200_MULTIPROCESSORS = 132


def cmsa_loss(
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
) -> Tensor:
    """Cross-modal structural alignment loss (arXiv 2512.06883), without any B x B array.

    With X, Y the image and text vectors, logits L = X Y^T / tau and teacher S = tau (X X^T + Y Y^T) / 2, the mean over
    items of half the cross entropy of L's rows against T = softmax_rows(S) plus half that of L^T's rows against T^T.
    T^T is what the published method uses; its rows do not sum to one, so swapping X and Y changes the loss.

    Args:
        image_embeddings: [B, D], B >= 2; float32, float16, bfloat16 (arithmetic and sums in float32) or float64. Rows
            may be strided (`pairs[0::2]`); nothing is copied. Used as they are unless `normalize`.
        text_embeddings: [B, D], same dtype and device.
        temperature: tau > 0; a float, or a tensor of one element, which may require a gradient.
        detach_teacher: send no gradient through the targets (neither to the vectors nor to tau).
        normalize: divide each row by its Euclidean norm first (a zero row stays zero and gets no gradient). Keeps
            copies of both sides. In float32 and bfloat16 for norms from 1e-18 to 1e18: other rows count as zero rows.
        row_normalized_targets: use softmax_rows(S^T) = T, whose rows do sum to one, in place of T^T. The loss is then
            symmetric in X and Y.
        targets: "soft" is CMSA; "hard" replaces T by the identity, which is symmetric InfoNCE.
        backend: "auto" takes Triton on CUDA and PyTorch elsewhere; "torch" and "triton" insist. All are right while
            float32 holds the products of the rows, up to norms of some 1e18.
        block_size: rows and columns per tile (rows alone where Triton kernels form the products); chosen from
            `workspace_bytes` if None. Changes rounding only.
        workspace_bytes: bound of the memory for tiles and products that are kept; by default 32 MiB on a CPU, on a GPU
            512 MiB, or for long vectors what a step's other memory leaves of 960 MiB if that is more. Tiles of 32 x 32
            are taken even where it is less.

    Returns:
        Scalar, mean over the B items, in nats; float64 for float64 inputs, else float32.

    Raises:
        TypeError: embeddings that are no tensors, a temperature that is neither a number nor a tensor, or a size that
            is no integer.
        ValueError: shapes, dtypes or devices differ or are not supported, B < 2, a temperature that is not one positive
            number (a tensor on a GPU is not looked at, to spare the wait), an unknown option, or options that
            contradict each other.
        RuntimeError: backend="triton" cannot run on these tensors.
    """
    check_embeddings(image_embeddings, text_embeddings)
    check_ways(backend, block_size, workspace_bytes)
    form = checked_form(targets, row_normalized_targets, detach_teacher)
    if normalize:
        image_embeddings, text_embeddings = normalized_rows(image_embeddings), normalized_rows(text_embeddings)
    loss, _, _ = cmsa_forward(
        image_embeddings,
        text_embeddings,
        temperature_tensor(temperature, image_embeddings),
        form.soft,
        form.row_normalized,
        detach_teacher,
        resolve_backend(backend, image_embeddings),
        block_size or 0,
        workspace_bytes or 0,
    )
    return loss


def infonce_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    *,
    normalize: bool = False,
    backend: Backend = "auto",
    block_size: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE without any B x B array: `cmsa_loss` with `targets="hard"`; see there for everything else.

    Returns:
        Scalar: the mean of the cross entropies of L's rows and of L's columns against the diagonal, in nats.
    """
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


def checked_form(targets: str, row_normalized_targets: bool, detach_teacher: bool) -> Form:
    """Which loss the options ask for, once they are known to make sense."""
    if targets not in ("soft", "hard"):
        raise ValueError(f"targets must be 'soft' or 'hard', got {targets!r}")
    of_teacher = {"row_normalized_targets": row_normalized_targets, "detach_teacher": detach_teacher}
    for name, value in of_teacher.items():
        if targets == "hard" and value:
            raise ValueError(f"{name} has no meaning with targets='hard'")
    return Form(targets == "soft", row_normalized_targets)


def check_ways(backend: str, block_size: int | None, workspace_bytes: int | None) -> None:
    """Raise unless these are options of how to compute a loss, whatever the vectors."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    for name, value in (("block_size", block_size), ("workspace_bytes", workspace_bytes)):
        if value is None:
            continue
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer or None, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def check_embeddings(x: Tensor, y: Tensor, fewest_items: int = 2) -> None:
    """Raise unless x and y are a batch of at least `fewest_items` pairs of vectors."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise TypeError(
            f"image_embeddings and text_embeddings must be tensors, got {type(x).__name__} and {type(y).__name__}"
        )
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(
            "image_embeddings and text_embeddings must have the same shape [B, D], "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape[0] < fewest_items or x.shape[1] < 1:
        raise ValueError(
            f"a contrastive loss needs at least {fewest_items} items of at least 1 dimension, got {tuple(x.shape)}"
        )
    if x.dtype != y.dtype or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            "image_embeddings and text_embeddings must share one dtype out of float32, float16, bfloat16, float64, "
            f"got {x.dtype} and {y.dtype}"
        )
    if x.device != y.device:
        raise ValueError(f"image_embeddings are on {x.device} but text_embeddings on {y.device}")


def temperature_tensor(temperature: Tensor | float, like: Tensor) -> Tensor:
    """The temperature as a scalar tensor on the vectors' device; a float must be positive and finite."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature must be one floating-point number, got shape {tuple(temperature.shape)} "
                f"of {temperature.dtype}"
            )
        return temperature.reshape(()).to(like.device)
    check_temperature(temperature)
    return torch.full((), temperature, dtype=compute_dtype(like.dtype), device=like.device)


def check_temperature(temperature: float) -> None:
    """Raise unless it is a positive finite number."""
    if not isinstance(temperature, numbers.Real):
        raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def normalized_rows(embeddings: Tensor) -> Tensor:
    """Rows over their norms in the compute dtype, rounded once to the input's; a zero row stays zero."""
    norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=compute_dtype(embeddings.dtype))
    is_zero = norms == 0
    inverse = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, norms).reciprocal())
    return (embeddings * inverse).to(embeddings.dtype)


def resolve_backend(backend: Backend, embeddings: Tensor) -> str:
    """ "torch", "triton", or "library" or "halves" for Triton kernels that read the matrix library's products.

    Raises RuntimeError if "triton" was asked for and cannot run.
    """
    if backend == "torch":
        return backend
    obstacle = _triton_obstacle(embeddings)
    if backend == "auto" and (obstacle or embeddings.device.type != "cuda"):
        return "torch"
    if obstacle:
        raise RuntimeError(f"backend='triton' was asked for, but {obstacle}")
    return triton_way(embeddings)


def triton_way(embeddings: Tensor) -> str:
    """ "triton", "library" or "halves", by where the products come from."""
    way = way_of_products(embeddings)
    return way if way in THROUGH_MEMORY else "triton"


def _triton_obstacle(embeddings: Tensor) -> str | None:
    """Why the Triton kernels cannot run on these vectors, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if embeddings.dtype == torch.float64:
        return "the kernels compute in float32 and the embeddings are float64"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if embeddings.device.type != "cuda" and not interpreted:
        return f"the embeddings are on {embeddings.device}: it needs a GPU (or TRITON_INTERPRET=1, for tests)"
    if interpreted and embeddings.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 arithmetic"
    return None


def make_tiles(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    form: Form,
    backend: str,
    block_size: int,
    workspace_bytes: int,
    kept: Tensor | None = None,
) -> Tiles:
    """The tiles of one batch for a resolved backend; zero for a size means: choose it. `kept`: see `TorchTiles`."""
    workspace_bytes = workspace_bytes or default_workspace(x, backend)
    if backend == "triton":
        from sda_fast.ops.cmsa_triton import TritonTiles

        return TritonTiles(x, y, temperature, form, block_size, workspace_bytes)
    if backend in THROUGH_MEMORY:
        from sda_fast.ops.cmsa_library import LibraryTiles

        batch = batch_of(x, form.soft, backend)
        cut = cut_of(batch, block_size, workspace_bytes, keeps=kept is not None)
        return LibraryTiles(x, y, temperature, form, batch, cut, kept)
    check_temperature(float(temperature))
    block_size = block_size or block_size_within(workspace_bytes, len(x), x.dtype, x.device.type)
    return TorchTiles(x, y, temperature, form, block_size, kept)


def default_workspace(embeddings: Tensor, backend: str) -> int:
    return CPU_WORKSPACE_BYTES if embeddings.device.type == "cpu" else gpu_workspace(embeddings, backend)


def gpu_workspace(embeddings: Tensor, backend: str) -> int:
    """On library products what the sums' third bytes leave of `GPU_EXTRA_BYTES`, at least `GPU_WORKSPACE_BYTES`."""
    if backend not in THROUGH_MEMORY:
        return GPU_WORKSPACE_BYTES
    third_bytes = 2 * embeddings.numel() if embeddings.dtype in SPLIT_DTYPES else 0
    return max(GPU_WORKSPACE_BYTES, GPU_EXTRA_BYTES - third_bytes)


def multiprocessors_of(embeddings: Tensor) -> int:
    """Of the vectors' GPU; where there is none, of an H200, for blocks to be the same there."""
    if not embeddings.is_cuda:
        return H200_MULTIPROCESSORS
    from sda_fast.kernels.configs import multiprocessors

    return multiprocessors(embeddings.device)


def batch_of(embeddings: Tensor, soft: bool, backend: str) -> Batch:
    # plain numbers, also where a compiler has symbols for sizes
    items, dimensions = map(int, embeddings.shape)
    return Batch(items, dimensions, embeddings.dtype, soft, multiprocessors_of(embeddings), backend == "halves")


def cut_of(batch: Batch, block_size: int, workspace_bytes: int, *, keeps: bool = True) -> Cut:
    """How the library's path cuts a batch; zero for `block_size` means: choose it."""
    return (
        block_of(batch, block_size, workspace_bytes) if block_size else cut_within(workspace_bytes, batch, keeps=keeps)
    )


def room_for_products(x: Tensor, soft: bool, backend: str, block_size: int, workspace_bytes: int) -> Tensor:
    """What the workspace leaves for tiles' products between sweeps; kernels that form them keep none."""
    if backend == "triton":
        return x.new_empty(0, 0, dtype=compute_dtype(x.dtype))
    workspace_bytes = workspace_bytes or default_workspace(x, backend)
    if backend in THROUGH_MEMORY:
        return x.new_empty(cut_of(batch_of(x, soft, backend), block_size, workspace_bytes).kept, dtype=torch.float32)
    items = x.shape[0]
    block_size = block_size or block_size_within(workspace_bytes, items, x.dtype, x.device.type)
    shape = kept_shape(workspace_bytes, items, x.dtype, block_size, soft)
    return x.new_zeros(shape, dtype=compute_dtype(x.dtype))


@torch.library.custom_op("sda_fast::cmsa_forward", mutates_args=())
def cmsa_forward(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor,
    soft: bool,
    row_normalized: bool,
    detach_teacher: bool,
    backend: str,
    block_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what its backward needs: the statistics [11, B] and the products that were kept.

    `detach_teacher` matters to the backward alone.
    """
    x, y, form = image_embeddings, text_embeddings, Form(soft, row_normalized)
    kept = room_for_products(x, soft, backend, block_size, workspace_bytes)
    with torch.autocast(x.device.type, enabled=False):
        tiles = make_tiles(x, y, temperature, form, backend, block_size, workspace_bytes, kept)
        return *blockwise_forward(tiles), kept


@cmsa_forward.register_fake
def _(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor,
    soft: bool,
    row_normalized: bool,
    detach_teacher: bool,
    backend: str,
    block_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_embeddings(image_embeddings, text_embeddings)
    dtype = compute_dtype(image_embeddings.dtype)
    return (
        image_embeddings.new_empty((), dtype=dtype),
        image_embeddings.new_empty((11, image_embeddings.shape[0]), dtype=dtype),
        room_for_products(image_embeddings, soft, backend, block_size, workspace_bytes),
    )


@torch.library.custom_op("sda_fast::cmsa_backward", mutates_args=())
def cmsa_backward(
    grad_loss: Tensor,
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor,
    statistics: Tensor,
    kept: Tensor,
    soft: bool,
    row_normalized: bool,
    detach_teacher: bool,
    needs_image: bool,
    needs_text: bool,
    backend: str,
    block_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the image vectors, the text vectors ([0, D] where not needed) and the temperature."""
    x, y, form = image_embeddings, text_embeddings, Form(soft, row_normalized)
    with torch.autocast(x.device.type, enabled=False):
        tiles = make_tiles(x, y, temperature, form, backend, block_size, workspace_bytes, kept)
        whole = backend in THROUGH_MEMORY or _sums_fit(x, backend, workspace_bytes)
        gradients = blockwise_backward(
            tiles,
            statistics,
            (0, len(x)),
            grad_loss.to(compute_dtype(x.dtype)) / (2 * len(x)),
            symmetric=whole and not tiles.completes_rows,
            through_teacher=not detach_teacher,
            needs_x=needs_image,
            needs_y=needs_text,
        )
    nothing = x.new_empty(0, x.shape[1])
    return (
        nothing if gradients.x is None else gradients.x,
        nothing.clone() if gradients.y is None else gradients.y,
        gradients.temperature.to(temperature.dtype),
    )


@cmsa_backward.register_fake
def _(
    grad_loss: Tensor,
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor,
    statistics: Tensor,
    kept: Tensor,
    soft: bool,
    row_normalized: bool,
    detach_teacher: bool,
    needs_image: bool,
    needs_text: bool,
    backend: str,
    block_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    items, dimensions = image_embeddings.shape
    return (
        image_embeddings.new_empty(items if needs_image else 0, dimensions),
        text_embeddings.new_empty(items if needs_text else 0, dimensions),
        torch.empty_like(temperature),
    )


def _sums_fit(embeddings: Tensor, backend: str, workspace_bytes: int) -> bool:
    """Whether float32 sums for the whole batch cost nothing beside the results, or fit the workspace."""
    if embeddings.dtype == compute_dtype(embeddings.dtype):
        return True
    return 2 * 4 * embeddings.numel() <= (workspace_bytes or default_workspace(embeddings, backend))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, temperature, *options = inputs
    _, statistics, kept = output
    ctx.mark_non_differentiable(statistics, kept)
    # or backward would fill memory of the size of what is kept with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, temperature, statistics, kept)
    ctx.options = options


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    x, y, temperature, statistics, kept = ctx.saved_tensors
    soft, row_normalized, detach_teacher, backend, block_size, workspace_bytes = ctx.options
    needs_x, needs_y, needs_temperature = ctx.needs_input_grad[:3]
    dx, dy, dtemperature = cmsa_backward(
        grad_loss,
        x,
        y,
        temperature,
        statistics,
        kept,
        soft,
        row_normalized,
        detach_teacher,
        needs_x,
        needs_y,
        backend,
        block_size,
        workspace_bytes,
    )
    return (
        dx if needs_x else None,
        dy if needs_y else None,
        dtemperature if needs_temperature else None,
        *[None] * 6,
    )


cmsa_forward.register_autograd(_backward, setup_context=_setup_context)
