"""Layers that read the same x (q, k, v; gate, up) computed by one operation, without their model knowing.

A `SharedInputGroup` hangs as forward hooks on the module that calls the layers. For the length of that module's forward
every layer of the group holds one `SharedInput`: the first layer to be called computes all outputs, its siblings take
theirs if they are called with the very same tensor. Nothing outlives the module's forward.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast.moda.adapted import AdaptedLayer, apply_group
from sda_fast.moda.context import ActiveModality
from sda_fast.ops.held import version_of

logger = logging.getLogger(__name__)


class SharedInput:
    """The outputs that the layers of one group owe each other during one forward of their parent."""

    def __init__(self, layers: list[AdaptedLayer]) -> None:
        self.layers = layers
        self.thread = threading.get_ident()
        self.started = False
        self.mismatched = False
        self.outputs: list[Tensor | None] = []
        self.x: Tensor | None = None
        self.version = 0
        self.active: ActiveModality | None = None
        self.grad_enabled = False

    def take(self, layer: AdaptedLayer, x: Tensor, active: ActiveModality) -> Tensor | None:
        """The layer's output for x, or None if it has to compute it alone."""
        if threading.get_ident() != self.thread:
            return None
        position = [member is layer for member in self.layers].index(True)
        if not self.started:
            self.started = True
            if not self.compatible():
                return None
            self.compute(x, active)
        elif not self.matches(x, active) or not self.outputs or self.outputs[position] is None:
            self.mismatched = self.mismatched or (bool(self.outputs) and x is not self.x)
            self.clear()
            return None
        y = self.outputs[position]
        self.outputs[position] = None
        if all(output is None for output in self.outputs):
            self.clear()
        return y

    def compatible(self) -> bool:
        """Whether one operation can serve all layers as they are now."""
        first = self.layers[0]
        return all(
            layer.training == first.training
            and layer.lora_dropout == first.lora_dropout
            and layer.backend == first.backend
            and layer.modality_names == first.modality_names
            for layer in self.layers
        )

    def compute(self, x: Tensor, active: ActiveModality) -> None:
        first = self.layers[0]
        modalities = min(layer.num_modalities for layer in self.layers)
        ids = active.resolve(first.modality_names, modalities, x.device)
        self.outputs = list(apply_group(self.layers, x, ids))
        self.x, self.active, self.grad_enabled = x, active, torch.is_grad_enabled()
        self.version = version_of(x)

    def matches(self, x: Tensor, active: ActiveModality) -> bool:
        return (
            x is self.x
            and active is self.active
            and torch.is_grad_enabled() == self.grad_enabled
            and version_of(x) == self.version
        )

    def clear(self) -> None:
        self.outputs, self.x, self.active = [], None, None


class SharedInputGroup:
    """The hooks on a parent module; holds names only, so that copies of the module have a group of their own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.disabled = False

    def begin(self, parent: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: hand every layer the same fresh SharedInput."""
        if torch.compiler.is_compiling() or self.disabled:
            return
        layers: list[Any] = [getattr(parent, name) for name in self.names]
        if not all(hasattr(layer, "shared_input") for layer in layers):
            return
        shared = SharedInput(layers)
        for layer in layers:
            layer.shared_input = shared

    def end(self, parent: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, called after an error too."""
        if torch.compiler.is_compiling():
            return
        for name in self.names:
            layer: Any = getattr(parent, name)
            shared = getattr(layer, "shared_input", None)
            if shared is not None:
                layer.shared_input = None
                shared.clear()
                if shared.mismatched and not self.disabled:
                    self.disabled = True
                    logger.info("%s of %s do not share their input", ", ".join(self.names), type(parent).__name__)

    def attach(self, parent: nn.Module) -> None:
        """Register the hooks on the module that calls the layers.

        They are entered under a key of our own: the numbers that `register_forward_hook` gives out differ from module
        to module, and torch.compile would compile every layer of a model anew for that.
        """
        key: Any = f"sda_fast {' '.join(self.names)}"
        parent._forward_pre_hooks[key] = self.begin
        parent._forward_hooks[key] = self.end
        parent._forward_hooks_always_called[key] = True
