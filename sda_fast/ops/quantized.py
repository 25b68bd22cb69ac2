"""bitsandbytes 4-bit weights: recognising, describing and decoding them, without importing bitsandbytes.

Storage: codes row-major over the flattened [N, K] matrix, the high nibble is the even element; blocks of `blocksize`
elements run over the flattened matrix (they may straddle rows, the last may be partial); element i is
code[nibble] * absmax[i // blocksize]. Nested statistics hold absmax as 8-bit codes:
absmax[b] = nested_code[code8[b]] * nested_absmax[b // nested_blocksize] + offset.
"""

from __future__ import annotations

import logging
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

QUANT_TYPES = {"nf4": 1, "fp4": 2}
QUANT_NAMES = {number: name for name, number in QUANT_TYPES.items()}
DECODABLE_BY_BITSANDBYTES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes decoded at once by the PyTorch path, so that its intermediates stay in the cache; whole blocks of any size.
BYTES_PER_CHUNK = 1 << 16
# The C library gives larger blocks back to the system, and getting one again costs more than decoding it.
LARGEST_REUSED_ALLOCATION = 1 << 25
ELEMENTS_PER_CHUNK = 1 << 20
LARGEST_NUMBER_OF_VIEWS = 256


@dataclass(frozen=True)
class WeightLayout:
    """What a weight's tensors mean: `quant_type` 0 is a plain matrix, `nested_blocksize` 0 is plain statistics."""

    out_features: int
    in_features: int
    quant_type: int = 0
    blocksize: int = 0
    nested_blocksize: int = 0

    @property
    def num_statistics(self) -> int:
        """How many tensors accompany the packed codes."""
        if self.quant_type == 0:
            return 0
        return 5 if self.nested_blocksize else 2


def in_float32(tensor: Tensor) -> Tensor:
    """`tensor.float()`; to ask for the dtype that is there already costs the host more than to look at it."""
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def is_4bit(weight: Tensor) -> bool:
    """Whether a weight is a bitsandbytes 4-bit parameter (Params4bit), told by what only that has."""
    return hasattr(weight, "quant_state")


def describe_weight(weight: Tensor) -> tuple[WeightLayout, Tensor, list[Tensor]]:
    """Split a weight into its layout, its data and its statistics.

    Args:
        weight: [N, K] floating point, or a bitsandbytes 4-bit parameter.
    Returns:
        (layout, data, statistics); statistics are [] or [absmax, code] or
        [absmax codes, code, nested absmax, nested code, offset].
    Raises:
        ValueError: the weight is not a matrix, or is 4-bit and not quantised yet.
    """
    if not is_4bit(weight):
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be a floating point [N, K] matrix, got {weight.dtype} {tuple(weight.shape)}")
        return WeightLayout(weight.shape[0], weight.shape[1]), weight, []
    state = state_of(weight)
    if getattr(state, "packing_format_for_cpu", False):
        restore_row_major(weight, state)
    return layout_of(state), weight.data, statistics_of(state)


def statistics_of(state: Any) -> list[Tensor]:
    """A quantisation state's tensors, as `describe_weight` gives them."""
    if not state.nested:
        return [state.absmax, state.code]
    nested = state.state2
    return [state.absmax, state.code, nested.absmax, nested.code, state.offset]


def layout_of(state: Any) -> WeightLayout:
    """The layout that a quantisation state says."""
    out_features, in_features = state.shape
    nested_blocksize = state.state2.blocksize if state.nested else 0
    return WeightLayout(out_features, in_features, QUANT_TYPES[state.quant_type], state.blocksize, nested_blocksize)


def state_of(weight: Tensor) -> Any:
    """The quantisation state of a 4-bit parameter."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(getattr(weight, "module", None), "quant_state", None)
    if state is None:
        raise ValueError("the 4-bit weight is not quantised yet; move the layer to its device first")
    return state


@torch.no_grad()
@torch.inference_mode(False)
def restore_row_major(weight: Tensor, state: Any) -> None:
    """Undo, in place, the repacking that bitsandbytes does to 4-bit weights on a CPU in evaluation.

    Repacking lays the codes out as [N / 32, K / 2, 32, 2] with low and high nibbles 32 elements apart, and keeps absmax
    un-nested, transposed and rounded to bfloat16; that rounding cannot be undone. What is restored can be trained
    beside, under `torch.inference_mode` too.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "the 4-bit weight is in bitsandbytes' CPU evaluation layout; run the model once before compiling it"
        )
    out_features, in_features = state.shape
    packed = weight.data.reshape(-1, 32)
    codes = torch.cat((packed & 0xF, packed >> 4), dim=1).view(out_features // 32, in_features // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    data = (codes[::2] << 4) | codes[1::2]
    storage_dtype = getattr(state, "original_storage_type", None)
    data = data.reshape(state.original_qshape)
    weight.data = data.view(storage_dtype) if storage_dtype is not None else data
    state.absmax = state.absmax.t().reshape(-1).float().contiguous()
    state.nested = False
    state.state2 = None
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
    logger.warning(
        "a 4-bit weight [%d, %d] had been repacked for CPU evaluation; its layout is restored, its block scales keep "
        "the bfloat16 rounding of the repacking",
        out_features,
        in_features,
    )


class Workspace:
    """Memory that is seen as matrices of some shapes and dtypes again and again: those views are kept."""

    def __init__(self, size: int, device: torch.device) -> None:
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.views: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Its first bytes as a tensor, None if it has too few."""
        found = self.views.get((shape, dtype))
        if found is None:
            size = math.prod(shape) * dtype.itemsize
            if size > self.buffer.numel():
                return None
            if len(self.views) >= LARGEST_NUMBER_OF_VIEWS:
                self.views.clear()
            with torch.inference_mode(False):
                found = self.views[shape, dtype] = self.buffer[:size].view(dtype).view(shape)
        return found


def raw_stream(device: torch.device) -> int:
    """The address of a CUDA device's current stream; torch's own object for it costs the host microseconds."""
    if device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return torch._C._cuda_getCurrentRawStream(device.index)


class WorkspacePool:
    """One growing buffer per device and stream, for a weight decoded for the length of one product.

    Work on one stream runs in order, so a buffer may be reused as soon as the product that reads it is launched; a lock
    keeps two threads from interleaving their launches, and on a CPU every thread has its own buffer.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.buffers: dict[object, Workspace] = {}
        self.of_thread = threading.local()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of a shape; valid until the next call for this device and stream."""
        if device.type == "cuda":
            buffers: dict[object, Workspace] = self.buffers
            key: object = (device.index, raw_stream(device))
        else:
            buffers, key = self.of_thread.__dict__, str(device)  # type: ignore[assignment]
        workspace = buffers.get(key)
        view = None if workspace is None else workspace.view(shape, dtype)
        if view is None:
            # Before the larger one is made.
            workspace = None
            buffers.pop(key, None)
            buffers[key] = workspace = Workspace(math.prod(shape) * dtype.itemsize, device)
            view = workspace.view(shape, dtype)
            assert view is not None
        return view

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Hold this from decoding a weight until the product that reads it is launched."""
        return self.lock if device.type == "cuda" else nullcontext()

    def clear(self) -> None:
        """Free the buffers (those of other threads on a CPU excepted)."""
        with self.lock:
            self.buffers.clear()
            self.of_thread.__dict__.clear()


workspaces = WorkspacePool()


def decode_absmax(layout: WeightLayout, statistics: list[Tensor]) -> Tensor:
    """The float32 scale of every block."""
    if not layout.nested_blocksize:
        return statistics[0].float()
    codes, _, nested_absmax, nested_code, offset = statistics
    values = nested_code.float().index_select(0, codes.reshape(-1).int())
    return scale_blocks(values, nested_absmax.float(), layout.nested_blocksize).add_(offset.float())


def scale_blocks(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """Multiply the flat `values` in place by one scale per block; the last block may be partial."""
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scales[:whole, None])
    values[whole * blocksize :].mul_(scales[whole:])
    return values


def decode(layout: WeightLayout, data: Tensor, statistics: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The weight as a matrix of `dtype`; hold `workspaces.guard` until the product that reads it is launched.

    Args:
        layout, data, statistics: from `describe_weight`.
        dtype: float64, float32, float16 or bfloat16.
    Returns:
        [N, K]; the weight itself where it has that dtype already, else a view of a workspace that the next call reuses.
    """
    shape = (layout.out_features, layout.in_features)
    if not layout.quant_type:
        if data.dtype == dtype:
            return data
        return workspaces.take(shape, dtype, data.device).copy_(data)
    absmax = decode_absmax(layout, statistics)
    return decode_scaled(layout, data.reshape(-1).view(torch.uint8), absmax, statistics[1], dtype)


def decode_scaled(
    layout: WeightLayout, codes: Tensor, absmax: Tensor, code: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """`decode` from uint8 codes and block scales; what it needs of memory is taken from `out` [N, K], if given."""
    shape = (layout.out_features, layout.in_features)
    elements = layout.out_features * layout.in_features
    if dtype in DECODABLE_BY_BITSANDBYTES and hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        operation = torch.ops.bitsandbytes.dequantize_4bit
        name = QUANT_NAMES[layout.quant_type]
        if codes.device.type == "cuda":
            out = workspaces.take(shape, dtype, codes.device) if out is None else out
            operation.out(codes, absmax, layout.blocksize, name, shape, dtype, out=out)
            return out
        # bitsandbytes 0.50.2 decodes wrongly on a CPU where blocks straddle rows.
        if layout.in_features % layout.blocksize == 0:
            if elements * dtype.itemsize <= LARGEST_REUSED_ALLOCATION:
                return operation.default(codes, absmax, layout.blocksize, name, shape, dtype)
            out = workspaces.take(shape, dtype, codes.device) if out is None else out
            return decode_by_rows(layout, codes, absmax, out)
    out = (workspaces.take(shape, dtype, codes.device) if out is None else out).view(-1)
    return decode_in_pytorch(layout, codes, absmax, code, out).view(shape)


def decode_by_rows(layout: WeightLayout, codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [N, K] with what bitsandbytes decodes, a few rows at a time; rows must start blocks."""
    operation, name = torch.ops.bitsandbytes.dequantize_4bit.default, QUANT_NAMES[layout.quant_type]
    N, K = out.shape
    step = max(1, ELEMENTS_PER_CHUNK // K)
    for first in range(0, N, step):
        last = min(first + step, N)
        some_codes = codes.view(-1)[first * K // 2 : last * K // 2]
        scales = absmax[first * K // layout.blocksize : last * K // layout.blocksize]
        out[first:last] = operation(some_codes, scales, layout.blocksize, name, (last - first, K), out.dtype)
    return out


def decode_in_pytorch(layout: WeightLayout, data: Tensor, absmax: Tensor, code: Tensor, out: Tensor) -> Tensor:
    """Fill the flat `out` from uint8 codes, block scales and the table of 16 values; rounds once, from float32."""
    # A byte is two values, read together as one 64-bit entry.
    pairs = torch.cartesian_prod(code.float(), code.float()).view(torch.int64).view(256)
    blocks_per_chunk = 2 * BYTES_PER_CHUNK // layout.blocksize
    for first_block in range(0, absmax.numel(), blocks_per_chunk):
        first = first_block * layout.blocksize
        chunk = out[first : first + 2 * BYTES_PER_CHUNK]
        codes = data[first // 2 : first // 2 + BYTES_PER_CHUNK].int()
        values = pairs.index_select(0, codes).view(torch.float32)[: chunk.numel()]
        chunk.copy_(scale_blocks(values, absmax[first_block : first_block + blocks_per_chunk], layout.blocksize))
    return out


def layer_kind(layer: nn.Module) -> str | None:
    """'float' for nn.Linear, '4bit' for bitsandbytes' Linear4bit, None for everything else."""
    if type(layer) is nn.Linear:
        return "float"
    if isinstance(layer, nn.Linear) and any(cls.__name__ == "Linear4bit" for cls in type(layer).__mro__):
        return "4bit"
    return None
