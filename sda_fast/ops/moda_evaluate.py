"""`sda_fast::moda_evaluate`: layers that share x, in evaluation, every row with the same gates; no gradient.

Layer by layer `fold_regimes` chooses among the folded weight, the update beside the weight, and a small 4-bit product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sda_fast.ops import cuda_library, moda_torch
from sda_fast.ops.fold_regimes import evaluation_way
from sda_fast.ops.folding import float32_unless_bfloat16, folded_weight, packed_bytes
from sda_fast.ops.moda_group import empty_outputs, library, members_of, without_autocast
from sda_fast.ops.moda_torch import Member
from sda_fast.ops.quantized import QUANT_NAMES, workspaces
from sda_fast.ops.splits import splits_of

library.define(
    "moda_evaluate(Tensor x, Tensor[] frozen, Tensor[] adapters, int[] layouts, float[] scalings, str backend, "
    "bool may_use_library) -> Tensor[]"
)


def moda_evaluate_kernel(
    x: Tensor,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    backend: str,
    may_use_library: bool,
) -> list[Tensor]:
    """`moda_evaluate` on CPU and CUDA."""
    members = members_of(frozen, adapters, layouts, scalings)
    use_library = may_use_library and cuda_library.is_available(x.device)
    ways = [evaluation_way(x, member.layout, backend, use_library) for member in members]
    with without_autocast(x.device):
        h = x.new_empty(0) if all(way.what == "fold" for way in ways) else project(x, members, backend)
        outputs = []
        for member, way in zip(members, ways, strict=True):
            if way.what == "fold":
                outputs.append(folded_output(member, x, backend, way.by_library))
            elif way.what == "small product":
                outputs.append(small_output(member, x, h[:, member.ranks], way.by_library))
            elif way.what == "bitsandbytes":
                outputs.append(bitsandbytes_output(member, x, h[:, member.ranks], backend))
            else:
                outputs.append(unfolded_output(member, x, h[:, member.ranks], backend))
        return outputs


for device_key in ("CPU", "CUDA"):
    library.impl("moda_evaluate", moda_evaluate_kernel, device_key)


@torch.library.register_fake("sda_fast::moda_evaluate", lib=library)
def moda_evaluate_fake(
    x: Tensor,
    frozen: list[Tensor],
    adapters: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    backend: str,
    may_use_library: bool,
) -> list[Tensor]:
    return empty_outputs(x, layouts)


def project(x: Tensor, members: Sequence[Member], backend: str) -> Tensor:
    """h = x A^T of all layers, [M, sum of R]."""
    lora_A = [member.lora_A for member in members]
    if backend == "triton":
        from sda_fast.ops import moda_triton

        return moda_triton.hidden(x, lora_A, 0.0, None)
    return moda_torch.hidden(x, lora_A, 0.0, None)[0]


def folded_output(member: Member, x: Tensor, backend: str, use_library: bool) -> Tensor:
    """y = x (W + scaling * B diag(g) A)^T + bias; the sum of weights is rounded once, to the dtype of x."""
    bias = None if member.bias is None else member.bias.to(x.dtype)
    with workspaces.guard(x.device):
        weight = folded_weight(member, x.dtype, backend=backend, use_library=use_library)
        return torch.nn.functional.linear(x, weight, bias)


def small_output(member: Member, x: Tensor, h: Tensor, use_library: bool) -> Tensor:
    """The same for few rows without a decoded weight: the update is added to the float32 sum."""
    layout = member.layout
    bias = None if member.bias is None else member.bias.to(x.dtype)
    lora_B = float32_unless_bfloat16(member.lora_B).contiguous()
    splits = splits_of(x, layout, use_library)
    if use_library:
        update = (h, lora_B, member.gates[0], member.scaling)
        return cuda_library.linear(x, layout, member.weight, member.statistics, bias, *update, splits)
    from sda_fast.kernels.moda_forward import with_unit_columns
    from sda_fast.kernels.nf4_linear import small_linear_4bit

    return small_linear_4bit(
        with_unit_columns(x),
        packed_bytes(member),
        member.statistics,
        layout.out_features,
        layout.blocksize,
        layout.nested_blocksize,
        bias=bias,
        h=h,
        lora_B=lora_B,
        gates=member.gates.contiguous(),
        scaling=member.scaling,
        splits=splits,
    )


def unfolded_output(member: Member, x: Tensor, h: Tensor, backend: str) -> Tensor:
    """As in training."""
    if backend == "triton":
        from sda_fast.ops import moda_triton

        return moda_triton.output_of(member, x, h, None)
    return moda_torch.output_of(member, x, h, None)


def bitsandbytes_output(member: Member, x: Tensor, h: Tensor, backend: str) -> Tensor:
    """bitsandbytes' product for the frozen weight, then the update in place."""
    layout, bias = member.layout, None if member.bias is None else member.bias.to(x.dtype)
    if layout.nested_blocksize:
        codes, _, nested_absmax, nested_code, offset = member.statistics
        scales: tuple[Tensor | None, ...] = (nested_absmax, codes, nested_code, offset.reshape(()))
    else:
        scales = (member.statistics[0], None, None, None)
    y = torch.ops.bitsandbytes.gemm_4bit(
        x,
        packed_bytes(member).view(-1, 1),
        [layout.out_features, layout.in_features],
        scales[0],
        layout.blocksize,
        QUANT_NAMES[layout.quant_type],
        bias,
        *scales[1:],
    )
    if backend == "triton":
        from sda_fast.ops import moda_triton

        return moda_triton.add_update(y, member, h, None)
    return moda_torch.add_update(y, member, h, None)
