"""What an adapted model is made of: one frozen record, written beside the adapter's weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class MoDAConfig:
    """Modality-disentangled adaptation (arXiv 2512.06883): which layers, how many experts, what rank.

    Attributes:
        r: total rank of a layer, shared out evenly over its experts.
        num_experts: E, must divide r; 1 is plain LoRA.
        num_modalities: how many modalities the gates know.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input element on its way to A, in training.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        gate_dim: width of the gates' modality embedding.
        target_modules: "all-linear" (every linear layer of the language model), a tuple of name suffixes within the
            language model, or a regular expression that must match a layer's whole name, anywhere in the model.
        exclude_modules: name suffixes, or a regular expression, of layers to leave out.
        modality_names: names for `modality("...")`; the position is the id.
        adapter_dtype: "float32" or "bfloat16", the dtype of the adapter's parameters.
        seed: of the parameters' initial values.
    Raises:
        ValueError: a value is out of range.
    """

    r: int = 8
    num_experts: int = 8
    num_modalities: int = 2
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    use_rslora: bool = False
    gate_dim: int = 64
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = None
    modality_names: tuple[str, ...] = ("image", "text")
    adapter_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modality_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = self.r, self.num_experts, self.num_modalities
        check_sizes(*sizes, self.lora_dropout, self.gate_dim, self.modality_names)
        if self.adapter_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"adapter_dtype must be 'float32' or 'bfloat16', got {self.adapter_dtype!r}")

    @property
    def scaling(self) -> float:
        """What the low-rank update is multiplied by: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def check_sizes(
    r: int,
    num_experts: int,
    num_modalities: int,
    lora_dropout: float,
    gate_dim: int,
    modality_names: Sequence[str],
) -> None:
    """Raise ValueError unless the experts share the rank evenly and everything is in range."""
    if r < 1 or num_experts < 1 or r % num_experts != 0:
        raise ValueError(f"num_experts must divide the total rank r, got r={r} and num_experts={num_experts}")
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
    if gate_dim < 1:
        raise ValueError(f"gate_dim must be at least 1, got {gate_dim}")
    if len(modality_names) > num_modalities:
        raise ValueError(f"{len(modality_names)} modality_names for num_modalities={num_modalities}")
