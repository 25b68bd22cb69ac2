"""Which way y and dx are updated, and that all ways agree; Triton's interpreter stands in where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sda_fast.kernels import moda_naive as naive
from sda_fast.ops.moda_linear import moda_linear, moda_linear_group
from sda_fast.ops.regimes import forced_update, update_of_dx, update_of_y

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("before", "in place", "accumulator")
BF16 = torch.bfloat16


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def outputs(dtype: torch.dtype, layout: str, weight: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    """A group of two layers and the gradient of x."""
    rows, K = x.shape[0] * x.shape[1], x.shape[2]
    ids = {"per sequence": [0, 1, 0], "per token": torch.arange(rows).view(3, -1) % 2, "one id": 1, "per row": None}
    lists: dict[str, list[Tensor]] = {"weights": [], "lora_A": [], "lora_B": [], "gates": []}
    for N, R, E in ((weight.shape[0], 8, 4), (weight.shape[0], 70, 2)):
        lists["weights"].append(weight)
        lists["lora_A"].append(normal(R, K) * K**-0.5)
        lists["lora_B"].append(normal(N, R) * R**-0.5)
        lists["gates"].append(torch.softmax(normal(rows if layout == "per row" else 2, E), -1))
    x = x.detach().requires_grad_()
    given = ids[layout].to(DEVICE) if isinstance(ids[layout], Tensor) else ids[layout]
    y = moda_linear_group(
        x, **lists, modality_ids=given, scalings=[2.0, 0.5], biases=[bias, None], dropout=0.25, seed=7, backend="triton"
    )
    return [*(part.detach() for part in y), *torch.autograd.grad(y, x, [torch.ones_like(part) for part in y])]


@pytest.mark.parametrize("layout", ["per sequence", "per token", "one id", "per row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([BF16] if DEVICE == "cuda" else [])], ids=str)
def test_all_ways_of_updating_y_and_dx_agree(dtype: torch.dtype, layout: str) -> None:
    x, weight = normal(3, 7, 40).to(dtype), (normal(33, 40) * 40**-0.5).to(dtype)
    results = []
    for way in WAYS:
        with forced_update(way):
            results.append(outputs(dtype, layout, weight, x, normal(33).to(dtype)))
    # The ways round once or twice, each by half a unit in the last place.
    for first, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(first, other, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_every_way_takes_weights_and_rows_of_any_stride() -> None:
    x, weight = normal(3, 7, 80)[..., ::2], normal(40, 33).t()
    results = []
    for way in WAYS:
        with forced_update(way):
            results.append(outputs(torch.float32, "per sequence", weight, x, None))
    for first, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ids", [torch.tensor([0, 1, 0]), torch.arange(21).view(3, 7) % 2], ids=["sequences", "tokens"])
def test_every_way_takes_ids_and_biases_of_any_stride(ids: Tensor, way: str) -> None:
    x, weight, bias, ids = normal(3, 7, 40), normal(33, 40), normal(33), ids.to(DEVICE)
    adapter = normal(8, 40), normal(33, 8), torch.softmax(normal(2, 4), -1)
    strided_bias, strided_ids = normal(33, 2)[:, 1], torch.full((*ids.shape, 2), 99, device=DEVICE)[..., 0]
    with forced_update(way):
        dense = moda_linear(x, weight, *adapter, ids, bias=bias, backend="triton")
        strided = moda_linear(
            x, weight, *adapter, strided_ids.copy_(ids), bias=strided_bias.copy_(bias), backend="triton"
        )
    assert torch.equal(dense, strided)


@pytest.mark.parametrize("way", WAYS)
def test_a_forced_way_runs_the_kernel_it_names(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sda_fast.ops import moda_triton, passes

    called = []

    def recorded(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **options: (called.append(name), kernel(*arguments, **options))[1]

    kernels = {
        "before": {"expand"}, "in place": {"expand_add"}, "accumulator": {"gated_linear", "input_gradient"}
    }  # fmt: skip
    expanding = {name: recorded(name, getattr(passes.TRITON, name)) for name in ("expand", "expand_add")}
    monkeypatch.setattr(passes, "TRITON", replace(passes.TRITON, **expanding))
    for name in ("gated_linear", "input_gradient"):
        monkeypatch.setattr(moda_triton, name, recorded(name, getattr(moda_triton, name)))
    with forced_update(way):
        outputs(torch.float32, "one id", normal(33, 40), normal(3, 2, 40), None)
    assert set(called) == kernels[way]


def test_the_accumulator_rounds_no_worse_than_plain_pytorch() -> None:
    x, weight, lora_A, lora_B = normal(40, 64).half(), normal(33, 64).half(), normal(8, 64) * 0.1, normal(33, 8)
    gates = torch.softmax(normal(2, 4), -1)
    with forced_update("accumulator"):
        (y,) = moda_linear_group(
            x, [weight], [lora_A], [lora_B], [gates], 1, scalings=[2.0], biases=[None], backend="triton"
        )
    gate = naive.naive_gate(gates, torch.ones(40, dtype=torch.int64, device=DEVICE), 2.0, 40, 8)
    h = naive.naive_project(x, lora_A)
    plain = naive.naive_gated_linear(x, weight, None, h, lora_B, gate)
    doubles = (t.double() for t in (x, weight))
    exact = naive.naive_gated_linear(*doubles, None, x.double() @ lora_A.double().t(), lora_B.double(), gate.double())
    assert (y.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


def test_what_was_not_measured_writes_the_update_first() -> None:
    for rows in (4, 0):
        assert update_of_y(torch.zeros(rows, 8), 8, 8) == update_of_dx(torch.zeros(rows, 8), 8, 8) == "before"


def test_an_unknown_way_is_refused_and_a_forced_one_ends_with_its_block() -> None:
    with pytest.raises(ValueError, match="'fused'"), forced_update("fused"):  # type: ignore[arg-type]
        pass
    with forced_update("accumulator"):
        assert update_of_y(torch.zeros(4, 8), 8, 8) == "accumulator"
        assert update_of_dx(torch.zeros(4, 8), 8, 8) == "accumulator"
    assert update_of_y(torch.zeros(4, 8), 8, 8) == "before"
