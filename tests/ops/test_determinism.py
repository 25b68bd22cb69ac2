"""The same inputs and seed give the same bits, forward and backward, by default and on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sda_fast.kernels import moda_backward, moda_forward
from sda_fast.ops.moda_linear import moda_linear_group

bnb = pytest.importorskip("bitsandbytes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, ROWS, RANK, EXPERTS = 64, 150, 16, 4


def weight_of(N: int, kind: str) -> Tensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(N)) * K**-0.5
    if kind == "float":
        return values.to(DEVICE)
    return bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to(DEVICE)


def results(backend: str, weights: list[Tensor]) -> list[Tensor]:
    """Outputs of a group of three and every gradient."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE).requires_grad_()

    x = normal(ROWS, K)
    lora_A = [normal(RANK, K, scale=K**-0.5) for _ in weights]
    lora_B = [normal(weight.quant_state.shape[0] if hasattr(weight, "quant_state") else len(weight), RANK)
              for weight in weights]  # fmt: skip
    gates = [torch.softmax(normal(2, EXPERTS), -1).detach().requires_grad_() for _ in weights]
    ids = torch.arange(ROWS, device=DEVICE) % 2
    ys = moda_linear_group(
        x, weights, lora_A, lora_B, gates, ids, scalings=[2.0] * 3, biases=[None] * 3, dropout=0.2, seed=9,
        backend=backend,
    )  # fmt: skip
    return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *lora_A, *lora_B, *gates])]


@pytest.mark.parametrize("kind", ["float", "nf4"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_two_runs_give_the_same_bits_with_dropout_and_sums_over_several_chunks_of_rows(
    backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [weight_of(N, kind) for N in (48, 32, 32)]
    chunks: list[int] = []
    chunks_of_rows = moda_backward.chunks_of_rows

    def counted(*arguments: object) -> tuple[int, int]:
        found = chunks_of_rows(*arguments)  # type: ignore[arg-type]
        chunks.append(found[0])
        return found

    for module in (moda_backward, moda_forward):
        monkeypatch.setattr(module, "programs_wanted", lambda device: 16)
    monkeypatch.setattr(moda_backward, "chunks_of_rows", counted)
    first, second = results(backend, weights), results(backend, weights)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(one.abs().sum() > 0 for one in first)
    assert backend == "torch" or (chunks and min(chunks) > 1)
