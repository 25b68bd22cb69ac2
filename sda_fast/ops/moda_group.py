"""torch.library operations for MoDA layers that share x: `sda_fast::moda_group` and its backward.

One call serves q, k and v (or gate and up), or a single layer as a group of one. `frozen` holds, layer by layer, the
weight's data, its statistics and the bias, as far as they exist; `layouts` says what does, LAYOUT_FIELDS integers per
layer; `adapters` holds lora_A, lora_B and gates of every layer.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
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
    "moda_group(Tensor x, Tensor[] frozen, Tensor[] adapters, int[] layouts, float[] scalings, Tensor? modality_ids, "
    "float dropout, Tensor? seed, str backend) -> (Tensor[] y, Tensor h, Tensor bits)"
)
library.define(
    "moda_group_hidden(Tensor x, Tensor[] adapters, float dropout, Tensor? seed, str backend)"
    " -> (Tensor h, Tensor bits)"
)
library.define(
    "moda_group_outputs(Tensor x, Tensor h, Tensor[] frozen, Tensor[] adapters, int[] layouts, float[] scalings, "
    "Tensor? modality_ids, str backend) -> Tensor[] y"
)
library.define(
    "moda_group_backward(Tensor[] dy, Tensor? x, Tensor? h, Tensor? bits, Tensor[] frozen, Tensor[] adapters, "
    "int[] layouts, float[] scalings, Tensor? modality_ids, float dropout, Tensor? seed, bool[] needs, str backend) "
    "-> Tensor[]"
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


def layout_numbers(layout: WeightLayout, has_bias: bool) -> tuple[int, ...]:
    """A layer's LAYOUT_FIELDS integers."""
    sizes = layout.out_features, layout.in_features
    return *sizes, layout.quant_type, layout.blocksize, layout.nested_blocksize, int(has_bias)


def split_layouts(layouts: list[int]) -> tuple[tuple[WeightLayout, bool], ...]:
    """The inverse of `layout_numbers`, for all layers of a group."""
    return split_numbers(tuple(layouts))


@functools.lru_cache(maxsize=1024)
def split_numbers(layouts: tuple[int, ...]) -> tuple[tuple[WeightLayout, bool], ...]:
    lines = [layouts[first : first + LAYOUT_FIELDS] for first in range(0, len(layouts), LAYOUT_FIELDS)]
    return tuple((WeightLayout(*line[:-1]), bool(line[-1])) for line in lines)


def members_of(
    frozen: Sequence[Tensor], adapters: Sequence[Tensor], layouts: list[int], scalings: list[float]
) -> list[Member]:
    """The layers of a group, put together from the operation's flat lists."""
    left = iter(frozen)
    members: list[Member] = []
    first_rank = 0
    for index, (layout, has_bias) in enumerate(split_layouts(layouts)):
        lora_A, lora_B, gates = adapters[3 * index : 3 * index + 3]
        ranks = slice(first_rank, first_rank + lora_A.shape[0])
        weight, statistics = next(left), list(islice(left, layout.num_statistics))
        bias = next(left) if has_bias else None
        members.append(Member(layout, weight, statistics, bias, lora_A, lora_B, gates, scalings[index], ranks))
        first_rank = ranks.stop
    return members


def keeps_bits(x: Tensor, dropout: float, backend: str) -> bool:
    """Whether forward hands the packed mask to backward: on a CPU one bit costs less than drawing it again."""
    return dropout > 0 and backend == "torch" and x.device.type == "cpu"


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside run in the dtypes they are given."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def runs_here_and_now() -> bool:
    """Whether an operation may be computed by a call of its kernel: no gradient, compiler or dispatch mode is there.

    The dispatcher takes lists of tensors apart and together, which costs more than a small layer's other host work.
    """
    return (
        not torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    )


def moda_group_kernel(
    x: Tensor,
    frozen: Sequence[Tensor],
    adapters: Sequence[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`moda_group` on CPU and CUDA."""
    h, bits = moda_group_hidden_kernel(x, adapters, dropout, seed, backend)
    return moda_group_outputs_kernel(x, h, frozen, adapters, layouts, scalings, modality_ids, backend), h, bits


def moda_group_hidden_kernel(
    x: Tensor, adapters: Sequence[Tensor], dropout: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`moda_group_hidden` on CPU and CUDA: all that `moda_group` keeps for backward."""
    with without_autocast(x.device):
        if backend == "triton":
            from sda_fast.ops import moda_triton

            return moda_triton.hidden(x, adapters[::3], dropout, seed), x.new_empty(0, dtype=torch.uint8)
        h, bits = moda_torch.hidden(x, adapters[::3], dropout, seed)
        return h, bits if keeps_bits(x, dropout, backend) else bits.new_empty(0)


def moda_group_outputs_kernel(
    x: Tensor,
    h: Tensor,
    frozen: Sequence[Tensor],
    adapters: Sequence[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """`moda_group_outputs` on CPU and CUDA: y of every layer."""
    members = members_of(frozen, adapters, layouts, scalings)
    with without_autocast(x.device):
        if backend == "triton":
            from sda_fast.ops import moda_triton

            return moda_triton.outputs_of(members, x, h, modality_ids)
        return [
            moda_torch.output_of(member, x, moda_torch.columns_of(h, member.ranks), modality_ids) for member in members
        ]


def moda_group_backward_kernel(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    frozen: Sequence[Tensor],
    adapters: Sequence[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """`moda_group_backward` on CPU and CUDA: the wanted ones of dx, dA of the stacked A, all dB, all dgates."""
    members = members_of(frozen, adapters, layouts, scalings)
    needs_x, needs_A, needs_B, needs_gates = needs
    wanted = {"needs_x": needs_x, "needs_A": needs_A, "needs_B": needs_B, "needs_gates": needs_gates}
    with without_autocast(dy[0].device):
        if backend == "triton":
            from sda_fast.ops import moda_triton

            gradients = moda_triton.backward(dy, x, h, seed, members, modality_ids, dropout, **wanted)
        else:
            if dropout > 0 and (needs_x or needs_A) and bits is None:
                assert seed is not None
                bits = moda_torch.keep_bits(dy[0].shape[0], adapters[0].shape[1], dropout, seed)
            gradients = moda_torch.backward(dy, x, h, bits, members, modality_ids, dropout, **wanted)
    return flat_gradients(gradients, members)


def flat_gradients(gradients: Gradients, members: list[Member]) -> list[Tensor]:
    """The gradients that exist, those of B and the gates in the dtype of what they belong to."""
    flat = [gradient for gradient in (gradients.dx, gradients.dA) if gradient is not None]
    for gradient, member in zip(gradients.dB, members, strict=True):
        if gradient is not None:
            flat.append(contiguous_in(gradient, member.lora_B.dtype))
    for gradient, member in zip(gradients.dgates, members, strict=True):
        if gradient is not None:
            flat.append(contiguous_in(gradient, member.gates.dtype))
    return flat


def contiguous_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` and contiguous, copied once at most."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


for device_key in ("CPU", "CUDA"):
    library.impl("moda_group", moda_group_kernel, device_key)
    library.impl("moda_group_hidden", moda_group_hidden_kernel, device_key)
    library.impl("moda_group_outputs", moda_group_outputs_kernel, device_key)
    library.impl("moda_group_backward", moda_group_backward_kernel, device_key)


@torch.library.register_fake("sda_fast::moda_group", lib=library)
def moda_group_fake(
    x: Tensor,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    return empty_outputs(x, layouts), *moda_group_hidden_fake(x, adapters, dropout, seed, backend)


@torch.library.register_fake("sda_fast::moda_group_hidden", lib=library)
def moda_group_hidden_fake(
    x: Tensor, adapters: list[Tensor], dropout: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    h = x.new_empty(M, sum(lora_A.shape[0] for lora_A in adapters[::3]), dtype=moda_torch.wide(x.dtype))
    shape = (M, (K + 7) // 8) if keeps_bits(x, dropout, backend) else (0,)
    return h, x.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("sda_fast::moda_group_outputs", lib=library)
def moda_group_outputs_fake(
    x: Tensor,
    h: Tensor,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    backend: str,
) -> list[Tensor]:
    return empty_outputs(x, layouts)


def empty_outputs(x: Tensor, layouts: list[int]) -> list[Tensor]:
    """y of every layer, for fake versions."""
    M, K = x.shape
    widths = [layout.in_features for layout, _ in split_layouts(layouts)]
    torch._check(all(width == K for width in widths), lambda: f"x has {K} features, the layers take {widths}")
    return [x.new_empty(M, layout.out_features) for layout, _ in split_layouts(layouts)]


@torch.library.register_fake("sda_fast::moda_group_backward", lib=library)
def moda_group_backward_fake(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    modality_ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    needs_x, needs_A, needs_B, needs_gates = needs
    K = adapters[0].shape[1]
    flat: list[Tensor] = []
    if needs_x:
        flat.append(dy[0].new_empty(dy[0].shape[0], K))
    if needs_A:
        total_rank = sum(lora_A.shape[0] for lora_A in adapters[::3])
        flat.append(dy[0].new_empty(total_rank, K, dtype=moda_torch.wide(dy[0].dtype)))
    flat += [torch.empty_like(lora_B, memory_format=torch.contiguous_format) for lora_B in adapters[1::3] if needs_B]
    flat += [torch.empty_like(gate, memory_format=torch.contiguous_format) for gate in adapters[2::3] if needs_gates]
    return flat
