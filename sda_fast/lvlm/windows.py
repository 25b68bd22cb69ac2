"""Attention within the windows and pictures of a Qwen tower, all those of one length in one call.

transformers hands a tower's patches and the ends of their windows to variable-length flash attention where that is
asked for, else it calls its attention once per window: thousands of calls for a batch of pictures, each too small to
keep a GPU busy. The function here takes the first way and needs nothing but PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SDPA = "sdpa"
# transformers tells by the word "flash" that an attention takes the ends of the windows.
WINDOWS_TOGETHER = "sda_fast_windows_as_flash"


@dataclass(frozen=True)
class WindowPlan:
    """Windows of a row of patches, by length.

    Attributes:
        groups: (windows, patches in each), one after another once the patches are put into `order`.
        order: [S] int64, which brings windows of one length side by side; None where they lie so already.
        inverse: [S] int64, the way back.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None


def plan_windows(ends: Tensor) -> WindowPlan:
    """The plan for windows given as [windows + 1] cumulative lengths from 0."""
    starts = ends.tolist()
    by_length: dict[int, list[int]] = {}
    for start, end in pairwise(starts):
        if end > start:
            by_length.setdefault(end - start, []).append(start)
    groups = tuple((len(firsts), length) for length, firsts in by_length.items())
    patches = [first + offset for length, firsts in by_length.items() for first in firsts for offset in range(length)]
    if patches == sorted(patches):
        return WindowPlan(groups, None, None)
    order = torch.tensor(patches, device=ends.device)
    return WindowPlan(groups, order, order.argsort())


# Every layer of a tower is given the same tensor of ends.
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def plan_of(ends: Tensor) -> WindowPlan:
    """`plan_windows`, made once per tensor."""
    if ends not in _plans:
        _plans[ends] = plan_windows(ends)
    return _plans[ends]


def attention_of_windows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of the patches of each window to each other, as transformers calls variable-length attention.

    Args:
        module: the attention layer.
        query, key, value: [1, heads, S, head size].
        attention_mask: None; the windows take its place.
        cu_seq_lens_q: [windows + 1] integers, the windows' cumulative lengths from 0 to S.
        dropout, scaling: as in scaled dot-product attention.

    Returns:
        ([1, S, heads, head size], None).

    Raises:
        ValueError: a mask was given.
    """
    if attention_mask is not None:
        raise ValueError(f"attention within windows takes no mask, got one of shape {tuple(attention_mask.shape)}")
    plan = plan_of(cu_seq_lens_q)
    inputs = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if plan.order is not None:
        inputs = [tensor.index_select(0, plan.order) for tensor in inputs]
    outputs = []
    first = 0
    for windows, length in plan.groups:
        last = first + windows * length
        q, k, v = (tensor[first:last].unflatten(0, (windows, length)).transpose(1, 2) for tensor in inputs)
        own = sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=False)[0]
        outputs.append(own.flatten(0, 1))
        first = last
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if plan.inverse is None else output.index_select(0, plan.inverse))[None], None


AttentionInterface.register(WINDOWS_TOGETHER, attention_of_windows)


@contextmanager
def windows_together(config: Any) -> Iterator[None]:
    """Within this block a tower whose configuration says "sdpa" attends to all windows of one length at once."""
    if config._attn_implementation != SDPA:
        yield
        return
    config._attn_implementation = WINDOWS_TOGETHER
    try:
        yield
    finally:
        config._attn_implementation = SDPA
