"""The optional CUDA library built from csrc/: whether it is there, and its operations on described weights and gates.
Those on activations are in `cuda_passes`.

Nothing is loaded at import. The library writes into tensors that the caller gives and knows no autograd; the operations
of this package decide when to call it. Everything here also exists without it, in Triton (sda_fast.kernels.nf4, gates).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sda_fast.ops.quantized import QUANT_TYPES, WeightLayout, in_float32

logger = logging.getLogger(__name__)

LIBRARY_PATH = Path(__file__).with_name("libsda_fast_cuda.so")
OPERATIONS = (
    *("decode_4bit", "decode_fold_4bit", "linear_4bit", "moda_gates", "moda_gates_backward"),
    *("moda_project", "moda_expand", "moda_dy_pass", "moda_dx_pass"),
)
LARGEST_EXPERTS = 256
# The code is rounded to 16 bits as code * multiplier, and the multiplier divided out of the float32 sum: those of NF4
# leave the least rounding error of its 16 values, less than half of a decoded weight's; FP4 becomes exact.
CODE_MULTIPLIERS = {
    (QUANT_TYPES["nf4"], torch.bfloat16): 1.4367,
    (QUANT_TYPES["nf4"], torch.float16): 1.6777,
    (QUANT_TYPES["fp4"], torch.bfloat16): 3.0,
    (QUANT_TYPES["fp4"], torch.float16): 3.0,
}


@cache
def load(path: Path) -> str | None:
    """Load the library once; returns why it cannot be, None once it is."""
    if not path.is_file():
        return f"it was not built (no {path.name} beside {Path(__file__).name}; docs/csrc.md says how)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = error.__cause__ or error  # torch names the path only
        logger.warning("%s cannot be loaded, Triton is used instead: %s", path, cause)
        return f"it cannot be loaded: {cause}"
    lacking = [name for name in OPERATIONS if not hasattr(torch.ops.sda_fast_cuda, name)]
    if lacking:
        reason = f"it was built from an earlier version and lacks {', '.join(lacking)}"
        logger.warning("%s has to be built anew, Triton is used instead: %s", path, reason)
        return reason
    for name in OPERATIONS:
        torch.library.register_fake(f"sda_fast_cuda::{name}", lambda *arguments: None)
    return None


def reason_unavailable(device: torch.device | str = "cuda") -> str | None:
    """Why tensors on `device` cannot be given to the library, None if they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"it takes CUDA tensors, not those of {device.type!r}"
    # The current device may change; that of a tensor has a number, and is asked for every decode.
    lacking = reason_of_card.__wrapped__ if device.index is None else reason_of_card
    return lacking(device) or load(LIBRARY_PATH)


@cache
def reason_of_card(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the library, None if it can; asked once."""
    if not torch.cuda.is_available():
        return "there is no CUDA device, or torch is a build without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return None


def is_available(device: torch.device | str = "cuda") -> bool:
    """Whether tensors on `device` can be given to the library: it loads and the device has capability 8.0 or later."""
    return reason_unavailable(device) is None


def weight_arguments(layout: WeightLayout, data: Tensor, statistics: list[Tensor]) -> tuple[object, ...]:
    """The operations' arguments from `packed` to `nested_block_size` for a weight from `quantized.describe_weight`.

    Raises:
        ValueError: the weight is not 4-bit.
    """
    if layout.quant_type == 0:
        raise ValueError("the CUDA library takes 4-bit weights, got a plain matrix")
    if not layout.nested_blocksize:
        absmax, code = statistics
        return data, in_float32(code), in_float32(absmax), None, None, None, layout.blocksize, 0
    absmax, code, nested_absmax, nested_code, offset = statistics
    nested = (in_float32(nested_code), in_float32(nested_absmax), in_float32(offset).reshape(1))
    return data, in_float32(code), absmax, *nested, layout.blocksize, layout.nested_blocksize


def decode(layout: WeightLayout, data: Tensor, statistics: list[Tensor], out: Tensor) -> Tensor:
    """Decode a 4-bit weight; rounds code * scale once, equal to bitsandbytes bit for bit.

    Args:
        layout, data, statistics: from `quantized.describe_weight`, on one CUDA device.
        out: [N, K] float16 or bfloat16, contiguous; overwritten.
    Returns:
        out.
    """
    torch.ops.sda_fast_cuda.decode_4bit(*weight_arguments(layout, data, statistics), out)
    return out


def decode_fold(
    layout: WeightLayout,
    data: Tensor,
    statistics: list[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    scaling: float,
    out: Tensor,
) -> Tensor:
    """Decode a 4-bit weight plus one modality's update: code * scale + scaling * B diag(gates) A, rounded once.

    Args:
        layout, data, statistics: from `quantized.describe_weight`, on one CUDA device.
        lora_A, lora_B: [R, K] and [N, R], both float32 or both bfloat16.
        gates: [E] float32, one modality's; E divides R.
        scaling: alpha / r.
        out: [N, K] float16 or bfloat16, contiguous; overwritten.
    Returns:
        out.
    """
    weight = weight_arguments(layout, data, statistics)
    torch.ops.sda_fast_cuda.decode_fold_4bit(
        *weight, lora_A.contiguous(), lora_B.contiguous(), in_float32(gates).contiguous(), scaling, out
    )
    return out


def linear(
    x: Tensor,
    layout: WeightLayout,
    data: Tensor,
    statistics: list[Tensor],
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    lora_B: Tensor | None = None,
    gates: Tensor | None = None,
    scaling: float = 1.0,
    splits: int = 0,
) -> Tensor:
    """Small product with a 4-bit weight, x W^T + bias + (h * G) B^T, accumulated in float32 and rounded once.

    Args:
        x: [M, K] float16 or bfloat16; meant for M <= 64, right but slow above.
        layout, data, statistics: from `quantized.describe_weight`, on x's device.
        bias: [N] of x's dtype.
        hidden: [M, R] float32, h of the low-rank part, or h * G where gates are absent; needs lora_B.
        lora_B: [N, R] float32 or bfloat16.
        gates: [E], one modality's; E divides R.
        scaling: alpha / r, which multiplies the gates.
        splits: into how many parts K is split where N alone does not fill the device; 0 chooses.
    Returns:
        [M, N] of x's dtype.
    """
    out = x.new_empty(x.shape[0], layout.out_features)
    weight = weight_arguments(layout, data, statistics)
    hidden = None if hidden is None else in_float32(hidden).contiguous()
    lora_B = None if lora_B is None else lora_B.contiguous()
    gates = None if gates is None else in_float32(gates).contiguous()
    multiplier = CODE_MULTIPLIERS[layout.quant_type, x.dtype]
    update = (hidden, lora_B, gates, scaling)
    torch.ops.sda_fast_cuda.linear_4bit(x.contiguous(), *weight, bias, *update, multiplier, out, splits)
    return out


def takes_gates(gate_embedding: Tensor, gate_proj: Tensor) -> bool:
    """Whether `gates` and `gates_backward` can be given these parameters here."""
    return (
        gate_proj.dtype in (torch.float32, torch.bfloat16)
        and gate_embedding.dtype == gate_proj.dtype
        and gate_proj.shape[0] <= LARGEST_EXPERTS
        and is_available(gate_proj.device)
    )


def gates(gate_embedding: Tensor, gate_proj: Tensor, modality: int) -> Tensor:
    """softmax(gate_proj gate_embedding[m]) in one launch.

    Args:
        gate_embedding, gate_proj: [modalities, gate_dim] and [E, gate_dim], which `takes_gates`.
        modality: the one that is wanted; -1 for all.
    Returns:
        [1, E] or [modalities, E] float32.
    """
    rows = gate_embedding.shape[0] if modality < 0 else 1
    out = torch.empty(rows, gate_proj.shape[0], dtype=torch.float32, device=gate_proj.device)
    torch.ops.sda_fast_cuda.moda_gates(gate_embedding.contiguous(), gate_proj.contiguous(), modality, out)
    return out


def gates_backward(
    dgates: Tensor, gates: Tensor, gate_embedding: Tensor, gate_proj: Tensor, modality: int, needs: Sequence[bool]
) -> list[Tensor]:
    """The wanted ones of the gradients of gate_embedding and gate_proj, in one launch.

    Args:
        dgates, gates: [1, E] or [modalities, E] float32, the gradient and what `gates` gave.
        gate_embedding, gate_proj, modality: as in `gates`.
        needs: for each of the two parameters whether its gradient is wanted.
    Returns:
        In the parameters' shapes and dtype.
    """
    both = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        for tensor, needed in zip((gate_embedding, gate_proj), needs, strict=True)
    ]
    torch.ops.sda_fast_cuda.moda_gates_backward(
        dgates.float().contiguous(), gates, gate_embedding.contiguous(), gate_proj.contiguous(), modality, *both
    )
    return [gradient for gradient in both if gradient is not None]
