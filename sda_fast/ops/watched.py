"""Noticing that tensors are no longer what something kept was made from.

What writes through an operation raises a tensor's version; another tensor, or another `.data`, is another object or
address. What writes past PyTorch, in place through `.data` or `.detach().numpy()`, is not noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class Watched:
    """Tensors as they were: the same objects, on the same memory, not written to since.

    Raises:
        RuntimeError: a tensor was made under `torch.inference_mode`, where changes are not counted.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_inference():
                raise RuntimeError(
                    f"a {tensor.dtype} {tuple(tensor.shape)} tensor of the layer was made under "
                    "torch.inference_mode(), which does not count changes; make the model outside of it, or do "
                    "without cache_folded"
                )
        self.objects = [weakref.ref(tensor) for tensor in tensors]
        # Held, so that the allocator cannot give the same address to other values.
        self.memory = [tensor.data for tensor in tensors]
        self.marks = marks_of(tensors)

    def are_still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that are watched, unchanged."""
        if len(tensors) != len(self.objects):
            return False
        for watched, tensor in zip(self.objects, tensors, strict=True):
            if watched() is not tensor:
                return False
        return marks_of(tensors) == self.marks


def marks_of(tensors: Sequence[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """What changes with the values, as far as PyTorch knows; nothing where a tensor does not count its changes."""
    try:
        # Every question to a parameter of a class of its own goes through that class otherwise, in Python.
        with torch._C.DisableTorchFunctionSubclass():
            return [(tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
    except RuntimeError:
        return []
