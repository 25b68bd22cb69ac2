"""Figures of graphics cards as their makers publish them, and the share of them that a step is assumed to reach."""

from __future__ import annotations

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
