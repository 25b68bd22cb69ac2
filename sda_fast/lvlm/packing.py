"""Sequences one after another in one row, without padding: variable-length attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch

from sda_fast.lvlm.family import family_of
from sda_fast.lvlm.load import LVLM

logger = logging.getLogger(__name__)

FLASH_ATTENTION = "flash_attention_2"
Packing = Literal["auto", "on", "off"]


def pack(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A padded batch as one row of its N unmasked tokens.

    Positions restart with every sequence and there is no mask; from that transformers makes attention within each
    sequence alone: variable-length in flash attention, a block-diagonal mask elsewhere.

    Args:
        batch: from `collate_images` or `collate_texts`.

    Returns:
        The tensors [B, T, ...] as [1, N, ...]; position_ids [1, N], or [4, 1, N] with the plain positions first for
        models with three axes; lengths [B] int64 in place of attention_mask; the rest as it is.
    """
    mask = batch["attention_mask"].bool()
    packed = {}
    for name, tensor in batch.items():
        if name == "position_ids" and tensor.dim() == 3:
            plain = (mask.long().cumsum(-1) - 1)[None]
            packed[name] = torch.cat([plain, tensor])[:, mask][:, None]
        elif tensor.shape[:2] == mask.shape:
            packed[name] = tensor[mask][None]
        else:
            packed[name] = tensor
    del packed["attention_mask"]
    return packed | {"lengths": mask.sum(-1)}


def pool_packed(hidden_states: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of each sequence of a packed row over the tokens of a mask.

    Args:
        hidden_states: [1, N, D], any float dtype.
        mask: [1, N] bool, at least one set in each sequence.
        lengths: [B] int64, tokens of the sequences, in their order.

    Returns:
        [B, D] float32, summed in float32 without a float32 copy of hidden_states.
    """
    sizes = lengths.tolist()
    rows = hidden_states[0].masked_fill(~mask[0, :, None], 0).split(sizes)
    counts = torch.stack([own.sum() for own in mask[0].split(sizes)])
    return torch.stack([own.sum(0, dtype=torch.float32) for own in rows]) / counts[:, None]


def attention_for(packing: Packing, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The attention with which a model is to be loaded: flash attention where it can pack, else transformers' default.

    Raises:
        ValueError: no such choice.
    """
    if packing not in ("auto", "on", "off"):
        raise ValueError(f"packing must be auto, on or off, got {packing!r}")
    return FLASH_ATTENTION if packing != "off" and flash_attention_fits(config, device, dtype) else None


def flash_attention_fits(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn is installed and takes this model: 16-bit, on a GPU, and without masks of the model's own."""
    from transformers import MODEL_MAPPING
    from transformers.utils import is_flash_attn_2_available

    model_class = MODEL_MAPPING.get(type(config), None)
    return (
        is_flash_attn_2_available()
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and family_of(config).flash_attention
        and bool(getattr(model_class, "_supports_flash_attn", False))
    )


def packed_modalities(packing: Packing, lvlm: LVLM) -> tuple[str, ...]:
    """The modalities whose sequences are to be packed; "auto" packs where the model was loaded with flash attention."""
    flash = lvlm.model.config._attn_implementation == FLASH_ATTENTION
    if packing == "off" or (packing == "auto" and not flash):
        return ()
    if not flash:
        logger.warning(
            "packing without flash attention: the result is the same, but attention takes memory and time as the "
            "square of all tokens of a chunk"
        )
    return lvlm.family.packs
