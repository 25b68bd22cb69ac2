"""MoDA's linear layer as a function: the frozen product plus a mixture of low-rank experts chosen by modality."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops.gates import EVERY_MODALITY, GateParameters, check_sizes, moda_gates
from sda_fast.ops.moda_autograd import Tensors, moda_group
from sda_fast.ops.moda_evaluate import moda_evaluate_kernel
from sda_fast.ops.moda_group import layout_numbers, resolve_backend, runs_here_and_now
from sda_fast.ops.quantized import describe_weight

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def moda_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    modality_ids: Tensor | Sequence[int] | int | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """x W^T + bias + scaling * sum over experts e of gate_e * B_e A_e dropout(x) (arXiv 2512.06883, MoDA).

    The experts cost what one LoRA of the total rank costs. Kept for backward: x, h = dropout(x) A^T in float32, and a
    seed (on a CPU one bit per element of x).

    Args:
        x: [..., K], float64, float32, float16 or bfloat16; under autocast it is cast as `nn.functional.linear` does.
        weight: [N, K] in any floating dtype, or a bitsandbytes 4-bit parameter; frozen.
        lora_A: [R, K], the experts' rows stacked: expert e owns rows e * R / E to (e + 1) * R / E - 1.
        lora_B: [N, R], stacked likewise in columns.
        gates: [num_modalities, E] after softmax; without modality_ids [rows, E] or [1, E], one line per row or for all.
        modality_ids: one per sequence ([B] for x [B, ..., K]) or one per token (x's shape without K), integers below
            num_modalities; or one for all, an int, a NumPy integer or a tensor without dimensions. Moved to x's device.
        scaling: alpha / r.
        bias: [N] or None; frozen.
        dropout: probability of dropping an element of x on its way to A; 0 in evaluation.
        seed: of the dropout mask, an int in [0, 2**63) or one int64 element on x's device; drawn from the default
            generator of x's device if absent.
        backend: "auto", "triton" or "torch".
    Returns:
        [..., N] in x's dtype. Differentiable once, in x, lora_A, lora_B and gates.
    Raises:
        ValueError: x has another dtype, shapes do not fit, an id is out of range (ids on a GPU are not checked), or a
            frozen part requires grad.
        RuntimeError: backend="triton" cannot run here.
    """
    return moda_linear_group(
        x,
        [weight],
        [lora_A],
        [lora_B],
        [gates],
        modality_ids,
        scalings=[scaling],
        biases=[bias],
        dropout=dropout,
        seed=seed,
        backend=backend,
    )[0]


def moda_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gates: Sequence[Tensor | GateParameters],
    modality_ids: Tensor | Sequence[int] | int | None = None,
    *,
    scalings: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    may_fold: bool = False,
) -> list[Tensor]:
    """`moda_linear` for several layers that read the same x, which is then read once for all of them.

    Which gradients are needed is asked of the whole group: where one layer's lora_A requires grad, those of all are
    computed, and likewise for lora_B and for the gates. Layers of which some are frozen are cheaper apart.

    Args:
        weights, lora_A, lora_B, gates, scalings, biases: one entry per layer, as in `moda_linear`; ranks, experts and
            output sizes may differ. Gates may be the parameters that they are made from, of all layers or of none.
        modality_ids, dropout, seed: shared; one dropout mask serves all layers.
        may_fold: where gradients are disabled, all rows share their gates and nothing is dropped, compute as
            `sda_fast::moda_evaluate` sees fit: with the update folded into the weight, or not (docs/folding.md).
    Returns:
        One [..., N] per layer.
    Raises:
        As `moda_linear`.
    """
    x, modality_ids = as_autocast(x), as_one_id(modality_ids)
    check_dtype(x)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    resolved = resolve_backend(backend, x)
    modality = modality_ids if isinstance(modality_ids, int) else None
    shapes = [shape_of(gate) for gate in gates]
    ids = ids_of(x, modality_ids, min(shape[0] for shape in shapes))
    frozen: list[Tensor] = []
    layouts: list[int] = []
    for weight, A, B, shape, bias in zip(weights, lora_A, lora_B, shapes, biases, strict=True):
        layout, data, statistics = describe_weight(weight)
        check_layer(x, layout.out_features, layout.in_features, A, B, shape)
        check_frozen(weight, bias, layout.out_features)
        frozen += [data, *statistics] if bias is None else [data, *statistics, savable(bias)]
        layouts += layout_numbers(layout, bias is not None)
    lines = {1} if modality is not None else {shape[0] for shape in shapes}
    if ids is None:
        check_lines(x, lines)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scales, one_gate = list(scalings), ids is None and lines == {1}
    if may_fold and one_gate and dropout == 0 and not torch.is_grad_enabled():
        adapters = Tensors(frozen, lora_A, lora_B, gates_for_rows(gates, modality)).adapters()
        evaluate = moda_evaluate_kernel if runs_here_and_now() else torch.ops.sda_fast.moda_evaluate
        y = evaluate(rows, frozen, adapters, layouts, scales, resolved, backend == "auto")
        return as_rows_of(x, y)
    drawn = seed_tensor(x, seed) if dropout > 0 else None
    if torch.compiler.is_compiling():
        # What Dynamo traces is merged by its operations (`sda_fast.moda.compiling`).
        adapters = Tensors(frozen, lora_A, lora_B, gates_for_rows(gates, modality)).adapters()
        y, _, _ = torch.ops.sda_fast.moda_group(rows, frozen, adapters, layouts, scales, ids, dropout, drawn, resolved)
    else:
        gating, of_modality = gating_of(gates, modality)
        tensors = Tensors(frozen, lora_A, lora_B, gating)
        y, _, _ = moda_group(rows, tensors, layouts, scales, ids, dropout, drawn, resolved, of_modality)
    return as_rows_of(x, y)


def as_rows_of(x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """[M, N] each, with x's leading dimensions."""
    return outputs if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def gating_of(gates: Sequence[Tensor | GateParameters], modality: int | None) -> tuple[list[Tensor], int | None]:
    """`gating` and `modality` as `moda_group` takes them."""
    parameters = [gate for gate in gates if isinstance(gate, GateParameters)]
    if len(parameters) < len(gates):
        return gates_for_rows(gates, modality), None
    flat = [one.embedding for one in parameters] + [one.proj for one in parameters]
    return flat, EVERY_MODALITY if modality is None else modality


def shape_of(gates: Tensor | GateParameters) -> tuple[int, ...]:
    """[modalities, E] of gates, or of those to be made."""
    if isinstance(gates, GateParameters):
        check_sizes(*gates)
        return gates.embedding.shape[0], gates.proj.shape[0]
    return tuple(gates.shape)


def gates_for_rows(gates: Sequence[Tensor | GateParameters], modality: int | None) -> list[Tensor]:
    """Every layer's gates: those of one modality [1, E], or all."""
    wanted = slice(None) if modality is None else slice(modality, modality + 1)
    return [moda_gates(*gate, modality) if isinstance(gate, GateParameters) else gate[wanted] for gate in gates]


def as_autocast(x: Tensor) -> Tensor:
    """x as `nn.functional.linear` takes it under autocast."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def seed_tensor(x: Tensor, seed: Tensor | int | None) -> Tensor:
    """The seed as one int64 element on x's device."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, int):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        return torch.tensor([seed], dtype=torch.int64, device=x.device)
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(
            f"seed must be one int64 element on {x.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    if seed.device.type == "cpu" and not torch.compiler.is_compiling() and int(seed) < 0:
        raise ValueError(f"seed must be in [0, 2**63), got {int(seed)}")
    return seed.reshape(1)


def as_one_id(modality_ids: Any) -> Any:
    """An id that came as a NumPy integer or an integer tensor without dimensions as an int; all else as it is."""
    if isinstance(modality_ids, int) or getattr(modality_ids, "ndim", None) != 0:
        return modality_ids
    return operator.index(modality_ids) if "int" in str(modality_ids.dtype) else modality_ids


def ids_of(x: Tensor, modality_ids: Tensor | Sequence[int] | int | None, modalities: int) -> Tensor | None:
    """The ids as a flat, dense int64 tensor whose length divides the number of rows; None without, or one for all."""
    if modality_ids is None:
        return None
    if isinstance(modality_ids, int):
        if not 0 <= modality_ids < modalities:
            raise ValueError(f"modality id {modality_ids} is not below the number of modalities, {modalities}")
        return None
    ids = torch.as_tensor(modality_ids)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"modality_ids must be integers, got {ids.dtype}")
    leading = x.shape[:-1]
    if ids.shape != leading and ids.shape != leading[:1]:
        raise ValueError(
            f"modality_ids has shape {tuple(ids.shape)} but x has {leading[0] if leading else 1} sequences and "
            f"leading shape {tuple(leading)}: give one id per sequence or one per token"
        )
    # Looking at ids on a GPU would wait for it.
    checkable = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if checkable and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < modalities:
        raise ValueError(
            f"modality_ids run from {int(ids.min())} to {int(ids.max())} but there are {modalities} modalities"
        )
    return ids.reshape(-1).to(device=x.device, dtype=torch.int64).contiguous()


def check_layer(x: Tensor, N: int, K: int, lora_A: Tensor, lora_B: Tensor, gates: Sequence[int]) -> None:
    """Shapes of one layer's parameters against its weight and x."""
    check_width(x, K)
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A must be [R, {K}], got {tuple(lora_A.shape)}")
    R = lora_A.shape[0]
    if lora_B.shape != (N, R):
        raise ValueError(f"lora_B must be [{N}, {R}], got {tuple(lora_B.shape)}")
    if len(gates) != 2 or gates[1] < 1 or R % gates[1] != 0:
        raise ValueError(f"gates must be [modalities, E] with E dividing the total rank {R}, got {tuple(gates)}")


def check_dtype(x: Tensor) -> None:
    """x must be of a dtype that products exist for."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"x must be one of {names}, got {str(x.dtype).removeprefix('torch.')}")


def check_width(x: Tensor, K: int) -> None:
    """x must be [..., K]."""
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} but the weight takes {K} features")


def savable(bias: Tensor) -> Tensor:
    """The bias, dense, and what backward can keep: bitsandbytes casts a frozen layer's under inference_mode too."""
    copies = torch.is_grad_enabled() and not torch.compiler.is_compiling() and bias.is_inference()
    return bias.clone() if copies else bias.contiguous()


def check_frozen(weight: Tensor, bias: Tensor | None, N: int) -> None:
    """The frozen part must fit and must not ask for gradients that would silently not come."""
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [{N}], got {tuple(bias.shape)}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("weight and bias are frozen in MoDA but require grad; call requires_grad_(False) on them")


def check_lines(x: Tensor, lines: set[int]) -> None:
    """Without ids there must be one line of gates for all rows, or one per row."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    for given in lines - {1, rows}:
        raise ValueError(f"without modality_ids gates must have 1 or {rows} lines (one per row of x), got {given}")
