"""Whose low-rank passes serve: Triton's kernels, or on request those of the CUDA library.

SDA_FAST_PASSES=cuda asks for the library's where they can take the activations; all else goes to Triton. They are not
the default because they have never been timed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sda_fast.kernels import moda_backward, moda_forward
from sda_fast.ops import cuda_library, cuda_passes

VARIABLE = "SDA_FAST_PASSES"
CHOICES = ("triton", "cuda")


@dataclass(frozen=True)
class Passes:
    """The passes of one implementation; `moda_forward` and `moda_backward` say what each takes and gives.

    Those of a group are None where every layer has launches of its own.
    """

    project: Callable[..., Tensor]
    expand: Callable[..., Tensor]
    expand_add: Callable[..., Tensor]
    dy_pass: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    dx_pass: Callable[..., Tensor | None]
    expand_group: Callable[..., Sequence[Tensor]] | None
    dy_pass_of_group: Callable[..., tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]] | None


def passes_of(forward: Any, backward: Any) -> Passes:
    groups = getattr(forward, "expand_group", None), getattr(backward, "dy_pass_of_group", None)
    return Passes(forward.project, forward.expand, forward.expand_add, backward.dy_pass, backward.dx_pass, *groups)


TRITON = passes_of(moda_forward, moda_backward)
CUDA = passes_of(cuda_passes, cuda_passes)


@functools.cache
def chosen() -> str:
    """What SDA_FAST_PASSES asks for; read once, because looking it up costs the host microseconds.

    Raises:
        ValueError: it is neither "triton" nor "cuda".
    """
    choice = os.environ.get(VARIABLE) or CHOICES[0]
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {CHOICES}, got {choice!r}")
    return choice


def passes_for(rank: int, *activations: Tensor) -> Passes:
    """The passes that serve these activations and a total rank.

    Raises:
        ValueError: SDA_FAST_PASSES is neither "triton" nor "cuda".
        RuntimeError: it asks for the CUDA library on a CUDA device where the library is not available.
    """
    if chosen() == "triton":
        return TRITON
    device = activations[0].device
    lacking = cuda_library.reason_unavailable(device)
    if lacking is not None and device.type == "cuda":
        raise RuntimeError(f"{VARIABLE}=cuda, but the CUDA library cannot be used: {lacking}")
    can = lacking is None and cuda_passes.reason_not_taken(rank, *activations) is None
    return CUDA if can else TRITON
