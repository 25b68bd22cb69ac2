"""Every fake tensor that lives during a step, by what it is for; and the work of every operation.

`Ledger` is a dispatch mode above FakeTensorMode. It sees each operation below autograd, so it sees what the real step
would allocate and free. Small integer tensors (token ids, positions, picture grids) also carry their real values, since
the models branch on them; nothing else is ever computed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
DEVICE_OF: Any = torch.ops.prim.device.default

PARTS = ("weights", "adapters", "optimizer", "gradients", "inputs", "activations", "workspaces", "temporary")
HOST = "host"
PRODUCT, TRITON, OTHER = "products", "Triton kernels", "other operations"
# The allocator of PyTorch on CUDA hands out multiples of this.
ALLOCATION_BYTES = 512
MOST_KNOWN_ELEMENTS = 1 << 22
UNINITIALISED = ("aten::empty", "aten::new_empty")


class Ledger(TorchDispatchMode):
    """What is alive now and was alive at the peak, in bytes by part, and seconds by section.

    Attributes:
        live: part -> bytes now; parts of PARTS, and HOST for what is in main memory and does not count.
        peak, peak_parts: the largest sum of all parts but HOST so far, and its parts.
        seconds, flops: section -> work, where `section` is what the caller says is going on.
        launches: how often something was started: PRODUCT by the matrix library, TRITON kernels, OTHER operations of
            PyTorch, which may start several kernels each.
        kernels: operation -> a function to run in its place, whose own allocations then count.
    """

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        seconds_of: Callable[[float, float], float] | None = None,
        *,
        rounding: int = ALLOCATION_BYTES,
    ) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.seconds_of = seconds_of
        self.rounding = rounding
        self.kernels: dict[Any, Callable[..., Any]] = {}
        self.scratch: dict[Any, Callable[..., Any]] = {}
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self.section = ""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.launches: Counter[str] = Counter()
        self._total = 0
        self._part_of_new = "temporary"
        self._storages: dict[int, tuple[int, str]] = {}

    def adopt(self, tensors: Iterable[Tensor], part: str) -> None:
        """Enter tensors under a part, or move them to it."""
        for tensor in tensors:
            self._enter(tensor, part)
            self.retag(tensor, part)

    def retag(self, tensor: Tensor, part: str, *, only: str | None = None) -> None:
        """Move a tensor's storage to another part; with `only`, if it is in that one."""
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            return
        size, old = self._storages[key]
        if old == part or (only is not None and old != only):
            return
        self._storages[key] = (size, part)
        self._add(old, -size)
        self._add(part, size)

    @contextlib.contextmanager
    def allocating(self, part: str) -> Iterator[None]:
        """New tensors belong to `part` inside."""
        before, self._part_of_new = self._part_of_new, part
        try:
            yield
        finally:
            self._part_of_new = before

    def reset_peak(self) -> None:
        self.peak, self.peak_parts = self._total, dict(self.live)

    def work(self, flops: float, num_bytes: float) -> None:
        """Write one operation's work under the current section."""
        self.flops[self.section] += flops
        if self.seconds_of is not None:
            self.seconds[self.section] += self.seconds_of(flops, num_bytes)

    def known(self, tensor: Tensor, value: Tensor) -> Tensor:
        """`tensor`, which from now on carries its real value."""
        tensor.known_value = value  # type: ignore[attr-defined]
        return tensor

    def fake(self, value: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """A fake tensor like a real one; integers keep their values."""
        fake = self.fake_mode.from_tensor(value, static_shapes=True)
        if value.is_floating_point():
            return fake if dtype is None else fake.to(dtype)
        return self.known(fake, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            # Asked for far more often than everything else together.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func in self.kernels:
            with self:
                return self.kernels[func](*args, **kwargs)
        if func in COMPOSED:
            # Below autograd these arrive whole, and would hide the product that they make.
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._item(args[0])
        if func in INDEXING:
            args = (args[0], [self._as_places(index) for index in args[1]], *args[2:])
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs.values())
        values_known = all(value_of(tensor) is not None for tensor in inputs)
        try:
            output = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            if not values_known:
                raise
            return self._from_values(func, args, kwargs)
        outputs = tensors_in((output,))
        for tensor in outputs:
            self._enter(tensor, self._part_of_new)
        self._carry_values(func, args, kwargs, outputs, values_known)
        if not is_view(func):
            self._count(func, args, kwargs, inputs, outputs, output)
        elif not made_of(outputs, inputs):
            # such as `to`, which may give its input or a copy
            self.launches[OTHER] += 1
        if func in self.scratch:
            with self:
                self.scratch[func](*args, **kwargs)
        return output

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any) -> None:
        formula: Any = flop_registry.get(func._overloadpacket) or OTHER_FLOPS.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        if not func._schema.name.startswith(UNINITIALISED):
            self.launches[PRODUCT if flops else OTHER] += 1
        written = [tensor for tensor in outputs if not any(tensor is one for one in inputs)]
        self.work(flops, sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *written)))

    def _enter(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        self._storages[key] = (size, part)
        weakref.finalize(storage, self._leave, key)
        self._add(part, size)

    def _leave(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.live[part] += size
        if part == HOST:
            return
        self._total += size
        if self._total > self.peak:
            self.peak, self.peak_parts = self._total, dict(self.live)

    def _item(self, tensor: Tensor) -> Any:
        value = value_of(tensor)
        if value is None:
            raise RuntimeError(
                f"the step looks at the value of a fake {tensor.dtype} tensor {tuple(tensor.shape)}, which is not known"
            )
        with _disable_current_modes():
            return value.item()

    def _as_places(self, index: Tensor | None) -> Tensor | None:
        """A mask used as an index, as the places where it is set."""
        value = None if index is None else value_of(index)
        if index is None or value is None or value.dtype != torch.bool or value.dim() != 1:
            return index
        with _disable_current_modes():
            places = value.nonzero()[:, 0]
        return self.fake(places)

    def _from_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        real = self._real(func, args, kwargs)
        output = tree_map(lambda leaf: self.fake(leaf) if isinstance(leaf, Tensor) else leaf, real)
        for leaf in tree_flatten(output)[0]:
            if isinstance(leaf, Tensor):
                self._enter(leaf, self._part_of_new)
        return output

    def _carry_values(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], values_known: bool) -> None:
        mutable = func._schema.is_mutable
        if values_known and (mutable or (outputs and all(map(worth_knowing, outputs)))):
            if func._schema.name.startswith(UNINITIALISED):
                return
            real = self._real(func, args, kwargs)
            if not mutable:
                for tensor, value in zip(outputs, tree_flatten(real)[0], strict=True):
                    self.known(tensor, value)
        elif mutable:
            for tensor in written_arguments(func, args, kwargs):
                if isinstance(tensor, FakeTensor):
                    tensor.known_value = None  # type: ignore[attr-defined]

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        real_args, real_kwargs = tree_unflatten(
            [value_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
        )
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)


COMPOSED = {aten.linear.default, aten.matmul.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def value_of(tensor: Tensor) -> Tensor | None:
    """The real value of a tensor, if it is known."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "known_value", None)
    return tensor


def worth_knowing(tensor: Tensor) -> bool:
    """Integers and masks steer the models; single numbers may be asked for."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.numel() == 1
    return tensor.numel() <= MOST_KNOWN_ELEMENTS


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its input's memory in another way."""
    found = VIEWS.get(func)
    if found is None:
        returns = func._schema.returns
        found = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        VIEWS[func] = found
    return found


VIEWS: dict[Any, bool] = {}


def made_of(outputs: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether all outputs lie in memory of the inputs."""
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def written_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The tensors that an operation writes into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, (list, tuple)) else [given]


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Both products of attention, the masked half included."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def attention_backward_flops(grad: Tensor, *inputs: Any, out_val: Any = None, **options: Any) -> int:
    """Five products where forward has two."""
    return 5 * attention_flops(*inputs) // 2


# What PyTorch's own registry lacks.
OTHER_FLOPS = {
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
