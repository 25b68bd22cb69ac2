"""Which modality the adapted layers see: `with modality("image"): model(...)`.

The ids must also be there when activation checkpointing runs a layer again during backward, long after the block has
been left, and possibly in another thread. So while a context is active, every tensor that autograd saves carries it
along, and unpacking one in backward makes its context the active one of that thread, until that backward is over. Both
kinds of checkpointing save their inputs outside the region that they run again, and unpack them right before they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops.moda_linear import as_one_id

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class NoModalityError(RuntimeError):
    """An adapted layer was used while no modality was set."""


class ActiveModality:
    """The value of one `modality(...)` block: a name, an id, or a tensor of ids."""

    def __init__(self, value: str | int | Tensor) -> None:
        self.value = value
        self.on_device: dict[torch.device, Tensor] = {}
        self.largest_moved = -1

    def resolve(self, names: Sequence[str], num_modalities: int, device: torch.device) -> int | Tensor:
        """The id, or the ids on `device`, for a layer that knows the given names and so many modalities.

        Raises:
            ValueError: the name is not among them, or an id that has to be moved from a CPU is too large.
        """
        value = self.value
        if isinstance(value, str):
            if value not in names:
                raise ValueError(f"modality {value!r} is not among the adapter's modalities {tuple(names)}")
            return names.index(value)
        if isinstance(value, int) or value.device == device:
            return value
        if device not in self.on_device:
            # Looking at ids on a GPU would wait for it.
            if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
                self.largest_moved = int(value.max())
            self.on_device[device] = value.to(device)
        if not torch.compiler.is_compiling() and self.largest_moved >= num_modalities:
            raise ValueError(f"modality_ids go up to {self.largest_moved} but there are {num_modalities} modalities")
        return self.on_device[device]


class ThreadModality:
    """The active modality of one thread, and whom it is borrowed from while a backward runs.

    `borrowed` has one entry per running backward that set the modality: its graph task and what was active before.
    """

    def __init__(self) -> None:
        self.active: ActiveModality | None = None
        self.borrowed: list[tuple[int, ActiveModality | None]] = []

    def borrow(self, modality: ActiveModality, graph_task: int) -> None:
        """Make the modality of an unpacked tensor the active one until its backward is over."""
        if not self.borrowed or self.borrowed[-1][0] != graph_task:
            self.borrowed.append((graph_task, self.active))
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.give_back(graph_task))
        self.active = modality

    def give_back(self, graph_task: int) -> None:
        """Restore what was active before that backward, and before any that failed inside it."""
        while any(task == graph_task for task, _ in self.borrowed):
            self.active = self.borrowed.pop()[1]

    def forget_failed_backward(self) -> None:
        """A backward that raised never gives back; called where no backward is running."""
        if self.borrowed:
            self.active = self.borrowed[0][1]
            self.borrowed.clear()


class ThreadState(threading.local):
    def __init__(self) -> None:
        self.modality = ThreadModality()


state = ThreadState()


def current_modality() -> ActiveModality:
    """The modality that adapted layers use now.

    Raises:
        NoModalityError: none is set.
    """
    thread = state.modality
    if not torch.compiler.is_compiling() and thread.borrowed and torch._C._current_graph_task_id() == -1:
        thread.forget_failed_backward()
    active = thread.active
    if active is None:
        raise NoModalityError(
            "an adapted layer was used and no modality is set: run the model inside `with sda_fast.modality(...)`, or "
            "pass modality_ids to the layer"
        )
    return active


class CarryModality:
    """Hooks for saved tensors that carry a modality, around the hooks that were there before, if any."""

    def __init__(self, modality: ActiveModality, outer: Hooks | None) -> None:
        self.modality = modality
        self.outer = outer

    def pack(self, tensor: Tensor) -> Any:
        if self.outer is not None:
            return self.outer[0](tensor)
        # A result kept as such would keep its own graph alive; a detached one shares memory and version.
        return (tensor if tensor.grad_fn is None else tensor.detach()), tensor._version

    def unpack(self, packed: Any) -> Tensor:
        graph_task = torch._C._current_graph_task_id()
        if graph_task != -1:
            state.modality.borrow(self.modality, graph_task)
        if self.outer is not None:
            return self.outer[1](packed)
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.dtype} {tuple(tensor.shape)} is at version {tensor._version}, expected version {version}"
            )
        return tensor


class modality:
    """Context manager: the modality of everything that runs through adapted layers inside.

    It also holds for what activation checkpointing recomputes later in backward. Blocks nest; each thread has its own.

        with sda_fast.modality("image"):
            hidden_states = model(**batch).last_hidden_state

    Args:
        which: a name ("image", "text"), one id for everything, or ids as a tensor or sequence, one per sequence [B] or
            one per token [B, T].
    Raises:
        TypeError: `which` is none of these, or ids are not integers.
        ValueError: an id is negative.
    """

    def __init__(self, which: str | int | Tensor | Sequence[Any]) -> None:
        self.modality = ActiveModality(checked(which))
        self.previous: list[tuple[ActiveModality | None, Any]] = []

    def __enter__(self) -> modality:
        thread = state.modality
        hooks = None
        if not torch.compiler.is_compiling():
            if thread.borrowed and torch._C._current_graph_task_id() == -1:
                thread.forget_failed_backward()
            carry = CarryModality(self.modality, outer_hooks())
            hooks = torch.autograd.graph.saved_tensors_hooks(carry.pack, carry.unpack)
            hooks.__enter__()
        self.previous.append((thread.active, hooks))
        thread.active = self.modality
        return self

    def __exit__(self, *error: object) -> None:
        previous, hooks = self.previous.pop()
        state.modality.active = previous
        if hooks is not None:
            hooks.__exit__(*error)


def outer_hooks() -> Hooks | None:
    """The hooks for saved tensors in force now, seen through those of an enclosing modality."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    carrier = getattr(hooks[0], "__self__", None)
    return carrier.outer if isinstance(carrier, CarryModality) else hooks


def checked(which: Any) -> str | int | Tensor:
    """A name, an id, or an integer tensor."""
    which = as_one_id(which)
    if isinstance(which, (str, int)) and not isinstance(which, bool):
        if isinstance(which, int) and which < 0:
            raise ValueError(f"a modality id must not be negative, got {which}")
        return which
    if not isinstance(which, Tensor):
        if not isinstance(which, Sequence):
            raise TypeError(f"modality takes a name, an id, or ids per sequence or token, got {type(which).__name__}")
        which = torch.tensor(which)
    if which.is_floating_point() or which.is_complex() or which.dtype == torch.bool:
        raise TypeError(f"modality ids must be integers, got {which.dtype}")
    if which.device.type == "cpu" and not torch.compiler.is_compiling() and which.numel() and int(which.min()) < 0:
        raise ValueError(f"a modality id must not be negative, got {int(which.min())}")
    return which
