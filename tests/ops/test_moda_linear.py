"""moda_linear against a loop over experts, in float64 and in every other dtype, alone and in groups."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sda_fast
from sda_fast.ops import quantized
from sda_fast.ops.dropout import dropout_scale, keep_mask
from sda_fast.ops.moda_group import layout_numbers, moda_group_backward_kernel
from sda_fast.ops.moda_linear import ids_of, moda_linear, moda_linear_group
from sda_fast.ops.moda_naive import moda_linear_naive
from sda_fast.ops.quantized import decode, describe_weight

# leading shape of x, K, N, R, E
SIZES = [
    ((1,), 1, 1, 1, 1),
    ((2, 3), 17, 9, 8, 4),
    ((17,), 129, 17, 6, 3),
    ((3, 43), 64, 129, 16, 8),
    ((2, 2, 5), 12, 20, 64, 64),
    ((0,), 17, 9, 4, 2),
    ((2, 0), 17, 9, 4, 2),
]
LAYOUTS = ["per sequence", "per token", "one id", "per row gates"]


def case(size: tuple, layout: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    leading, K, N, R, E = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    rows = torch.Size(leading).numel()
    ids: Any = None
    lines = 3
    if layout == "per sequence":
        ids = torch.randint(0, 3, leading[:1], generator=generator)
    elif layout == "per token":
        ids = torch.randint(0, 3, leading, generator=generator)
    elif layout == "one id":
        ids = 2
    else:
        lines = rows if rows else 1
    gates = torch.softmax(torch.randn(lines, E, generator=generator, dtype=torch.float64), -1)
    return {
        "x": normal(*leading, K).requires_grad_(),
        "weight": normal(N, K, scale=K**-0.5),
        "lora_A": normal(R, K, scale=K**-0.5).requires_grad_(),
        "lora_B": normal(N, R).requires_grad_(),
        "gates": (gates if dtype == torch.float64 else gates.float()).requires_grad_(),
        "modality_ids": ids,
        "bias": normal(N),
        "scaling": 4.0,
    }


def row_gates(c: dict[str, Any]) -> Tensor:
    """[M, E]"""
    x, gates, ids = c["x"], c["gates"], c["modality_ids"]
    rows = x.shape[:-1].numel()
    if ids is None:
        return gates.expand(rows, -1)
    if isinstance(ids, int):
        return gates[ids].expand(rows, -1)
    per_token = ids if ids.shape == x.shape[:-1] else ids.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    return gates[per_token.reshape(-1)]


def naive(c: dict[str, Any], *, dropout: float = 0.0, seed: int = 0, weight: Tensor | None = None) -> Tensor:
    x = c["x"].reshape(-1, c["x"].shape[-1])
    kept = keep_mask(*x.shape, dropout, seed) if dropout else None
    y = moda_linear_naive(
        x,
        c["weight"] if weight is None else weight,
        c["lora_A"],
        c["lora_B"],
        row_gates(c),
        scaling=c["scaling"],
        bias=c["bias"],
        kept=kept,
        dropout_scale=dropout_scale(dropout),
    )
    return y.view(*c["x"].shape[:-1], y.shape[1])


def gradients(y: Tensor, c: dict[str, Any]) -> list[Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, [c["x"], c["lora_A"], c["lora_B"], c["gates"]], direction))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_loop_over_experts_in_float64(size: tuple, layout: str, dropout: float) -> None:
    c = case(size, layout)
    y = moda_linear(**c, dropout=dropout, seed=11)
    expected = naive(c, dropout=dropout, seed=11)
    assert_same([y, *gradients(y, c)], [expected, *gradients(expected, c)])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("size"), [((2, 3), 17, 9, 8, 4), ((5,), 160, 64, 8, 8), ((3, 5), 129, 33, 4, 2)], ids=str)
def test_equals_the_loop_over_experts_on_4bit_weights(size: tuple, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    c = case(size, "per sequence")
    packed = bnb.nn.Params4bit(
        c["weight"].float(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cpu")
    decoded = decode(*describe_weight(packed), torch.float64).clone()
    c["weight"] = packed
    y = moda_linear(**c, dropout=0.2, seed=3)
    expected = naive(c, dropout=0.2, seed=3, weight=decoded)
    assert_same([y, *gradients(y, c)], [expected, *gradients(expected, c)])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_strided_inputs_give_the_same(dropout: float) -> None:
    c = case(((6, 5), 24, 10, 8, 4), "per token")
    expected = moda_linear(**c, dropout=dropout, seed=1)
    wanted = gradients(expected, c)
    strided = dict(c)
    strided["x"] = c["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for name in ("lora_A", "lora_B", "weight"):
        needs = c[name].requires_grad
        strided[name] = c[name].detach().t().contiguous().t().requires_grad_(needs)
    strided["gates"] = torch.stack([c["gates"].detach()] * 2, -1)[..., 0].requires_grad_()
    y = moda_linear(**strided, dropout=dropout, seed=1)
    assert_same([y, *gradients(y, strided)], [expected, *wanted])
    direction = torch.ones(1, dtype=torch.float64).expand(expected.shape)
    torch.autograd.grad(moda_linear(**strided), strided["x"], direction)


@pytest.mark.parametrize("layout", ["per sequence", "per row gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(layout: str, dropout: float) -> None:
    c = case(((2, 3), 5, 4, 4, 2), layout)

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor) -> Tensor:
        return moda_linear(
            x,
            c["weight"],
            lora_A,
            lora_B,
            gates,
            c["modality_ids"],
            bias=c["bias"],
            scaling=2.0,
            dropout=dropout,
            seed=5,
        )

    assert torch.autograd.gradcheck(function, (c["x"], c["lora_A"], c["lora_B"], c["gates"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_error_is_no_larger_than_plain_pytorch_has_at_the_same_dtype(
    dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: float
) -> None:
    ours, plain = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for seed in range(4):
        errors = squared_errors(dtype, adapter_dtype, dropout, seed)
        ours += errors[0]
        plain += errors[1]
    # y, dx, dA, dB, dgates; float32 noise of the gates themselves is allowed for.
    assert (ours <= 1.2 * plain + 1e-12).all(), (ours / plain).sqrt()


def squared_errors(dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Relative squared errors against float64 of moda_linear and of concatenated PyTorch at `dtype`."""
    truth = case(((4, 33), 256, 192, 16, 8), "per sequence", seed=seed)
    for name in ("x", "weight", "bias"):
        truth[name] = truth[name].detach().to(dtype).double().requires_grad_(name == "x")
    for name in ("lora_A", "lora_B"):
        truth[name] = truth[name].detach().to(adapter_dtype).double().requires_grad_()
    low = {name: value.detach() if isinstance(value, Tensor) else value for name, value in truth.items()}
    for name in ("x", "weight", "bias"):
        low[name] = low[name].to(dtype).requires_grad_(name == "x")
    for name in ("lora_A", "lora_B"):
        low[name] = low[name].to(adapter_dtype).requires_grad_()
    low["gates"] = low["gates"].float().requires_grad_()

    exact = naive(truth, dropout=dropout, seed=2)
    wanted = [exact, *gradients(exact, truth)]
    y = moda_linear(**low, dropout=dropout, seed=2)
    ours = [y, *gradients(y, low)]
    x = low["x"].reshape(-1, 256)
    if dropout:
        x = x * keep_mask(*x.shape, dropout, 2) * dropout_scale(dropout)
    h = x.to(dtype) @ low["lora_A"].to(dtype).t()
    gate = (row_gates(low) * low["scaling"]).repeat_interleave(2, 1).to(dtype)
    plain_y = torch.nn.functional.linear(low["x"].reshape(-1, 256), low["weight"], low["bias"])
    plain_y = (plain_y + (h * gate) @ low["lora_B"].to(dtype).t()).view(y.shape)
    plain = [plain_y, *gradients(plain_y, low)]

    def errors(results: list[Tensor]) -> Tensor:
        pairs = zip(results, wanted, strict=True)
        return torch.stack([(a.detach().double() - t.detach()).square().sum() / t.square().sum() for a, t in pairs])

    return errors(ours).detach(), errors(plain).detach()


def test_group_gives_every_layer_what_it_gives_alone_and_sums_dx() -> None:
    sizes = [((3, 4), 24, N, R, E) for N, R, E in ((16, 8, 8), (8, 4, 2), (24, 6, 1))]
    cases = [case(size, "per sequence", seed=seed) for seed, size in enumerate(sizes)]
    x, ids = cases[0]["x"], cases[0]["modality_ids"]
    for dropout in (0.0, 0.3):
        outputs = moda_linear_group(
            x,
            [c["weight"] for c in cases],
            [c["lora_A"] for c in cases],
            [c["lora_B"] for c in cases],
            [c["gates"] for c in cases],
            ids,
            scalings=[c["scaling"] for c in cases],
            biases=[None, cases[1]["bias"], cases[2]["bias"]],
            dropout=dropout,
            seed=4,
        )
        alone = [
            moda_linear(**{**c, "x": x, "modality_ids": ids, "bias": c["bias"] if i else None}, dropout=dropout, seed=4)
            for i, c in enumerate(cases)
        ]
        inputs = [x] + [c[name] for c in cases for name in ("lora_A", "lora_B", "gates")]
        ours = torch.autograd.grad(sum((y**2).sum() for y in outputs), inputs)
        theirs = torch.autograd.grad(sum((y**2).sum() for y in alone), inputs)
        assert_same([*outputs, *ours], [*alone, *theirs])


def test_group_with_an_unused_member_gives_it_zero_gradients() -> None:
    c, d = case(((3,), 8, 4, 4, 2), "per token"), case(((3,), 8, 6, 4, 2), "per token", seed=1)
    y, _ = moda_linear_group(
        c["x"],
        [c["weight"], d["weight"]],
        [c["lora_A"], d["lora_A"]],
        [c["lora_B"], d["lora_B"]],
        [c["gates"], d["gates"]],
        c["modality_ids"],
        scalings=[1.0, 1.0],
        biases=[None, None],
    )
    y.sum().backward()
    assert c["lora_A"].grad.abs().sum() > 0
    assert d["lora_A"].grad.abs().sum() == 0 == d["lora_B"].grad.abs().sum()


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=4)), ids=str)
def test_only_needed_gradients_are_computed_and_kept_for(needed: tuple[bool, ...]) -> None:
    c = case(((3, 4), 16, 8, 4, 2), "per sequence")
    names = ("x", "lora_A", "lora_B", "gates")
    full = dict(zip(names, gradients(moda_linear(**c, dropout=0.2, seed=1), c), strict=True))
    for name, need in zip(names, needed, strict=True):
        c[name] = c[name].detach().requires_grad_(need)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = moda_linear(**c, dropout=0.2, seed=1)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    for name, need in zip(names, needed, strict=True):
        assert (c[name].grad is not None) == need
        if need:
            torch.testing.assert_close(c[name].grad, full[name])
    keeps_x = any(t.data_ptr() == c["x"].data_ptr() for t in saved)
    assert keeps_x == needed[1]


def test_seeds_decide_the_mask_and_absent_ones_come_from_the_generator() -> None:
    c = case(((64,), 64, 8, 4, 2), "one id")
    first, second, other = (moda_linear(**c, dropout=0.5, seed=seed) for seed in (1, torch.tensor([1]), 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    drawn = moda_linear(**c, dropout=0.5)
    assert not torch.equal(drawn, moda_linear(**c, dropout=0.5))
    torch.manual_seed(3)
    assert torch.equal(drawn, moda_linear(**c, dropout=0.5))


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs_dtypes() -> None:
    c = case(((2, 8), 32, 16, 8, 4), "per sequence", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moda_linear(**c)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert {c[name].grad.dtype for name in ("x", "lora_A", "lora_B", "gates")} == {torch.float32}
    torch.testing.assert_close(y.float(), moda_linear(**c), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality_ids": torch.zeros(7, dtype=torch.int64)}, r"modality_ids has shape \(7,\) but x has 2 sequences"),
        ({"modality_ids": torch.tensor([0, 3])}, "from 0 to 3 but there are 3 modalities"),
        ({"modality_ids": 3}, "modality id 3"),
        ({"modality_ids": torch.tensor([0.0, 1.0])}, "must be integers"),
        ({"modality_ids": None}, "1 or 6 lines"),
        ({"x": torch.zeros(2, 3, 16, dtype=torch.float64)}, "takes 17 features"),
        ({"lora_A": torch.zeros(8, 16, dtype=torch.float64)}, r"lora_A must be \[R, 17\]"),
        ({"lora_B": torch.zeros(9, 7, dtype=torch.float64)}, r"lora_B must be \[9, 8\]"),
        ({"gates": torch.zeros(3, 3, dtype=torch.float64)}, "E dividing the total rank 8"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, r"bias must be \[9\]"),
        ({"bias": torch.zeros(9, dtype=torch.float64, requires_grad=True)}, "frozen"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": 0.5, "seed": -1}, "seed must be in"),
        *(
            ({"x": torch.ones(2, 3, 17).to(dtype)}, f"must be one of float64, .* got {str(dtype)[6:]}")
            for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn)
        ),
        ({"dropout": 0.5, "seed": torch.tensor([-1])}, "seed must be in .* got -1"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "triton"}, "float32, float16 or bfloat16"),
    ],
)
def test_wrong_arguments_are_errors_that_quote_them(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moda_linear(**{**case(((2, 3), 17, 9, 8, 4), "per sequence"), **change})


@pytest.mark.parametrize("ids", [[0, 3], torch.tensor([0, 3]), torch.tensor([0, -1])], ids=str)
def test_ids_on_a_cpu_are_checked_though_x_is_elsewhere(ids: Any) -> None:
    x = torch.empty(2, 3, 17, device="meta")
    with pytest.raises(ValueError, match="but there are 3 modalities"):
        ids_of(x, ids, 3)


def test_ids_are_moved_to_x_as_int64() -> None:
    x = torch.empty(2, 3, 17, device="meta")
    moved = ids_of(x, torch.tensor([0, 3], dtype=torch.int32), 4)
    assert moved is not None
    assert (moved.device, moved.dtype, moved.shape) == (x.device, torch.int64, (2,))


@pytest.mark.parametrize("which", [np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(2, dtype=torch.int32)])
def test_an_id_without_dimensions_counts_as_one_for_all(which: Any) -> None:
    c = case(((2, 3), 17, 9, 8, 4), "one id")
    assert torch.equal(moda_linear(**{**c, "modality_ids": which}), moda_linear(**c))
    with pytest.raises(ValueError, match="modality id 3"):
        moda_linear(**{**c, "modality_ids": which + 1})
    with pytest.raises(ValueError, match="must be integers"):
        moda_linear(**{**c, "modality_ids": which * 1.0})


class Allocations(TorchDispatchMode):
    """Inside, `sizes` has the bytes of every storage that an operation makes, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self.held.append(tensor)
        return result


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("nested", [True, False])
def test_dx_of_a_4bit_layer_needs_no_memory_but_its_own_and_the_workspace(
    nested: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    # As if the weight were too large for an allocation of its own, decoded few rows at a time.
    monkeypatch.setattr(quantized, "LARGEST_REUSED_ALLOCATION", 0)
    monkeypatch.setattr(quantized, "ELEMENTS_PER_CHUNK", 8 * 320)
    M, N, K = 64, 256, 320
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = bnb.nn.Params4bit(torch.randn(N, K), requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layout, data, statistics = describe_weight(weight.to(device))
    dy, lora_A, lora_B = (torch.randn(*shape, device=device) for shape in ((M, N), (8, K), (N, 8)))
    adapters = [lora_A, lora_B, torch.rand(1, 4, device=device)]
    frozen, numbers, wanted = [data, *statistics], layout_numbers(layout, False), [True, False, False, False]
    quantized.workspaces.take((N, K), dy.dtype, dy.device).fill_(torch.nan)
    with Allocations() as made:
        (dx,) = moda_group_backward_kernel(
            [dy], None, None, None, frozen, adapters, numbers, [2.0], None, 0.0, None, wanted, backend
        )
    large = {address for address, size in made.sizes.items() if size > dx.nbytes // 4}
    assert large == {dx.untyped_storage().data_ptr()} and dx.nbytes == M * K * 4
    plain = decode(layout, data, statistics, torch.float32)
    gate = 2.0 * adapters[2].repeat_interleave(2)
    torch.testing.assert_close(dx, dy @ plain + (dy @ lora_B * gate) @ lora_A, rtol=1e-4, atol=1e-3)


def test_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        moda_linear(**case(((2, 3), 17, 9, 8, 4), "per sequence", torch.float32), backend="triton")


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("members", [1, 2])
def test_opcheck(dropout: float, members: int) -> None:
    cases = [case(((3, 2), 12, 6 + i, 4, 2), "per sequence", torch.float32, seed=i) for i in range(members)]
    arguments = (
        cases[0]["x"].detach().reshape(-1, 12).requires_grad_(),
        [cases[0]["weight"], cases[0]["bias"], *(c["weight"] for c in cases[1:])],
        [c[name] for c in cases for name in ("lora_A", "lora_B", "gates")],
        [number for i in range(members) for number in (6 + i, 12, 0, 0, 0, int(i == 0))],
        [2.0] * members,
        cases[0]["modality_ids"],
        dropout,
        torch.tensor([5]) if dropout else None,
        "torch",
    )
    torch.library.opcheck(torch.ops.sda_fast.moda_group, arguments)


def test_importing_the_operation_imports_no_heavy_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sda_fast; sda_fast.moda_linear, sda_fast.MoDALinear, sda_fast.adapt_model, sda_fast.save_adapter\n"
        "print([n for n in ('transformers', 'peft', 'bitsandbytes', 'triton') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert sda_fast.moda_linear is moda_linear
