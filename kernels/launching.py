"""Kernels that remember what their launches compiled to.

`triton.jit` looks at every argument of every launch, with its own rules and the environment's switches, to find the
binary that belongs to it: 40 to 60 microseconds of the host's time for kernels with as many arguments as ours, longer
than many of them run. A `Kernel` finds it by the arguments' types and values, and asks Triton when it meets new ones.
Where a launch is made again and again with other pointers, `prepare` leaves only these to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Every number of rows is an entry; one takes about a kilobyte.
LARGEST_NUMBER_OF_LAUNCHES = 4096
POINTER_ALIGNMENT = 16


class Binary(NamedTuple):
    """What a launch needs of a compiled kernel."""

    compiled: CompiledKernel
    run: Callable[..., None]
    function: Any
    packed_metadata: Any


class Kernel(JITFunction[Any]):
    """A `triton.jit` function whose repeated launches cost the host little.

    What is remembered of a launch tells apart all that Triton does: dtype and alignment of each pointer, the value of
    every number, constants and options, and the device. Switches of Triton that change in a running process
    (TRITON_DEBUG, hooks that choose compiler passes) count for new launches only. Parameters must be pointers, named
    `..._ptr`, then numbers, then constants.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.constants = [self.arg_names[place] for place in self.constexprs]
        self.number_of_pointers = sum(name.endswith("_ptr") for name in self.arg_names)
        pointers_last = not all(name.endswith("_ptr") for name in self.arg_names[: self.number_of_pointers])
        if pointers_last or self.arg_names[len(self.arg_names) - len(self.constants) :] != self.constants:
            raise ValueError(f"{function.__name__} must take pointers, then numbers, then constants")
        self.launches: dict[tuple[Any, ...], PreparedLaunch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch on the device of the tensors and its current stream.

        Args:
            grid: number of programs, up to three sizes.
            arguments: pointers and numbers, in the kernel's order.
            constants: the kernel's constants and Triton's options.
        """
        pointers, numbers = arguments[: self.number_of_pointers], arguments[self.number_of_pointers :]
        key = (grid, *map(type, numbers), *numbers, *constants.items())
        prepared = self.launches.get(key)
        if prepared is None:
            if len(self.launches) >= LARGEST_NUMBER_OF_LAUNCHES:
                self.launches.clear()
            prepared = self.launches[key] = PreparedLaunch(self, grid, numbers, constants)
        prepared(*pointers)


class PreparedLaunch:
    """A launch that lacks its pointers only; `Kernel` says what it remembers."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, ...], numbers: Sequence[Any], constants: Mapping[str, Any]
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, tuple(numbers), dict(constants)
        self.sizes = (*grid, 1, 1)[:3]
        self.after_pointers = (*numbers, *(constants[name] for name in kernel.constants))
        self.binaries: dict[tuple[Any, ...], Binary] = {}

    def __call__(self, *pointers: torch.Tensor | None) -> None:
        """Launch on the device of the tensors and its current stream."""
        active = driver.active
        device = active.get_current_device()
        for one in pointers:
            if one is not None:
                home = one.get_device()
                if home != device and home >= 0:
                    # A layer may lie on another device than the current one.
                    with torch.cuda.device(home):
                        return self(*pointers)
                break
        key = (
            device,
            *[None if one is None else (one.dtype, one.data_ptr() % POINTER_ALIGNMENT) for one in pointers],
        )
        known = self.binaries.get(key)
        if known is None:
            arguments = (*pointers, *self.numbers)
            compiled = self.kernel.run(*arguments, grid=self.grid, warmup=False, **self.constants)
            # A hook of Triton's may have taken the compilation over.
            if isinstance(compiled, CompiledKernel):
                self.binaries[key] = Binary(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        elif is_watched(knobs.runtime.launch_enter_hook) or is_watched(knobs.runtime.launch_exit_hook):
            known.compiled[self.sizes](*pointers, *self.after_pointers)
        else:
            stream = active.get_current_stream(device)
            nobody = (None, None, None)
            known.run(
                *self.sizes, stream, known.function, known.packed_metadata, *nobody, *pointers, *self.after_pointers
            )


def is_watched(hook: Any) -> bool:
    """Whether somebody wants to be called at launches: a profiler, say."""
    return hook is not None and bool(getattr(hook, "calls", True))


def prepare(
    kernel: Any, grid: tuple[int, ...], numbers: Sequence[Any], constants: Mapping[str, Any]
) -> Callable[..., None]:
    """A launch that is called with the kernel's pointers; to be kept by whoever makes it again."""
    if isinstance(kernel, Kernel):
        return PreparedLaunch(kernel, grid, numbers, constants)
    return lambda *pointers: kernel[grid](*pointers, *numbers, **constants)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator in place of `triton.jit` for kernels that the host launches."""
    return triton.jit(function) if knobs.runtime.interpret else Kernel(function)
