"""Gates that a layer keeps between passes in evaluation on a CPU, and how it notices that they no longer hold."""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.ops.gates import moda_gates
from sda_fast.ops.not_copied import NotCopied


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


class KeptGates(NotCopied):
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
