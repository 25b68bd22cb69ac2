"""Peak memory of a step, and the bytes it keeps for backward."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from cmsa_run import peak_of_a_step, resident_bytes, settled_bytes
from sda_fast.ops.quantized import workspaces
from sda_fast.timing import Step

PERCENTILES = (20, 50, 80)


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Memory that a step takes beyond what is held before it, its reused workspace included; None if not to be had."""
    gc.collect()
    workspaces.clear()
    if device.type == "cuda":
        return peak_of_a_step(step)
    try:
        before = settled_bytes()
    except OSError:
        return None
    step()
    return resident_bytes("VmHWM") - before


def bytes_kept(layer: nn.Module, x: Tensor) -> int:
    """What forward keeps for backward through autograd, each storage once; weights and their statistics excepted."""
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in frozen_tensors(layer)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """Parameters, buffers and 4-bit statistics: what is there whether or not a step runs."""
    tensors = [*layer.parameters(), *layer.buffers()]
    for parameter in layer.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [value for value in vars(part).values() if torch.is_tensor(value)] if part is not None else []
    return tensors
