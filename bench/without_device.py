"""Triton without a GPU: everything on the host's side of a launch happens, the launch itself does not."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoDevice:
    """A driver for Triton that compiles for a chip and records launches in place of making them.

    Attributes:
        launches: of each, in order: grid, the compiled kernel's handle, and the arguments.
        device: the current one's number.
    """

    def __init__(self, capability: int = 90, multiprocessors: int = 132) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.multiprocessors = multiprocessors
        self.keeps, self.launches = False, []  # type: ignore[var-annotated]
        self.device = 0
        self.utils = self
        self.handles = 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments = rest
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if self.keeps:
            self.launches.append(((x, y, z), function, packed_metadata, arguments))
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        self.handles += 1
        return self.handles, self.handles, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": self.multiprocessors}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def without_device() -> NoDevice:
    """Make such a driver the one that Triton uses in this process; tensors may be on the CPU."""
    found = NoDevice()
    driver.set_active(found)
    return found
