"""The optional host library built from csrc/host/: dropout on a CPU, drawn and applied by compiled code.

Nothing is loaded at import. Everything here also exists without it, in NumPy and PyTorch (sda_fast.ops.dropout). Its
low-rank products have a module of their own (sda_fast.ops.host_products).
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LIBRARY_PATH = Path(__file__).with_name("libsda_fast_host.so")
DROP_OF_SIZE = {2: "sda_fast_drop_16", 4: "sda_fast_drop_32", 8: "sda_fast_drop_64"}
# A matrix of activations is its address, rows, columns and row stride; a factor its address, ranks and two strides;
# h its address and row stride, and the same of gates is their address and how many rows share a line.
MATRIX = FACTOR = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
HIDDEN = GATES = (ctypes.c_void_p, ctypes.c_size_t)
ARGUMENTS = {
    "sda_fast_keep_bits": (
        *(ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint64),
        *(ctypes.c_void_p, ctypes.c_size_t),
    ),
    **dict.fromkeys(
        DROP_OF_SIZE.values(),
        (*(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), *(ctypes.c_void_p, ctypes.c_size_t)),
    ),
    "sda_fast_has_low_rank": (),
    "sda_fast_project": (*MATRIX, *FACTOR, ctypes.c_void_p, ctypes.c_size_t),
    "sda_fast_expand_add": (*MATRIX, *FACTOR, *HIDDEN, *GATES, ctypes.c_size_t),
    "sda_fast_reduce": (
        *(*MATRIX, *FACTOR, *HIDDEN, *GATES, *HIDDEN),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t),
    ),
}
RESULTS = {"sda_fast_has_low_rank": ctypes.c_int}


@cache
def load(path: Path) -> ctypes.CDLL | str:
    """The library, loaded once, or why it cannot be."""
    if not path.is_file():
        return f"it was not built (no {path.name} beside {Path(__file__).name}; docs/csrc.md says how)"
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, RESULTS.get(name)
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be loaded, NumPy is used instead: %s", path, error)
        return f"it cannot be loaded: {error}"
    return library


def reason_unavailable() -> str | None:
    """Why the library cannot be used, None if it can."""
    library = load(LIBRARY_PATH)
    return library if isinstance(library, str) else None


def is_available() -> bool:
    """Whether the library was built and loads."""
    return reason_unavailable() is None


def loaded() -> ctypes.CDLL:
    """The library, which `is_available`.

    Raises:
        RuntimeError: it is not.
    """
    library = load(LIBRARY_PATH)
    if isinstance(library, str):
        raise RuntimeError(f"the host library cannot be used: {library}")
    return library


def keep_bits(bits: Tensor, threshold: int, seed: int, first: int = 0) -> None:
    """Draw the packed mask of counters first to first + the number of bits' bytes - 1 (sda_fast.ops.dropout).

    Args:
        bits: uint8 on the CPU, contiguous; overwritten.
        threshold: the 16-bit sample below which an element is dropped, at most 65535.
    """
    loaded().sda_fast_keep_bits(first, bits.numel(), threshold, seed, bits.data_ptr(), torch.get_num_threads())


def drop(values: Tensor, bits: Tensor) -> Tensor:
    """`values` with the dropped elements set to zero.

    Args:
        values: [M, K] on the CPU, of a dtype of 2, 4 or 8 bytes.
        bits: [M, ceil(K / 8)] from `keep_bits`.
    """
    rows, columns = values.shape
    values, bits = values.contiguous(), bits.contiguous()
    out = torch.empty_like(values)
    apply = getattr(loaded(), DROP_OF_SIZE[values.dtype.itemsize])
    apply(values.data_ptr(), bits.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return out
