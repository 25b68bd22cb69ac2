"""Figures of graphics cards as their makers publish them, and the share of them that a step is assumed to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1024**3

# Assumed, not measured: what large products and passes over memory reach in practice, and the cost of one launch.
PRODUCT_EFFICIENCY = 0.65
BANDWIDTH_EFFICIENCY = 0.80
SECONDS_PER_LAUNCH = 5e-6


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        memory: GiB.
        tflops: dense bfloat16 tensor-core TFLOP/s with float32 accumulation.
        bandwidth: GB/s of device memory.
        multiprocessors: how many; launches are sized by it.
        source: the document that the figures are from.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    multiprocessors: int
    source: str

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Time of one operation: the longest of its products, its memory traffic and its launch."""
        return max(
            flops / (self.tflops * 1e12 * PRODUCT_EFFICIENCY),
            num_bytes / (self.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY),
            SECONDS_PER_LAUNCH,
        )


_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper; RTX 3060 product page"
_ADA = "NVIDIA Ada GPU Architecture whitepaper; product page"
CARDS = {
    card.name: card
    for card in (
        Card("RTX 3060 12GB", 12, 25.6, 360, 28, _GA102),
        Card("RTX 3090", 24, 71.2, 936, 82, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
        Card("RTX 4060 Ti 16GB", 16, 44.1, 288, 34, _ADA),
        Card("RTX 4070", 12, 58.3, 504, 46, _ADA),
        Card("RTX 4090", 24, 165.2, 1008, 128, _ADA),
        Card("A100 40GB", 40, 312, 1555, 108, "NVIDIA A100 Tensor Core GPU datasheet"),
        Card("A100 80GB", 80, 312, 2039, 108, "NVIDIA A100 Tensor Core GPU datasheet (SXM)"),
        Card("H100 SXM", 80, 989, 3350, 132, "NVIDIA H100 Tensor Core GPU datasheet, without sparsity"),
        Card("H200 SXM", 141, 989, 4800, 132, "NVIDIA H200 Tensor Core GPU datasheet, without sparsity"),
    )
}


# Words in a device's name that tell it from the card whose name it holds otherwise.
OTHER_KINDS = {"ti", "super", "laptop", "mobile", "max", "pcie", "nvl"}


def card_named(name: str) -> Card:
    """The card whose name holds the given words, whatever their case.

    Raises:
        ValueError: none does, or several do; the message lists the cards.
    """
    wanted = name.lower().split()
    found = [card for card in CARDS.values() if all(word in card.name.lower().split() for word in wanted)]
    if len(found) != 1:
        what = "no card" if not found else "several cards"
        raise ValueError(f"{what} match {name!r}; the cards are {', '.join(CARDS)}")
    return found[0]


def card_of_device(device: str, memory: int) -> Card:
    """The card that a driver's name of a device means, such as "NVIDIA H100 80GB HBM3".

    Args:
        memory: bytes; of several cards of that name the nearest is taken.

    Raises:
        ValueError: it is none of the cards here, or a slower kind of one.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))

    def is_meant(card: Card) -> bool:
        model = {word for word in card.name.lower().split() if word != "sxm" and not word.endswith("gb")}
        return model <= words and not (words - model) & OTHER_KINDS

    found = [card for card in CARDS.values() if is_meant(card)]
    if not found:
        raise ValueError(f"no card matches {device!r}; the cards are {', '.join(CARDS)}")
    return min(found, key=lambda card: abs(card.memory * GIB - memory))
