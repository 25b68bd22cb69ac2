"""The table of batches on which contrastive losses are measured, and what a method is expected to need on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baselines import cmsa as baselines
from sda_fast import cmsa_loss, infonce_loss

Loss = baselines.Loss


@dataclass(frozen=True)
class Method:
    """A way to compute a loss.

    Attributes:
        make: gives the function (x, y, temperature) -> scalar.
        bytes_per_pair: float32 memory per pair of items at its peak, for those that keep B x B matrices (measured once
            at 16384 items); the guess keeps a benchmark from running a machine out of memory.
    """

    make: Callable[[], Loss]
    bytes_per_pair: float = 0.0


CMSA, INFONCE = "CMSA", "InfoNCE"
OURS, PLAIN = "ours", {CMSA: "plain PyTorch", INFONCE: "as in open_clip"}
METHODS: dict[str, dict[str, Method]] = {
    CMSA: {
        OURS: Method(lambda: cmsa_loss),
        PLAIN[CMSA]: Method(lambda: baselines.plain_cmsa, 36),
        "torch.compile": Method(baselines.compiled_cmsa, 30),
        "checkpointed chunks": Method(lambda: baselines.checkpointed_cmsa),
    },
    INFONCE: {OURS: Method(lambda: infonce_loss), PLAIN[INFONCE]: Method(lambda: baselines.plain_infonce, 24)},
}
# Operations a step cannot do without, over B^2 D: the products of L, half of the symmetric S, and of their gradients.
FLOOR = {CMSA: 12, INFONCE: 6}
ITEMS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
DIMENSIONS = (768, 1536, 3584)


@dataclass(frozen=True)
class Case:
    loss: str
    B: int
    D: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.loss}, B={self.B}, D={self.D}, {str(self.dtype).removeprefix('torch.')}"

    def floor_operations(self) -> int:
        return FLOOR[self.loss] * self.B**2 * self.D

    def expected_bytes(self, method: str) -> float:
        return METHODS[self.loss][method].bytes_per_pair * self.B**2 * self.dtype.itemsize / 4


def cases(device: str, *, quick: bool, items: tuple[int, ...] = (), dimensions: tuple[int, ...] = ()) -> list[Case]:
    """The cases of a device, small ones first; bfloat16 on a GPU, float32 on a CPU.

    Args:
        quick: the short table, for whatever of `items` and `dimensions` is not given.
    Raises:
        ValueError: a size is too small for a contrastive loss.
    """
    if any(B < 2 for B in items) or any(D < 1 for D in dimensions):
        raise ValueError(f"items must be at least 2 and dimensions at least 1, got {items} and {dimensions}")
    if not items:
        items = ((1024, 8192, 65536) if device == "cuda" else ITEMS[:5]) if quick else ITEMS
    if not dimensions:
        dimensions = ((768, 3584) if device == "cuda" else (768,)) if quick else DIMENSIONS
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [Case(loss, B, D, dtype) for D in dimensions for loss in METHODS for B in sorted(items)]
