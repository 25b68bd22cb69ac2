"""MoDALinear: a frozen linear layer, float or 4-bit, with a mixture of low-rank experts chosen by modality."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sda_fast.moda.adapted import apply_group
from sda_fast.moda.config import check_sizes
from sda_fast.moda.context import current_modality
from sda_fast.moda.fold import FoldableLayer, check_kept
from sda_fast.moda.shared import SharedInput
from sda_fast.ops.gates import GateParameters, moda_gates
from sda_fast.ops.moda_group import BACKENDS
from sda_fast.ops.quantized import layer_kind

ADAPTER_PARAMETERS = ("lora_A", "lora_B", "gate_embedding", "gate_proj")
ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INITIAL_STD_OF_A = 0.01
DEFAULT_NAMES = ("image", "text")


class MoDALinear(FoldableLayer):
    """y = x W^T + bias + scaling * sum over experts e of gate_e(modality) * B_e A_e dropout(x) (arXiv 2512.06883).

    The gate is softmax(gate_proj gate_embedding[modality]). A starts as N(0, 0.01), read as a standard deviation of
    0.01 (about what LoRA's usual uniform start has for 3584 inputs); B starts at zero, so that the layer starts as the
    frozen one. gate_embedding starts as N(0, 1), gate_proj as U(-1, 1) / sqrt(gate_dim), the defaults of nn.Embedding
    and nn.Linear. In evaluation, without gradients and with one modality for the whole pass, the update may be folded
    into the weight (docs/folding.md).

    Args:
        base_layer: nn.Linear or bitsandbytes Linear4bit; its parameters are frozen here.
        r: total rank R, shared out evenly over the experts.
        num_experts: E, must divide r; 1 is plain LoRA.
        num_modalities: how many modalities the gate knows.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: probability of dropping an element of x on its way to A, in training.
        gate_dim: width of the modality embedding.
        modality_names: names that `sda_fast.modality` may use; ("image", "text") for up to two modalities by default.
        adapter_dtype: float32 or bfloat16 (float64 for tests); x is never upcast to it.
        backend: "auto", "triton" or "torch", as in `moda_linear`.
        cache_folded: keep folded weights between passes, see `FoldableLayer`; `fold_model` sets it later.
        generator: a CPU generator for the initial values.
    Raises:
        TypeError: base_layer is neither kind of layer.
        ValueError: sizes do not fit, there are more names than modalities, cache_folded is no modality, or
            adapter_dtype or backend is none of these.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gate_embedding: nn.Parameter
    gate_proj: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int = 8,
        num_experts: int = 8,
        num_modalities: int = 2,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        gate_dim: int = 64,
        modality_names: Sequence[str] | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        cache_folded: bool | str | int = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if layer_kind(base_layer) is None:
            raise TypeError(
                f"base_layer must be nn.Linear or bitsandbytes Linear4bit, got {type(base_layer).__module__}."
                f"{type(base_layer).__name__}"
            )
        if modality_names is None:
            modality_names = DEFAULT_NAMES[:num_modalities]
        check_sizes(r, num_experts, num_modalities, lora_dropout, gate_dim, modality_names)
        if adapter_dtype not in ADAPTER_DTYPES:
            raise ValueError(f"adapter_dtype must be one of {ADAPTER_DTYPES}, got {adapter_dtype}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        base_layer.requires_grad_(False)
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.r = r
        self.num_experts = num_experts
        self.num_modalities = num_modalities
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.modality_names = tuple(modality_names)
        self.backend = backend
        if not isinstance(cache_folded, bool):
            check_kept(cache_folded, self.modality_names, num_modalities)
        self.cache_folded = cache_folded
        self.shared_input: SharedInput | None = None
        values = initial_values(
            self.in_features,
            self.out_features,
            r=r,
            num_experts=num_experts,
            num_modalities=num_modalities,
            gate_dim=gate_dim,
            generator=generator,
        )
        device: torch.device = self.weight.device
        for name, value in zip(ADAPTER_PARAMETERS, values, strict=True):
            self.register_parameter(name, nn.Parameter(value.to(device=device, dtype=adapter_dtype)))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the layer's users know it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def gates(self, modality: int | None = None) -> Tensor:
        """The mixture of one modality, [1, E], or of all, [num_modalities, E]; rows sum to one, float32 or wider."""
        return moda_gates(*self.gate_parameters(), modality)

    def gate_parameters(self) -> GateParameters:
        """What the gates are made from."""
        return GateParameters(self.gate_embedding, self.gate_proj)

    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that is trained."""
        return self.lora_A, self.lora_B, self.gate_embedding, self.gate_proj

    def forward(self, x: Tensor, modality_ids: Tensor | Sequence[int] | int | None = None) -> Tensor:
        """The adapted layer.

        Args:
            x: [..., in_features].
            modality_ids: one id, one per sequence or one per token; those of the `modality` block around if absent.
        Returns:
            [..., out_features] in x's dtype (autocast's dtype under autocast).
        Raises:
            NoModalityError: no ids were given and no modality is set.
        """
        if modality_ids is None:
            active = current_modality()
            if not torch.compiler.is_compiling() and self.shared_input is not None:
                y = self.shared_input.take(self, x, active)
                if y is not None:
                    return y
            modality_ids = active.resolve(self.modality_names, self.num_modalities, x.device)
        return apply_group([self], x, modality_ids)[0]

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, num_experts={self.num_experts}, num_modalities={self.num_modalities}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, backend={self.backend}"
        )


def initial_values(
    in_features: int,
    out_features: int,
    *,
    r: int,
    num_experts: int,
    num_modalities: int,
    gate_dim: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lora_A, lora_B, gate_embedding, gate_proj as they start (see `MoDALinear`), drawn on the CPU for every device."""
    bound = 1 / math.sqrt(gate_dim)
    return (
        torch.randn(r, in_features, generator=generator) * INITIAL_STD_OF_A,
        torch.zeros(out_features, r),
        torch.randn(num_modalities, gate_dim, generator=generator),
        torch.rand(num_experts, gate_dim, generator=generator) * (2 * bound) - bound,
    )
