"""The library's GPU paths on a machine without a GPU: real code on fake tensors, its Triton launches left out.

The autograd engine of a PyTorch without CUDA refuses fake CUDA tensors, so the fakes are on the CPU and the few places
where the library asks for the device are answered as on the card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sda_fast.ops import cmsa, cmsa_products, gates, moda_group, moda_linear, moda_torch, quantized
from sda_fast.ops.quantized import WeightLayout, decode_absmax, workspaces
from sda_fast.planning.cards import Card
from sda_fast.planning.ledger import PRODUCT, TRITON, Ledger, aten

# What cuBLAS keeps for itself (8 MiB, 32 MiB on Hopper) and cuBLASLt's share.
LIBRARY_WORKSPACE_BYTES = 40 * 1024**2


@contextlib.contextmanager
def as_on_a_gpu(ledger: Ledger, card: Card) -> Iterator[None]:
    """Inside, adapted layers and losses allocate what they would on a GPU."""
    from triton.runtime.jit import KernelInterface

    from sda_fast.kernels import moda_backward, moda_forward
    from sda_fast.kernels.launching import Kernel, PreparedLaunch
    from sda_fast.ops import moda_triton

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def count(*arguments: Any, **options: Any) -> None:
            tensors = [one for one in arguments if isinstance(one, Tensor)]
            ledger.work(0, sum(one.numel() * one.element_size() for one in tensors))
            ledger.launches[TRITON] += 1

        return count

    def take(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        with ledger.allocating("workspaces"):
            return type(workspaces).take(workspaces, shape, dtype, device)

    def decode(layout: WeightLayout, data: Tensor, statistics: list[Tensor], dtype: torch.dtype) -> Tensor:
        if not layout.quant_type:
            return quantized.decode(layout, data, statistics, dtype)
        absmax = decode_absmax(layout, statistics)
        elements = layout.out_features * layout.in_features
        ledger.work(0, data.numel() * data.element_size() + absmax.numel() * 4 + elements * dtype.itemsize)
        return workspaces.take((layout.out_features, layout.in_features), dtype, data.device)

    def decoded(member: moda_torch.Member, dtype: torch.dtype) -> Tensor:
        return decode(member.layout, member.weight, member.statistics, dtype)

    def programs_wanted(device: torch.device) -> int:
        return 2 * card.multiprocessors

    def triton_chosen(backend: str, tensor: Tensor) -> str:
        return "triton" if backend == "auto" and tensor.dtype in moda_group.TRITON_DTYPES else backend

    def way_of_loss(backend: str, embeddings: Tensor) -> str:
        if triton_chosen(backend, embeddings) != "triton":
            return backend
        return cmsa.triton_way(embeddings)

    def product(total: Tensor, left: Tensor, right: Tensor, beta: int, alpha: float) -> None:
        read = (left, right, total) if beta else (left, right)
        num_bytes = sum(one.numel() * one.element_size() for one in (*read, total))
        ledger.work(2 * left.shape[0] * left.shape[1] * right.shape[1], num_bytes)
        ledger.launches[PRODUCT] += 1

    forward, backward = torch.ops.sda_fast.cmsa_forward.default, torch.ops.sda_fast.cmsa_backward.default
    kernels: dict[Any, Callable[..., Any]] = {
        torch.ops.sda_fast.moda_group.default: moda_group.moda_group_kernel,
        torch.ops.sda_fast.moda_group_hidden.default: moda_group.moda_group_hidden_kernel,
        torch.ops.sda_fast.moda_group_outputs.default: moda_group.moda_group_outputs_kernel,
        torch.ops.sda_fast.moda_group_backward.default: moda_group.moda_group_backward_kernel,
        torch.ops.sda_fast.moda_gates.default: gates.moda_gates_kernel,
        torch.ops.sda_fast.moda_gates_backward.default: gates.moda_gates_backward_kernel,
        forward: cmsa.cmsa_forward._init_fn,
        backward: cmsa.cmsa_backward._init_fn,
    }
    scratch: dict[Any, Callable[..., Any]] = {
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward_scratch
    }
    with contextlib.ExitStack() as stack:
        stack.callback(workspaces.clear)
        workspaces.clear()
        for kind in (KernelInterface, Kernel):
            stack.enter_context(replaced(kind, "__getitem__", launch))
        stack.enter_context(replaced(PreparedLaunch, "__call__", launch(None, None)))
        stack.enter_context(replaced(workspaces, "take", take))
        stack.enter_context(replaced(moda_torch, "decode", decode))
        stack.enter_context(replaced(moda_triton, "decoded", decoded))
        stack.enter_context(replaced(moda_linear, "resolve_backend", triton_chosen))
        stack.enter_context(replaced(gates, "takes_triton", lambda embeddings, projs: True))
        stack.enter_context(replaced(cmsa, "resolve_backend", way_of_loss))
        stack.enter_context(replaced(cmsa, "default_workspace", cmsa.gpu_workspace))
        stack.enter_context(replaced(cmsa, "multiprocessors_of", lambda embeddings: card.multiprocessors))
        stack.enter_context(replaced(cmsa_products, "library_product", product))
        for module in (moda_forward, moda_backward):
            stack.enter_context(replaced(module, "programs_wanted", programs_wanted))
        ledger.kernels, ledger.scratch = kernels, scratch
        try:
            yield
        finally:
            ledger.kernels, ledger.scratch = {}, {}


def attention_backward_scratch(grad: Tensor, query: Tensor, *rest: Any, **options: Any) -> None:
    """Flash attention's backward sums dq in float32."""
    torch.empty(query.shape, dtype=torch.float32, device=query.device)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside, and what it was afterwards."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
