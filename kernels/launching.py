"""Kernels that remember what their launches compiled to.

`triton.jit` looks at every argument of every launch, with its own rules and the environment's switches, to find the
binary that belongs to it: 40 to 60 microseconds of the host's time for kernels with as many arguments as ours, longer
than many of them run. A `Kernel` finds it by the arguments' types and values, and asks Triton when it meets new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Every number of rows is an entry; one takes about a kilobyte.
LARGEST_NUMBER_OF_LAUNCHES = 4096
POINTER_ALIGNMENT = 16


class Launch(NamedTuple):
    """What a launch needs of a compiled kernel beside its arguments."""

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
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch on the current device and stream.

        Args:
            grid: number of programs, up to three sizes.
            arguments: pointers and numbers, in the kernel's order.
            constants: the kernel's constants and Triton's options, in any order, but always the same from one place.
        """
        pointers, numbers = arguments[: self.number_of_pointers], arguments[self.number_of_pointers :]
        active = driver.active
        device = active.get_current_device()
        key = (
            device,
            *[None if one is None else (one.dtype, one.data_ptr() % POINTER_ALIGNMENT) for one in pointers],
            *map(type, numbers),
            *numbers,
            *constants.items(),
        )
        known = self.launches.get(key)
        if known is None:
            self.remember(key, self.run(*arguments, grid=grid, warmup=False, **constants))
            return
        ordered = map(constants.__getitem__, self.constants)
        if is_watched(knobs.runtime.launch_enter_hook) or is_watched(knobs.runtime.launch_exit_hook):
            known.compiled[(*grid, 1, 1)[:3]](*arguments, *ordered)
            return
        stream = active.get_current_stream(device)
        sizes = (*grid, 1, 1)[:3]
        known.run(*sizes, stream, known.function, known.packed_metadata, None, None, None, *arguments, *ordered)

    def remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        """Keep what a launch compiled to; nothing where a hook of Triton's took the compilation over."""
        if not isinstance(compiled, CompiledKernel):
            return
        if len(self.launches) >= LARGEST_NUMBER_OF_LAUNCHES:
            self.launches.clear()
        self.launches[key] = Launch(compiled, compiled.run, compiled.function, compiled.packed_metadata)


def is_watched(hook: Any) -> bool:
    """Whether somebody wants to be called at launches: a profiler, say."""
    return hook is not None and bool(getattr(hook, "calls", True))


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator in place of `triton.jit` for kernels that the host launches."""
    return triton.jit(function) if knobs.runtime.interpret else Kernel(function)
