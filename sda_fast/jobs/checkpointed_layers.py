"""Which layers of the decoder run again in backward (gradient checkpointing): all, or the first ones.

Backward begins with the last layer, so the layers that keep their activations are the last ones: theirs are gone before
the first layer that is recomputed needs room. The very last one keeps them for nothing, as recomputing it would make
them at once.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class CheckpointedLayers:
    """The layers of a decoder in the order that they run in, of which the first `count` are recomputed.

    Attributes:
        enabled: whether the decoder is under checkpointing at all; if not, `limit` means nothing.
    """

    def __init__(self, decoder: nn.Module, *, enabled: bool) -> None:
        self.enabled = enabled
        self.layers = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def count(self) -> int:
        return sum(bool(layer.gradient_checkpointing) for layer in self.layers)

    @property
    def are_all(self) -> bool:
        """Whether no further layer can be recomputed."""
        return not self.enabled or self.count == len(self.layers)

    def limit(self, count: int) -> None:
        """Recompute the first `count` layers.

        Raises:
            ValueError: there are fewer layers.
        """
        if not 0 <= count <= len(self.layers):
            raise ValueError(f"checkpointed_layers is {count} but the decoder has {len(self.layers)} layers")
        for place, layer in enumerate(self.layers):
            layer.gradient_checkpointing = place < count
