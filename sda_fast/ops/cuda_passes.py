"""The low-rank passes of MoDA by the optional CUDA library, in the manner of their Triton twins.

`project`, `expand_add`, `expand`, `dy_pass` and `dx_pass` take and give what the functions of these names in
`sda_fast.kernels` do, for 16-bit activations whose widths are multiples of 8, 16-byte aligned rows, and ranks up to 64.
Sizes: M rows, K inputs, N outputs, R total rank, E experts. `parts` is into how many parts a sum is cut, 0 for as many
as fill the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sda_fast.ops import cuda_library
from sda_fast.ops.dropout import dropout_scale, dropout_threshold

LARGEST_RANK = 64
# Above this rank project reads A so often that its bytes matter.
LARGEST_FLOAT32_RANK = 32
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def reason_not_taken(rank: int, *activations: Tensor) -> str | None:
    """Why the passes cannot be given these activations [rows, columns] and a total rank, None if they can."""
    if not 1 <= rank <= LARGEST_RANK:
        return f"the rank must be 1 to {LARGEST_RANK}, got {rank}"
    for matrix in activations:
        if matrix.dim() != 2:
            return f"activations must be [rows, columns], got {tuple(matrix.shape)}"
        if matrix.dtype not in SIXTEEN_BITS:
            return f"activations must be float16 or bfloat16, got {matrix.dtype}"
        columns = matrix.shape[1]
        if columns == 0 or columns % 8:
            return f"activations must have a multiple of 8 columns, got {columns}"
        if matrix.stride(1) != 1 or (matrix.shape[0] > 1 and matrix.stride(0) % 8) or matrix.data_ptr() % 16:
            return (
                f"activations must have 16-byte aligned rows, got strides {matrix.stride()} at {matrix.data_ptr():#x}"
            )
    return None


def check(rank: int, *activations: Tensor) -> None:
    """Raises ValueError with the reason if the passes cannot be given these."""
    reason = reason_not_taken(rank, *activations)
    if reason is None and any(matrix.dtype != activations[0].dtype for matrix in activations):
        reason = f"activations differ in dtype: {[matrix.dtype for matrix in activations]}"
    reason = reason or cuda_library.reason_unavailable(activations[0].device)
    if reason is not None:
        raise ValueError(f"the CUDA library cannot take this pass: {reason}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError if a tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def check_gates(gates: Tensor, modality_ids: Tensor | None, rows: int, rank: int, rows_per_sequence: int) -> None:
    """Raises ValueError if gates or ids do not belong to so many rows and ranks."""
    lines, experts = gates.shape
    if experts == 0 or rank % experts:
        raise ValueError(f"a total rank of {rank} is not a multiple of {experts} experts")
    if modality_ids is None:
        if lines not in (1, rows):
            raise ValueError(f"without modality_ids gates must have 1 or {rows} lines, got {lines}")
    elif modality_ids.numel() < -(-rows // rows_per_sequence):
        sequences = f"{rows} rows of {rows_per_sequence} a sequence"
        raise ValueError(f"modality_ids has {modality_ids.numel()} entries for {sequences}")


def as_adapter(matrix: Tensor, activations: Tensor, *, narrow: bool = False) -> Tensor:
    """An adapter's matrix as the kernels read it: float32 unless `narrow`, or of the activations' dtype."""
    if matrix.dtype not in (torch.float32, activations.dtype) or narrow:
        matrix = matrix.to(activations.dtype)
    return matrix


def as_ids(modality_ids: Tensor | None) -> Tensor | None:
    """Ids as int32 or int64, dense."""
    if modality_ids is None:
        return None
    wide = modality_ids.dtype in (torch.int32, torch.int64)
    return (modality_ids if wide else modality_ids.to(torch.int32)).contiguous()


def aligned(matrix: Tensor) -> Tensor:
    """Dense and 16-byte aligned, a copy where it is not."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Seed, threshold and scale; the scale is that of kept elements."""
    threshold = dropout_threshold(dropout_p)
    if threshold and seed is None:
        raise ValueError("dropout needs a seed")
    return seed if threshold else None, threshold, dropout_scale(dropout_p)


def project(
    x: Tensor,
    lora_A: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out: Tensor | None = None,
    parts: int = 0,
) -> Tensor:
    """h = dropout(x) A^T [M, R] float32; see `moda_forward.project`.

    Raises:
        ValueError: the library is absent or cannot take the activations, or shapes do not fit. So do all passes.
    """
    R = lora_A.shape[0]
    check(R, x)
    check_shape("lora_A", lora_A, (R, x.shape[1]))
    h = torch.empty(x.shape[0], R, dtype=torch.float32, device=x.device) if out is None else out
    check_shape("out", h, (x.shape[0], R))
    adapter = aligned(as_adapter(lora_A, x, narrow=R > LARGEST_FLOAT32_RANK))
    torch.ops.sda_fast_cuda.moda_project(x, adapter, *dropout_arguments(dropout_p, seed), h, parts)
    return h


def expand_add(
    y: Tensor,
    h: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    modality_ids: Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
) -> Tensor:
    """y += (h * G) B^T in place, rounded once; see `moda_forward.expand_add`."""
    return launch_expand(y, h, lora_B, gates, modality_ids, scaling, rows_per_sequence=rows_per_sequence)


def expand(
    h: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    modality_ids: Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    bias: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """out = (h * G) B^T + bias, rounded once; see `moda_forward.expand`."""
    gate = (gates, modality_ids, scaling)
    return launch_expand(out, h, lora_B, *gate, rows_per_sequence=rows_per_sequence, bias=bias, adds=False)


def launch_expand(
    y: Tensor,
    h: Tensor,
    lora_B: Tensor,
    gates: Tensor | None,
    modality_ids: Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    bias: Tensor | None = None,
    adds: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = [y +] mask / (1 - p) * (h * G) B^T [+ bias], for lora_B [N, R] with any strides; no gates: G is 1."""
    (M, N), R = y.shape, h.shape[1]
    check(R, y)
    check_shape("h", h, (M, R))
    check_shape("lora_B", lora_B, (N, R))
    if gates is not None:
        check_gates(gates, modality_ids, M, R, rows_per_sequence)
        gates = gates.float().contiguous()
    dropping = dropout_arguments(dropout_p, seed)
    bias = None if bias is None else bias.to(y.dtype).contiguous()
    gate = (gates, as_ids(modality_ids), rows_per_sequence, scaling)
    torch.ops.sda_fast_cuda.moda_expand(y, h, as_adapter(lora_B, y), bias, *gate, *dropping, adds)
    return y


def dy_pass(
    dy: Tensor,
    h: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    modality_ids: Tensor | None,
    scaling: float,
    *,
    rows_per_sequence: int = 1,
    needs_dh: bool = True,
    needs_dB: bool = True,
    needs_gates: bool = True,
    dh_out: Tensor | None = None,
    parts: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh [M, R], dB [N, R], dgates like gates), float32, None where not asked for; see `moda_backward.dy_pass`."""
    (M, N), R = dy.shape, h.shape[1]
    check(R, dy)
    check_shape("h", h, (M, R))
    check_shape("lora_B", lora_B, (N, R))
    check_gates(gates, modality_ids, M, R, rows_per_sequence)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dy.device)

    dh = (sums(M, R) if dh_out is None else dh_out) if needs_dh else None
    dB = sums(N, R) if needs_dB else None
    dgates = sums(*gates.shape) if needs_gates else None
    if dh is not None:
        check_shape("dh_out", dh, (M, R))
    gate = (gates.float().contiguous(), as_ids(modality_ids), rows_per_sequence, scaling)
    adapter = as_adapter(lora_B, dy).contiguous()
    torch.ops.sda_fast_cuda.moda_dy_pass(dy, h, adapter, *gate, dh, dB, dgates, parts)
    return dh, dB, dgates


def dx_pass(
    x: Tensor | None,
    dh: Tensor,
    lora_A: Tensor,
    dx: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs_dA: bool = True,
    adds: bool = True,
    parts: int = 0,
) -> Tensor | None:
    """dA [R, K] float32 or None, and dx updated in place; see `moda_backward.dx_pass`."""
    if not needs_dA:
        if dx is not None:
            launch_expand(dx, dh, lora_A.t(), None, None, 1.0, adds=adds, dropout_p=dropout_p, seed=seed)
        return None
    if x is None:
        raise ValueError("x is None but dA is wanted")
    (M, K), R = x.shape, dh.shape[1]
    check(R, *(matrix for matrix in (x, dx) if matrix is not None))
    check_shape("dh", dh, (M, R))
    check_shape("lora_A", lora_A, (R, K))
    if dx is not None:
        check_shape("dx", dx, (M, K))
    dA = torch.empty(R, K, dtype=torch.float32, device=x.device)
    dropping = dropout_arguments(dropout_p, seed)
    torch.ops.sda_fast_cuda.moda_dx_pass(x, dh, as_adapter(lora_A, x).contiguous(), dx, dA, *dropping, adds, parts)
    return dA
