"""Tensors that backward reads and that exist anyway, kept without autograd's hooks for saved tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """`version_of` each."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


class HeldTensors:
    """Frozen weights and parameters, from forward to backward.

    Saved for backward they would pass through every hook for saved tensors, one by one: checkpointing's, which hands
    them from one table to another for each layer, and offloading's, which would copy them to another device. As for
    saved tensors a change in place in between is an error.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.versions = versions_of(tensors)

    def get(self) -> Sequence[Tensor]:
        """The tensors.

        Raises:
            RuntimeError: one was modified in place since.
        """
        versions = versions_of(self.tensors)
        if versions != self.versions:
            place = next(
                place for place, (now, then) in enumerate(zip(versions, self.versions, strict=True)) if now != then
            )
            tensor = self.tensors[place]
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"frozen weight or an adapter's parameter, {tensor.dtype} {tuple(tensor.shape)}, is at version "
                f"{versions[place]}, expected version {self.versions[place]}"
            )
        return self.tensors
