"""torch.library's own check of the operation with 4-bit weights, and through Triton."""

from __future__ import annotations

import pytest
import torch

from sda_fast.ops.moda_group import layout_numbers
from sda_fast.ops.quantized import describe_weight

bnb = pytest.importorskip("bitsandbytes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, ROWS = 40, 6


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("backend", "kind"), [("triton", "float"), ("triton", "nf4, nested"), ("torch", "nf4, nested")]
)
def test_opcheck_of_a_pair(backend: str, kind: str, dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    frozen, adapters, layouts = [], [], []
    for N, has_bias in ((16, True), (9, False)):
        weight = normal(N, K)
        if kind != "float":
            packed = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
            weight = packed.to(DEVICE)
        layout, data, statistics = describe_weight(weight)
        frozen += [data, *statistics, normal(N)] if has_bias else [data, *statistics]
        adapters += [normal(4, K).requires_grad_(), normal(N, 4).requires_grad_(), normal(2, 2).requires_grad_()]
        layouts += layout_numbers(layout, has_bias)
    ids = torch.arange(ROWS, device=DEVICE) % 2
    seed = torch.tensor([5], device=DEVICE) if dropout else None
    arguments = (normal(ROWS, K).requires_grad_(), frozen, adapters, layouts, [2.0, 0.5], ids, dropout, seed, backend)
    torch.library.opcheck(torch.ops.sda_fast.moda_group, arguments)
