"""The low-rank products of an adapted layer in bfloat16 by the host library, on a CPU with AMX.

There a frozen product costs so little that a layer is bound by moving x, y and dy once more, and by what oneDNN takes
for products of eight columns. sda_fast.ops.moda_torch says the same in PyTorch, for every other case.

Sizes: M rows, K inputs, N outputs, R ranks; gates are [lines, R] of float32, one line for every M / lines rows, times
scaling. Sums and everything of M x R are float32; h * G, dh, A and B are rounded once, to bfloat16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sda_fast.ops import host_library

# With fewer rows packing A and B costs what is won, with more ranks oneDNN is as fast (docs/csrc.md).
FEWEST_ROWS, MOST_RANKS = 32, 32


def can_take(activations: Tensor, ranks: int) -> bool:
    """Whether the library computes here with these activations, x, y, dx or dy, and so many ranks."""
    return (
        activations.dtype == torch.bfloat16
        and activations.device.type == "cpu"
        and activations.shape[0] >= FEWEST_ROWS
        and activations.shape[1] > 0
        and 0 < ranks <= MOST_RANKS
        and has_low_rank(host_library.LIBRARY_PATH)
    )


@cache
def has_low_rank(path: Path) -> bool:
    """Whether the library at this path is there and its products run on this processor."""
    library = host_library.load(path)
    return not isinstance(library, str) and library.sda_fast_has_low_rank() == 1


def project(x: Tensor, lora_A: Tensor) -> Tensor:
    """h = x A^T, [M, R]."""
    x, lora_A = with_unit_columns(x), lora_A.float()
    h = x.new_empty(x.shape[0], lora_A.shape[0], dtype=torch.float32)
    host_library.loaded().sda_fast_project(*matrix(x), *factor(lora_A), h.data_ptr(), torch.get_num_threads())
    return h


def expand_add(y: Tensor, h: Tensor, gates: Tensor | None, factors: Tensor) -> Tensor:
    """y += (h * G) F in place; without gates, h F.

    Args:
        y: [M, C] with unit column stride.
        factors: F, [R, C]: B^T, or A.
    """
    factors, h = factors.float(), with_unit_columns(h)
    lines = None if gates is None else gates.contiguous()
    host_library.loaded().sda_fast_expand_add(
        *matrix(y), *factor(factors), *hidden(h), *lines_of(lines, y.shape[0]), torch.get_num_threads()
    )
    return y


def dy_pass(
    dy: Tensor, lora_B: Tensor, h: Tensor | None, gates: Tensor, *, needs_dh: bool, needs_B: bool, needs_gates: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What one reading of dy gives, None where it is not asked for.

    Returns:
        dh = (dy B) * G [M, R], dB = dy^T (h * G) [N, R], and (dy B) * h [M, R], whose sums are the gates' gradients.
    """
    dy, lora_B, gates = with_unit_columns(dy), lora_B.float(), gates.contiguous()
    h = None if h is None else with_unit_columns(h)
    sizes = dy.shape[0], lora_B.shape[1]
    dh = dy.new_empty(sizes, dtype=torch.float32) if needs_dh else None
    products = dy.new_empty(sizes, dtype=torch.float32) if needs_gates else None
    dB = torch.empty(lora_B.shape, dtype=torch.float32) if needs_B else None
    reduce(dy, lora_B.t(), h, gates, dh, products, None if dB is None else dB.t())
    return dh, dB, products


def outer(x: Tensor, dh: Tensor) -> Tensor:
    """dA = dh^T x, [R, K]."""
    x, dh = with_unit_columns(x), with_unit_columns(dh)
    dA = torch.empty(dh.shape[1], x.shape[1], dtype=torch.float32)
    reduce(x, dA, dh, None, None, None, dA)
    return dA


def reduce(
    dy: Tensor,
    factors: Tensor,
    h: Tensor | None,
    gates: Tensor | None,
    dh: Tensor | None,
    products: Tensor | None,
    sums: Tensor | None,
) -> None:
    """`sda_fast_reduce` of csrc/host/low_rank.cpp; `factors` and `sums` are [R, C], read and written where given."""
    strides = (0, 0) if sums is None else sums.stride()
    host_library.loaded().sda_fast_reduce(
        *(*matrix(dy), *factor(factors), *hidden(h), *lines_of(gates, dy.shape[0]), *hidden(dh)),
        *(address(products), address(sums), *strides, torch.get_num_threads()),
    )


def with_unit_columns(tensor: Tensor) -> Tensor:
    """The matrix, copied unless its columns are side by side."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.shape[0], tensor.shape[1], tensor.stride(0)


def factor(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.shape[0], tensor.stride(0), tensor.stride(1)


def hidden(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def lines_of(gates: Tensor | None, rows: int) -> tuple[int | None, int]:
    return (None, 1) if gates is None else (gates.data_ptr(), rows // gates.shape[0])


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
