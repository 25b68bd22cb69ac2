"""torch.library operation for MoDA's gates: `sda_fast::moda_gates` and its backward.

softmax(gate_proj gate_embedding[m]) is a handful of numbers per layer, but as separate operations with a gradient of
each it costs more launches than the rest of the adapter; here it is one operation each way, for all layers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sda_fast.ops import cuda_library
from sda_fast.ops.moda_group import TRITON_DTYPES, TRITON_INSTALLED, runs_here_and_now, without_autocast
from sda_fast.ops.moda_torch import wide
from sda_fast.ops.runs import equal_runs

EVERY_MODALITY = -1


class GateParameters(NamedTuple):
    """What a layer's gates are made from: [modalities, gate_dim] and [E, gate_dim]."""

    embedding: Tensor
    proj: Tensor


library = torch.library.Library("sda_fast", "FRAGMENT")
library.define("moda_gates(Tensor[] gate_embeddings, Tensor[] gate_projs, int modality) -> Tensor[]")
library.define(
    "moda_gates_backward(Tensor[] dgates, Tensor[] gates, Tensor[] gate_embeddings, Tensor[] gate_projs, "
    "int modality, bool[] needs) -> Tensor[]"
)


def moda_gates(gate_embedding: Tensor, gate_proj: Tensor, modality: int | None = None) -> Tensor:
    """The mixture of the experts, softmax(gate_proj gate_embedding[m]) (arXiv 2512.06883).

    Args:
        gate_embedding: [modalities, gate_dim], any floating dtype.
        gate_proj: [E, gate_dim], likewise.
        modality: the one that is wanted; None for all.
    Returns:
        [modalities, E] or [1, E], float32 (float64 for a float64 gate_proj), rows sum to one. Differentiable once.
    Raises:
        ValueError: sizes do not fit, or there is no such modality.
    """
    check_sizes(gate_embedding, gate_proj)
    if modality is not None and not 0 <= modality < gate_embedding.shape[0]:
        raise ValueError(f"modality id {modality} is not below the number of modalities, {gate_embedding.shape[0]}")
    wanted = EVERY_MODALITY if modality is None else modality
    if runs_here_and_now():
        return moda_gates_kernel([gate_embedding], [gate_proj], wanted)[0]
    return torch.ops.sda_fast.moda_gates([gate_embedding], [gate_proj], wanted)[0]


def check_sizes(gate_embedding: Tensor, gate_proj: Tensor) -> None:
    """Raises ValueError unless both are matrices of one width."""
    if gate_embedding.dim() != 2 or gate_proj.dim() != 2 or gate_embedding.shape[1] != gate_proj.shape[1]:
        raise ValueError(
            f"gate_embedding must be [modalities, gate_dim] and gate_proj [E, gate_dim], got "
            f"{tuple(gate_embedding.shape)} and {tuple(gate_proj.shape)}"
        )


def wanted_rows(gate_embedding: Tensor, modality: int) -> Tensor:
    """The embedding of one modality as [1, gate_dim], or of all."""
    return gate_embedding if modality == EVERY_MODALITY else gate_embedding[modality : modality + 1]


def moda_gates_kernel(gate_embeddings: Sequence[Tensor], gate_projs: Sequence[Tensor], modality: int) -> list[Tensor]:
    """`moda_gates` on CPU and CUDA: by Triton several layers at once, else layer by layer."""
    made: list[Tensor] = []
    for run in runs_of_equal_layers(gate_embeddings, gate_projs):
        embeddings, projs = gate_embeddings[run], gate_projs[run]
        if takes_triton(embeddings, projs):
            from sda_fast.kernels.gates import gates_of_layers

            made += gates_of_layers(embeddings, projs, *first_and_lines(embeddings[0], modality))
        else:
            made += [gates_of(*both, modality) for both in zip(embeddings, projs, strict=True)]
    return made


def runs_of_equal_layers(gate_embeddings: Sequence[Tensor], gate_projs: Sequence[Tensor]) -> list[slice]:
    """Layers of the same sizes and dtypes."""
    pairs = zip(gate_embeddings, gate_projs, strict=True)
    return equal_runs([(one.shape, one.dtype, proj.shape, proj.dtype) for one, proj in pairs])


def takes_triton(gate_embeddings: Sequence[Tensor], gate_projs: Sequence[Tensor]) -> bool:
    """Whether Triton's kernels make these layers' gates: the CUDA library's launch costs less for one layer alone."""
    embedding, proj = gate_embeddings[0], gate_projs[0]
    return (
        proj.is_cuda
        and TRITON_INSTALLED
        and embedding.dtype in TRITON_DTYPES
        and proj.dtype in TRITON_DTYPES
        and not (len(gate_projs) == 1 and cuda_library.takes_gates(embedding, proj))
    )


def first_and_lines(gate_embedding: Tensor, modality: int) -> tuple[int, int]:
    """The first wanted modality, and how many are wanted."""
    return (0, gate_embedding.shape[0]) if modality == EVERY_MODALITY else (modality, 1)


def gates_of(gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
    """The gates of one layer."""
    if gate_proj.is_cuda and cuda_library.takes_gates(gate_embedding, gate_proj):
        return cuda_library.gates(gate_embedding, gate_proj, modality)
    dtype = wide(gate_proj.dtype)
    with without_autocast(gate_proj.device):
        # Not a matrix product, which may round to fewer bits on a GPU.
        embedding = wanted_rows(gate_embedding, modality).to(dtype)
        return torch.softmax((embedding.unsqueeze(1) * gate_proj.to(dtype)).sum(-1), -1)


def moda_gates_backward_kernel(
    dgates: list[Tensor],
    gates: list[Tensor],
    gate_embeddings: list[Tensor],
    gate_projs: list[Tensor],
    modality: int,
    needs: list[bool],
) -> list[Tensor]:
    """The wanted ones of the gradients of each layer's gate_embedding and gate_proj, one after the other."""
    wanted: list[Tensor] = []
    for run in runs_of_equal_layers(gate_embeddings, gate_projs):
        layers = dgates[run], gates[run], gate_embeddings[run], gate_projs[run]
        if takes_triton(*layers[2:]):
            from sda_fast.kernels.gates import gates_backward_of_layers

            first, _ = first_and_lines(gate_embeddings[0], modality)
            both = gates_backward_of_layers(*layers, first, needs_embedding=needs[0], needs_proj=needs[1])
            kinds = [kind for kind in both if kind is not None]
            wanted += [gradient for layer in zip(*kinds, strict=True) for gradient in layer]
        else:
            wanted += [one for layer in zip(*layers, strict=True) for one in gradients_of(*layer, modality, needs)]
    return wanted


def gradients_of(
    dgates: Tensor, gates: Tensor, gate_embedding: Tensor, gate_proj: Tensor, modality: int, needs: list[bool]
) -> list[Tensor]:
    """The wanted ones of the gradients of gate_embedding and gate_proj, in their dtypes."""
    if gate_proj.is_cuda and cuda_library.takes_gates(gate_embedding, gate_proj):
        return cuda_library.gates_backward(dgates, gates, gate_embedding, gate_proj, modality, needs)
    needs_embedding, needs_proj = needs
    wanted: list[Tensor] = []
    with without_autocast(gates.device):
        dlogits = torch._softmax_backward_data(dgates, gates, -1, gates.dtype).unsqueeze(2)
        if needs_embedding:
            of_rows = (dlogits * gate_proj).sum(1)
            if modality == EVERY_MODALITY:
                wanted.append(of_rows.to(gate_embedding.dtype))
            else:
                wanted.append(gate_embedding.new_zeros(gate_embedding.shape))
                wanted_rows(wanted[0], modality).copy_(of_rows)
        if needs_proj:
            of_proj = dlogits * wanted_rows(gate_embedding, modality).unsqueeze(1)
            wanted.append((of_proj[0] if len(of_proj) == 1 else of_proj.sum(0)).to(gate_proj.dtype))
    return wanted


for device_key in ("CPU", "CUDA"):
    library.impl("moda_gates", moda_gates_kernel, device_key)
    library.impl("moda_gates_backward", moda_gates_backward_kernel, device_key)


@torch.library.register_fake("sda_fast::moda_gates", lib=library)
def moda_gates_fake(gate_embeddings: list[Tensor], gate_projs: list[Tensor], modality: int) -> list[Tensor]:
    return [
        proj.new_empty(embedding.shape[0] if modality == EVERY_MODALITY else 1, proj.shape[0], dtype=wide(proj.dtype))
        for embedding, proj in zip(gate_embeddings, gate_projs, strict=True)
    ]


@torch.library.register_fake("sda_fast::moda_gates_backward", lib=library)
def moda_gates_backward_fake(
    dgates: list[Tensor],
    gates: list[Tensor],
    gate_embeddings: list[Tensor],
    gate_projs: list[Tensor],
    modality: int,
    needs: list[bool],
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for both in zip(gate_embeddings, gate_projs, strict=True)
        for tensor, needed in zip(both, needs, strict=True)
        if needed
    ]


class MoDAGates(torch.autograd.Function):
    """The autograd formula of `moda_gates`; `parameters` are all gate_embeddings, then all gate_projs."""

    @staticmethod
    def forward(ctx: Any, modality: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        gates = below_autograd(parameters, modality)
        ctx.modality = modality
        ctx.save_for_backward(*gates, *parameters)
        return tuple(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dgates: Tensor) -> tuple[Any, ...]:
        count = len(dgates)
        gates, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = ctx.needs_input_grad[1:]
        return None, *parameter_gradients(dgates, gates, parameters, ctx.modality, wanted)


def below_autograd(parameters: Sequence[Tensor], modality: int) -> list[Tensor]:
    """`moda_gates` for the keys after autograd; `parameters` as in `MoDAGates`."""
    count = len(parameters) // 2
    if runs_here_and_now():
        return moda_gates_kernel(parameters[:count], parameters[count:], modality)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sda_fast.moda_gates(parameters[:count], parameters[count:], modality)


def parameter_gradients(
    dgates: Sequence[Tensor],
    gates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    modality: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of every parameter, in `MoDAGates`' order; None where no layer's parameter of the kind wants one."""
    count = len(dgates)
    needs = [any(wanted[:count]), any(wanted[count:])]
    compute = moda_gates_backward_kernel if runs_here_and_now() else torch.ops.sda_fast.moda_gates_backward
    flat = iter(compute(list(dgates), list(gates), list(parameters[:count]), list(parameters[count:]), modality, needs))
    pairs = [tuple(next(flat) if needed else None for needed in needs) for _ in range(count)]
    return [embedding for embedding, _ in pairs] + [proj for _, proj in pairs]


def moda_gates_autograd(gate_embeddings: list[Tensor], gate_projs: list[Tensor], modality: int) -> list[Tensor]:
    """`moda_gates` where gradients may be wanted."""
    parameters = (*gate_embeddings, *gate_projs)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return list(MoDAGates.apply(modality, *parameters))
    return below_autograd(parameters, modality)


library.impl("moda_gates", moda_gates_autograd, "Autograd")
