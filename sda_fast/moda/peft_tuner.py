"""MoDA as a PEFT method: `get_peft_model(model, MoDAPeftConfig(...))`, `PeftModel.from_pretrained`, several adapters.

Importing this module enters the method into PEFT's tables under the type "MODA"; nothing of PEFT is changed. Adapters
written by `sda_fast.save_adapter` and by `PeftModel.save_pretrained` are the same files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from sda_fast.moda.adapted import apply_frozen, apply_group
from sda_fast.moda.config import ALL_LINEAR, MoDAConfig, check_sizes
from sda_fast.moda.context import current_modality
from sda_fast.moda.fold import FoldableLayer
from sda_fast.moda.inject import share_inputs, target_layers
from sda_fast.moda.linear import initial_values
from sda_fast.moda.save import PEFT_TYPE
from sda_fast.moda.shared import SharedInput
from sda_fast.ops.gates import GateParameters, moda_gates

PARAMETERS = ("moda_A", "moda_B", "moda_gate_embedding", "moda_gate_proj")
BASE_LAYER_SUFFIX = ".base_layer"


@dataclass
class MoDAPeftConfig(PeftConfig):
    """`MoDAConfig` in PEFT's manner; the fields mean the same, lists stand for tuples.

    Raises:
        ValueError: a value is out of range.
    """

    r: int = field(default=8, metadata={"help": "total rank of a layer, shared out evenly over its experts"})
    num_experts: int = field(default=8, metadata={"help": "experts per layer; must divide r"})
    num_modalities: int = field(default=2, metadata={"help": "how many modalities the gates know"})
    lora_alpha: float = field(default=32, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on the adapters' input, in training"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r) instead"})
    gate_dim: int = field(default=64, metadata={"help": "width of the gates' modality embedding"})
    target_modules: str | list[str] | None = field(
        default=ALL_LINEAR, metadata={"help": "all-linear: those of the language model; else names or an expression"}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "layers to leave out"})
    modality_names: list[str] = field(default_factory=lambda: ["image", "text"], metadata={"help": "for modality(...)"})
    adapter_dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    seed: int = field(default=0, metadata={"help": "of the initial values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        sizes = self.r, self.num_experts, self.num_modalities
        check_sizes(*sizes, self.lora_dropout, self.gate_dim, self.modality_names)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class MoDATunerLayer(FoldableLayer, BaseTunerLayer):
    """A frozen linear layer with named MoDA adapters, one of them active; computes as `MoDALinear` does."""

    adapter_layer_names = PARAMETERS
    other_param_names = ("configs",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MoDAPeftConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        for name in PARAMETERS:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, MoDAPeftConfig] = {}
        self.backend = "auto"
        self.shared_input: SharedInput | None = None
        self.update_layer(adapter_name, config, generator)

    def update_layer(self, adapter_name: str, config: MoDAPeftConfig, generator: torch.Generator) -> None:
        """Add an adapter, or replace the one of that name."""
        values = initial_values(
            self.in_features,
            self.out_features,
            r=config.r,
            num_experts=config.num_experts,
            num_modalities=config.num_modalities,
            gate_dim=config.gate_dim,
            generator=generator,
        )
        dtype: torch.dtype = getattr(torch, config.adapter_dtype)
        device: torch.device = self.get_base_layer().weight.device  # type: ignore[assignment]
        for name, value in zip(PARAMETERS, values, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(value.to(device=device, dtype=dtype))
        self.configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_name(self) -> str | None:
        """The adapter that computes now, None if there is none or adapters are disabled."""
        active = [name for name in self.active_adapters if name in self.configs]
        if self.disable_adapters or not active:
            return None
        if len(active) > 1:
            raise ValueError(f"MoDA computes with one adapter at a time, but {', '.join(active)} are active")
        return active[0]

    def _active(self, name: str) -> Any:
        active = self.active_name
        if active is None:
            state = "disabled" if self.disable_adapters else "none of them is active"
            raise ValueError(f"the layer's adapters ({', '.join(self.configs) or 'none'}) do not compute now: {state}")
        return getattr(self, name)[active]

    # From here to adapter_tensors: what makes it an AdaptedLayer.
    @property
    def lora_A(self) -> Tensor:
        return self._active("moda_A")

    @property
    def lora_B(self) -> Tensor:
        return self._active("moda_B")

    @property
    def scaling(self) -> float:
        return self._active("configs").scaling

    @property
    def lora_dropout(self) -> float:
        return self._active("configs").lora_dropout

    @property
    def num_modalities(self) -> int:
        return self._active("configs").num_modalities

    @property
    def modality_names(self) -> tuple[str, ...]:
        return tuple(self._active("configs").modality_names)

    def gates(self, modality: int | None = None) -> Tensor:
        """The active adapter's mixture of one modality, [1, E], or of all, [num_modalities, E]."""
        return moda_gates(*self.gate_parameters(), modality)

    def gate_parameters(self) -> GateParameters:
        """What the active adapter's gates are made from."""
        return GateParameters(self._active("moda_gate_embedding"), self._active("moda_gate_proj"))

    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that is trained of the active adapter."""
        lora_A, lora_B, gate_embedding, gate_proj = (self._active(name) for name in PARAMETERS)
        return lora_A, lora_B, gate_embedding, gate_proj

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `MoDALinear.forward`; the frozen layer alone while adapters are disabled."""
        if self.active_name is None:
            return apply_frozen(self, x)
        modality = current_modality()
        if self.shared_input is not None:
            y = self.shared_input.take(self, x, modality)
            if y is not None:
                return y
        ids = modality.resolve(self.modality_names, self.num_modalities, x.device)
        return apply_group([self], x, ids)[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always an error: one merged weight cannot serve several modalities."""
        raise NotImplementedError(
            "a MoDA adapter is a different update for each modality; `sda-fast export` writes one LoRA or one merged "
            "model per modality"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class MoDATuner(BaseTuner):
    """Puts `MoDATunerLayer`s into a model for PEFT."""

    prefix = "moda_"
    tuner_layer_cls = MoDATunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules in (None, ALL_LINEAR):
            names = target_layers(self.model, MoDAConfig(exclude_modules=peft_config.exclude_modules))
            peft_config.target_modules = {name.removesuffix(BASE_LAYER_SUFFIX) for name in names}
        self._generator = torch.Generator().manual_seed(peft_config.seed)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoDATunerLayer):
            target.update_layer(adapter_name, peft_config, self._generator)
            return
        layer = MoDATunerLayer(target, adapter_name, peft_config, self._generator)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        for parent in model.modules():
            share_inputs(parent)


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoDAPeftConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoDATuner  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MoDATuner.prefix  # type: ignore[index]
