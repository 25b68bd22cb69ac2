"""MoDA's gates, softmax(gate_proj gate_embedding[m]), of layers that share x, and their gradients: one launch each way.

Sizes: E experts, D entries of a modality's embedding. Sums are float32 and run in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import triton.language as tl

from sda_fast.kernels.configs import cdiv, next_power_of_2
from sda_fast.kernels.group import filled, pointer_of
from sda_fast.kernels.launching import kernel, prepare

LARGEST_BLOCK_D, ELEMENTS_PER_TILE = 64, 2048
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@kernel
def gates_kernel(
    embedding_0_ptr,
    embedding_1_ptr,
    embedding_2_ptr,
    proj_0_ptr,
    proj_1_ptr,
    proj_2_ptr,
    gates_ptr,
    E,
    D,
    first_modality,
    LAYERS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer, line = tl.program_id(0), tl.program_id(1)
    embedding_ptr = pointer_of(layer, embedding_0_ptr, embedding_1_ptr, embedding_2_ptr, LAYERS)
    proj_ptr = pointer_of(layer, proj_0_ptr, proj_1_ptr, proj_2_ptr, LAYERS)
    experts = tl.arange(0, BLOCK_E)
    expert_mask = experts < E
    logits = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        entries = first + tl.arange(0, BLOCK_D)
        entry_mask = entries < D
        embedding = tl.load(embedding_ptr + (first_modality + line) * D + entries, mask=entry_mask, other=0.0)
        mask = expert_mask[:, None] & entry_mask[None, :]
        proj = tl.load(proj_ptr + experts[:, None] * D + entries[None, :], mask=mask, other=0.0)
        logits += tl.sum(proj.to(tl.float32) * embedding.to(tl.float32)[None, :], axis=1)
    logits = tl.where(expert_mask, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0))
    gates = powers / tl.sum(powers, axis=0)
    tl.store(gates_ptr + (layer * tl.num_programs(1) + line) * E + experts, gates, mask=expert_mask)


@kernel
def gates_backward_kernel(
    dgates_0_ptr,
    dgates_1_ptr,
    dgates_2_ptr,
    gates_0_ptr,
    gates_1_ptr,
    gates_2_ptr,
    embedding_0_ptr,
    embedding_1_ptr,
    embedding_2_ptr,
    proj_0_ptr,
    proj_1_ptr,
    proj_2_ptr,
    dembedding_ptr,
    dproj_ptr,
    E,
    D,
    modalities,
    first_modality,
    lines,
    LAYERS: tl.constexpr,
    NEEDS_EMBEDDING: tl.constexpr,
    NEEDS_PROJ: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(0)
    dgates_ptr = pointer_of(layer, dgates_0_ptr, dgates_1_ptr, dgates_2_ptr, LAYERS)
    gates_ptr = pointer_of(layer, gates_0_ptr, gates_1_ptr, gates_2_ptr, LAYERS)
    embedding_ptr = pointer_of(layer, embedding_0_ptr, embedding_1_ptr, embedding_2_ptr, LAYERS)
    proj_ptr = pointer_of(layer, proj_0_ptr, proj_1_ptr, proj_2_ptr, LAYERS)
    experts = tl.arange(0, BLOCK_E)
    entries = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert_mask, entry_mask = experts < E, entries < D
    mask = expert_mask[:, None] & entry_mask[None, :]
    offsets = experts[:, None] * D + entries[None, :]
    proj = tl.load(proj_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dproj = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for modality in range(0, modalities):
        line = tl.zeros((BLOCK_E,), dtype=tl.int32) + (modality - first_modality)
        wanted = expert_mask & (line >= 0) & (line < lines)
        gates = tl.load(gates_ptr + line * E + experts, mask=wanted, other=0.0)
        dgates = tl.load(dgates_ptr + line * E + experts, mask=wanted, other=0.0)
        dlogits = gates * (dgates - tl.sum(dgates * gates, axis=0))
        if NEEDS_EMBEDDING:
            dembedding = tl.sum(proj * dlogits[:, None], axis=0)
            dembedding_ptrs = dembedding_ptr + (layer * modalities + modality) * D + entries
            tl.store(dembedding_ptrs, dembedding.to(dembedding_ptr.dtype.element_ty), mask=entry_mask)
        if NEEDS_PROJ:
            embedding = tl.load(embedding_ptr + modality * D + entries, mask=entry_mask, other=0.0)
            dproj += dlogits[:, None] * embedding.to(tl.float32)[None, :]
    if NEEDS_PROJ:
        dproj_ptrs = dproj_ptr + layer * E * D + offsets
        tl.store(dproj_ptrs, dproj.to(dproj_ptr.dtype.element_ty), mask=mask)


def dense(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Dense tensors for the kernels' places."""
    return filled([tensor.contiguous() for tensor in tensors], None)


def blocks(experts: int, gate_dim: int) -> dict[str, int]:
    """Constants of the kernels for so many experts."""
    block_e = next_power_of_2(experts)
    block_d = min(next_power_of_2(gate_dim), LARGEST_BLOCK_D, max(16, ELEMENTS_PER_TILE // block_e))
    return {"BLOCK_E": block_e, "BLOCK_D": block_d}


@functools.lru_cache(maxsize=256)
def prepare_gates(layers: int, lines: int, experts: int, gate_dim: int, first_modality: int) -> Callable[..., None]:
    constants = {"LAYERS": layers, **blocks(experts, gate_dim), **OPTIONS}
    return prepare(gates_kernel, (layers, lines), (experts, gate_dim, first_modality), constants)


@functools.lru_cache(maxsize=256)
def prepare_gates_backward(
    layers: int,
    lines: int,
    experts: int,
    gate_dim: int,
    modalities: int,
    first_modality: int,
    needs_embedding: bool,
    needs_proj: bool,
) -> Callable[..., None]:
    constants = {"LAYERS": layers, "NEEDS_EMBEDDING": needs_embedding, "NEEDS_PROJ": needs_proj}
    constants |= {**blocks(experts, gate_dim), **OPTIONS}
    numbers = (experts, gate_dim, modalities, first_modality, lines)
    return prepare(gates_backward_kernel, (layers, cdiv(gate_dim, constants["BLOCK_D"])), numbers, constants)


def gates_of_layers(
    embeddings: Sequence[torch.Tensor], projs: Sequence[torch.Tensor], first_modality: int, lines: int
) -> list[torch.Tensor]:
    """The gates of up to LAYERS_PER_LAUNCH layers.

    Args:
        embeddings: [modalities, D] each, float32, float16 or bfloat16; all of one shape and dtype.
        projs: [E, D] each, likewise.
        first_modality, lines: whose gates are wanted.
    Returns:
        [lines, E] each, float32.
    """
    layers, (experts, gate_dim) = len(projs), projs[0].shape
    gates = torch.empty(layers, lines, experts, dtype=torch.float32, device=projs[0].device)
    if gates.numel():
        launch = prepare_gates(layers, lines, experts, gate_dim, first_modality)
        launch(*dense(embeddings), *dense(projs), gates)
    return list(gates.unbind(0))


def gates_backward_of_layers(
    dgates: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    embeddings: Sequence[torch.Tensor],
    projs: Sequence[torch.Tensor],
    first_modality: int,
    *,
    needs_embedding: bool,
    needs_proj: bool,
) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
    """Gradients of every embedding and proj, in their shapes and dtypes, None where not asked for.

    Args:
        dgates, gates: [lines, E] float32 each, the gradients and what `gates_of_layers` gave.
        embeddings, projs, first_modality: as there.
    """
    layers, (experts, gate_dim) = len(projs), projs[0].shape
    modalities, lines = embeddings[0].shape[0], gates[0].shape[0]
    dembeddings = embeddings[0].new_empty(layers, modalities, gate_dim) if needs_embedding else None
    dprojs = projs[0].new_empty(layers, experts, gate_dim) if needs_proj else None
    launch = prepare_gates_backward(
        layers, lines, experts, gate_dim, modalities, first_modality, needs_embedding, needs_proj
    )
    launch(*dense(dgates), *dense(gates), *dense(embeddings), *dense(projs), dembeddings, dprojs)
    return tuple(None if one is None else list(one.unbind(0)) for one in (dembeddings, dprojs))  # type: ignore[return-value]
