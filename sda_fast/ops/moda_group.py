"""torch.library operations for MoDA layers that share x: `sda_fast::moda_group` and its backward.

One call serves q, k and v (or gate and up), or a single layer as a group of one. Lists have one entry per layer;
`statistics` and `biases` hold only what exists, and `layouts` says what that is, LAYOUT_FIELDS integers per layer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops import moda_torch
from sda_fast.ops.moda_torch import Gradients, Member
from sda_fast.ops.quantized import WeightLayout

BACKENDS = ("auto", "triton", "torch")
LAYOUT_FIELDS = 6
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

library = torch.library.Library("sda_fast", "FRAGMENT")
library.define(
    "moda_group(Tensor x, Tensor[] weights, Tensor[] statistics, int[] layouts, Tensor[] biases, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor[] gates, Tensor? modality_ids, float[] scalings, float dropout, Tensor? seed, "
    "str backend) -> (Tensor[] y, Tensor h, Tensor bits)"
)
library.define(
    "moda_group_backward(Tensor[] dy, Tensor? x, Tensor? h, Tensor? bits, Tensor[] weights, Tensor[] statistics, "
    "int[] layouts, Tensor[] lora_A, Tensor[] lora_B, Tensor[] gates, Tensor? modality_ids, float[] scalings, "
    "float dropout, Tensor? seed, bool[] needs, str backend) -> Tensor[]"
)


def resolve_backend(backend: str, x: Tensor) -> str:
    """'triton' or 'torch' for activations x.

    Raises:
        ValueError: the name is unknown, or 'triton' cannot run on x's dtype.
        RuntimeError: 'triton' was asked for and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if x.is_cuda and TRITON_INSTALLED and x.dtype in TRITON_DTYPES else "torch"
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"backend='triton' takes float32, float16 or bfloat16 activations, got {x.dtype}")
    if not TRITON_INSTALLED:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend='triton' cannot run on x on {x.device}: it needs a CUDA device, or TRITON_INTERPRET=1 set before "
            "sda_fast is first used"
        )
    return "triton"


def layout_numbers(layout: WeightLayout, has_bias: bool) -> list[int]:
    """A layer's LAYOUT_FIELDS integers."""
    return [*dataclasses.astuple(layout), int(has_bias)]


def split_layouts(layouts: list[int]) -> list[tuple[WeightLayout, bool]]:
    """The inverse of `layout_numbers`, for all layers of a group."""
    lines = [layouts[first : first + LAYOUT_FIELDS] for first in range(0, len(layouts), LAYOUT_FIELDS)]
    return [(WeightLayout(*line[:-1]), bool(line[-1])) for line in lines]


def members_of(
    weights: list[Tensor],
    statistics: list[Tensor],
    layouts: list[int],
    biases: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gates: list[Tensor],
    scalings: list[float],
) -> list[Member]:
    """The layers of a group, put together from the operation's flat lists."""
    left_statistics, left_biases = iter(statistics), iter(biases)
    members = []
    first_rank = 0
    for index, (layout, has_bias) in enumerate(split_layouts(layouts)):
        rank = lora_A[index].shape[0]
        members.append(
            Member(
                layout=layout,
                weight=weights[index],
                statistics=[next(left_statistics) for _ in range(layout.num_statistics)],
                bias=next(left_biases) if has_bias else None,
                lora_A=lora_A[index],
                lora_B=lora_B[index],
                gates=gates[index],
                scaling=scalings[index],
                ranks=slice(first_rank, first_rank + rank),
            )
        )
        first_rank += rank
    return members


def keeps_bits(x: Tensor, dropout: float, backend: str) -> bool:
    """Whether forward hands the packed mask to backward: on a CPU one bit costs less than drawing it again."""
    return dropout > 0 and backend == "torch" and x.device.type == "cpu"


def moda_group_kernel(
    x: Tensor,
    weights: list[Tensor],
    statistics: list[Tensor],
    layouts: list[int],
    biases: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gates: list[Tensor],
    modality_ids: Tensor | None,
    scalings: list[float],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`moda_group` on CPU and CUDA."""
    members = members_of(weights, statistics, layouts, biases, lora_A, lora_B, gates, scalings)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "triton":
            from sda_fast.ops import moda_triton

            return moda_triton.forward(x, members, modality_ids, dropout, seed)
        outputs, h, bits = moda_torch.forward(x, members, modality_ids, dropout, seed)
        return outputs, h, bits if keeps_bits(x, dropout, backend) else bits.new_empty(0)


def moda_group_backward_kernel(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    weights: list[Tensor],
    statistics: list[Tensor],
    layouts: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gates: list[Tensor],
    modality_ids: Tensor | None,
    scalings: list[float],
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """`moda_group_backward` on CPU and CUDA: the wanted ones of dx, dA of the stacked A, all dB, all dgates."""
    without_bias = [number for line in split_layouts(layouts) for number in layout_numbers(line[0], False)]
    members = members_of(weights, statistics, without_bias, [], lora_A, lora_B, gates, scalings)
    needs_x, needs_A, needs_B, needs_gates = needs
    wanted = {"needs_x": needs_x, "needs_A": needs_A, "needs_B": needs_B, "needs_gates": needs_gates}
    with torch.autocast(dy[0].device.type, enabled=False):
        if backend == "triton":
            from sda_fast.ops import moda_triton

            gradients = moda_triton.backward(dy, x, h, seed, members, modality_ids, dropout, **wanted)
        else:
            if dropout > 0 and (needs_x or needs_A) and bits is None:
                assert seed is not None
                bits = moda_torch.keep_bits(dy[0].shape[0], lora_A[0].shape[1], dropout, seed)
            gradients = moda_torch.backward(dy, x, h, bits, members, modality_ids, dropout, **wanted)
    return flat_gradients(gradients, members)


def flat_gradients(gradients: Gradients, members: list[Member]) -> list[Tensor]:
    """The gradients that exist, those of B and the gates in the dtype of what they belong to."""
    flat = [gradient for gradient in (gradients.dx, gradients.dA) if gradient is not None]
    for gradient, member in zip(gradients.dB, members, strict=True):
        if gradient is not None:
            flat.append(gradient.to(member.lora_B.dtype).contiguous())
    for gradient, member in zip(gradients.dgates, members, strict=True):
        if gradient is not None:
            flat.append(gradient.to(member.gates.dtype).contiguous())
    return flat


for device_key in ("CPU", "CUDA"):
    library.impl("moda_group", moda_group_kernel, device_key)
    library.impl("moda_group_backward", moda_group_backward_kernel, device_key)


@torch.library.register_fake("sda_fast::moda_group", lib=library)
def moda_group_fake(
    x: Tensor,
    weights: list[Tensor],
    statistics: list[Tensor],
    layouts: list[int],
    biases: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gates: list[Tensor],
    modality_ids: Tensor | None,
    scalings: list[float],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    M, K = x.shape
    widths = [layout.in_features for layout, _ in split_layouts(layouts)]
    torch._check(all(width == K for width in widths), lambda: f"x has {K} features, the layers take {widths}")
    y = [x.new_empty(M, layout.out_features) for layout, _ in split_layouts(layouts)]
    h = x.new_empty(M, sum(matrix.shape[0] for matrix in lora_A), dtype=moda_torch.wide(x.dtype))
    shape = (M, (K + 7) // 8) if keeps_bits(x, dropout, backend) else (0,)
    return y, h, x.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("sda_fast::moda_group_backward", lib=library)
def moda_group_backward_fake(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    weights: list[Tensor],
    statistics: list[Tensor],
    layouts: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gates: list[Tensor],
    modality_ids: Tensor | None,
    scalings: list[float],
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    needs_x, needs_A, needs_B, needs_gates = needs
    K = lora_A[0].shape[1]
    flat: list[Tensor] = []
    if needs_x:
        flat.append(dy[0].new_empty(dy[0].shape[0], K))
    if needs_A:
        total_rank = sum(matrix.shape[0] for matrix in lora_A)
        flat.append(dy[0].new_empty(total_rank, K, dtype=moda_torch.wide(dy[0].dtype)))
    flat += [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in lora_B if needs_B]
    flat += [torch.empty_like(gate, memory_format=torch.contiguous_format) for gate in gates if needs_gates]
    return flat


def any_requires_grad(tensors: list[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor]) -> None:
    """Save what the wanted gradients need: x for dA, W for dx, h for dB and dgates, a seed or bits for dropout."""
    x, weights, statistics, layouts, biases, lora_A, lora_B, gates, modality_ids, scalings, dropout, seed, backend = (
        inputs
    )
    _, h, bits = output
    ctx.mark_non_differentiable(h, bits)
    ctx.set_materialize_grads(False)
    ctx.needs = [x.requires_grad, *map(any_requires_grad, (lora_A, lora_B, gates))]
    needs_x, needs_A, needs_B, needs_gates = ctx.needs
    needs_mask = dropout > 0 and (needs_x or needs_A)
    kept_bits = bits if needs_mask and keeps_bits(x, dropout, backend) else None
    ctx.save_for_backward(
        x if needs_A else None,
        h if needs_B or needs_gates else None,
        kept_bits,
        modality_ids,
        seed if needs_mask and kept_bits is None else None,
        *weights,
        *statistics,
        *lora_A,
        *lora_B,
        *gates,
    )
    ctx.lengths = [len(weights), len(statistics), len(lora_A), len(lora_B), len(gates)]
    ctx.num_biases = len(biases)
    ctx.constants = (layouts, scalings, dropout, backend)
    ctx.rows = x.shape[0]


def moda_group_gradients(ctx: Any, dy: list[Tensor | None], dh: None, dbits: None) -> tuple[Any, ...]:
    """The autograd formula of `moda_group`."""
    x, h, bits, modality_ids, seed, *lists = ctx.saved_tensors
    weights, statistics, lora_A, lora_B, gates = split_lists(lists, ctx.lengths)
    layouts, scalings, dropout, backend = ctx.constants
    needs_x, needs_A, needs_B, needs_gates = ctx.needs
    count = len(weights)
    given = next((gradient for gradient in dy if gradient is not None), None)
    nothing: list[None] = [None] * count
    dx, dA, dB, dgates = None, nothing, nothing, nothing
    if given is not None and any(ctx.needs):
        complete = [
            given.new_zeros(ctx.rows, layout.out_features) if gradient is None else gradient
            for gradient, (layout, _) in zip(dy, split_layouts(layouts), strict=True)
        ]
        flat = torch.ops.sda_fast.moda_group_backward(
            complete, x, h, bits, weights, statistics, layouts, lora_A, lora_B, gates, modality_ids, scalings, dropout,
            seed, ctx.needs, backend,
        )  # fmt: skip
        left = iter(flat)
        dx = next(left) if needs_x else None
        if needs_A:
            parts = next(left).split([matrix.shape[0] for matrix in lora_A])
            dA = [part.to(matrix.dtype) for part, matrix in zip(parts, lora_A, strict=True)]
        dB = [next(left) for _ in range(count)] if needs_B else nothing
        dgates = [next(left) for _ in range(count)] if needs_gates else nothing
    no_statistics, no_biases = [None] * len(statistics), [None] * ctx.num_biases
    return dx, nothing, no_statistics, None, no_biases, dA, dB, dgates, None, None, None, None, None


def split_lists(tensors: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    """Cut one list into several of the given lengths."""
    left = iter(tensors)
    return [[next(left) for _ in range(length)] for length in lengths]


torch.library.register_autograd(
    "sda_fast::moda_group", moda_group_gradients, setup_context=keep_for_backward, lib=library
)
