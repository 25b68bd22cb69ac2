"""torch.library operation for MoDA's gates: `sda_fast::moda_gates` and its backward.

softmax(gate_proj gate_embedding[m]) is a handful of numbers per layer, but as separate operations with a gradient of
each it costs more launches than the rest of the adapter; here it is one operation each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sda_fast.ops import cuda_library
from sda_fast.ops.moda_group import runs_here_and_now, without_autocast
from sda_fast.ops.moda_torch import wide

EVERY_MODALITY = -1

library = torch.library.Library("sda_fast", "FRAGMENT")
library.define("moda_gates(Tensor gate_embedding, Tensor gate_proj, int modality) -> Tensor")
library.define(
    "moda_gates_backward(Tensor dgates, Tensor gates, Tensor gate_embedding, Tensor gate_proj, int modality, "
    "bool[] needs) -> Tensor[]"
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
    if gate_embedding.dim() != 2 or gate_proj.dim() != 2 or gate_embedding.shape[1] != gate_proj.shape[1]:
        raise ValueError(
            f"gate_embedding must be [modalities, gate_dim] and gate_proj [E, gate_dim], got "
            f"{tuple(gate_embedding.shape)} and {tuple(gate_proj.shape)}"
        )
    if modality is not None and not 0 <= modality < gate_embedding.shape[0]:
        raise ValueError(f"modality id {modality} is not below the number of modalities, {gate_embedding.shape[0]}")
    number = EVERY_MODALITY if modality is None else modality
    if runs_here_and_now():
        return moda_gates_kernel(gate_embedding, gate_proj, number)
    return torch.ops.sda_fast.moda_gates(gate_embedding, gate_proj, number)


class KeptValues:
    """A parameter's values in CPU memory as they were; comparing its few hundred bytes notices every kind of change."""

    def __init__(self, parameter: Tensor) -> None:
        # Held, so that the allocator cannot give the same address to another parameter.
        self.memory = parameter.detach()
        self.address, self.dtype = parameter.data_ptr(), parameter.dtype
        self.bytes = self.memory.contiguous().view(torch.uint8).numpy()
        self.is_view = self.bytes.ctypes.data == self.address
        self.values = self.bytes.tobytes()

    def are_still(self, parameter: Tensor) -> bool:
        return (
            self.is_view
            and parameter.data_ptr() == self.address
            and parameter.dtype == self.dtype
            and self.bytes.tobytes() == self.values
        )


class KeptGates:
    """One layer's gates on a CPU, by modality, computed anew only when a byte of their parameters is another."""

    def __init__(self) -> None:
        self.by_modality: dict[int, tuple[KeptValues, KeptValues, Tensor]] = {}

    def get(self, gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
        """`moda_gates` of one modality, without gradients; not to be written to."""
        kept = self.by_modality.get(modality)
        if kept is not None and kept[0].are_still(gate_embedding) and kept[1].are_still(gate_proj):
            return kept[2]
        gates = moda_gates(gate_embedding, gate_proj, modality)
        self.by_modality[modality] = KeptValues(gate_embedding), KeptValues(gate_proj), gates
        return gates

    def clear(self) -> None:
        """Free them."""
        self.by_modality.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptGates:
        return KeptGates()

    def __reduce__(self) -> tuple[type[KeptGates], tuple[()]]:
        return KeptGates, ()


def wanted_rows(gate_embedding: Tensor, modality: int) -> Tensor:
    """The embedding of one modality as [1, gate_dim], or of all."""
    return gate_embedding if modality == EVERY_MODALITY else gate_embedding[modality : modality + 1]


def moda_gates_kernel(gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
    if gate_proj.is_cuda and cuda_library.takes_gates(gate_embedding, gate_proj):
        return cuda_library.gates(gate_embedding, gate_proj, modality)
    dtype = wide(gate_proj.dtype)
    with without_autocast(gate_proj.device):
        # Not a matrix product, which may round to fewer bits on a GPU.
        embedding = wanted_rows(gate_embedding, modality).to(dtype)
        return torch.softmax((embedding[:, None] * gate_proj.to(dtype)).sum(-1), -1)


def moda_gates_backward_kernel(
    dgates: Tensor, gates: Tensor, gate_embedding: Tensor, gate_proj: Tensor, modality: int, needs: list[bool]
) -> list[Tensor]:
    """The wanted ones of the gradients of gate_embedding and gate_proj, in their dtypes."""
    if gate_proj.is_cuda and cuda_library.takes_gates(gate_embedding, gate_proj):
        return cuda_library.gates_backward(dgates, gates, gate_embedding, gate_proj, modality, needs)
    needs_embedding, needs_proj = needs
    wanted: list[Tensor] = []
    with without_autocast(gates.device):
        dlogits = torch._softmax_backward_data(dgates, gates, -1, gates.dtype)[:, :, None]
        if needs_embedding:
            of_rows = (dlogits * gate_proj).sum(1)
            if modality == EVERY_MODALITY:
                wanted.append(of_rows.to(gate_embedding.dtype))
            else:
                wanted.append(torch.zeros_like(gate_embedding, memory_format=torch.contiguous_format))
                wanted[0][modality] = of_rows[0]
        if needs_proj:
            of_proj = dlogits * wanted_rows(gate_embedding, modality)[:, None]
            wanted.append((of_proj[0] if len(of_proj) == 1 else of_proj.sum(0)).to(gate_proj.dtype))
    return wanted


for device_key in ("CPU", "CUDA"):
    library.impl("moda_gates", moda_gates_kernel, device_key)
    library.impl("moda_gates_backward", moda_gates_backward_kernel, device_key)


@torch.library.register_fake("sda_fast::moda_gates", lib=library)
def moda_gates_fake(gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
    rows = gate_embedding.shape[0] if modality == EVERY_MODALITY else 1
    return gate_proj.new_empty(rows, gate_proj.shape[0], dtype=wide(gate_proj.dtype))


@torch.library.register_fake("sda_fast::moda_gates_backward", lib=library)
def moda_gates_backward_fake(
    dgates: Tensor, gates: Tensor, gate_embedding: Tensor, gate_proj: Tensor, modality: int, needs: list[bool]
) -> list[Tensor]:
    parameters = (gate_embedding, gate_proj)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(parameters, needs, strict=True) if needed]


class MoDAGates(torch.autograd.Function):
    """The autograd formula of `moda_gates`."""

    @staticmethod
    def forward(ctx: Any, gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            gates = torch.ops.sda_fast.moda_gates(gate_embedding, gate_proj, modality)
        ctx.modality = modality
        ctx.save_for_backward(gates, gate_embedding, gate_proj)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:2]
        wanted = iter(torch.ops.sda_fast.moda_gates_backward(dgates, *ctx.saved_tensors, ctx.modality, list(needs)))
        return *(next(wanted) if needed else None for needed in needs), None


def moda_gates_autograd(gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
    """`moda_gates` where gradients may be wanted."""
    if torch.is_grad_enabled() and (gate_embedding.requires_grad or gate_proj.requires_grad):
        return MoDAGates.apply(gate_embedding, gate_proj, modality)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sda_fast.moda_gates(gate_embedding, gate_proj, modality)


library.impl("moda_gates", moda_gates_autograd, "Autograd")
