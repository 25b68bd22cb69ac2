"""The Triton path behind moda_linear against the PyTorch path, dropout included; in the interpreter without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sda_fast.ops import passes
from sda_fast.ops.moda_linear import moda_linear_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 is not computed rightly by Triton's interpreter.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LAYERS = (33, 8, 4), (16, 6, 1)


def run(
    backend: str,
    dtype: torch.dtype,
    layout: str,
    dropout: float,
    needed: str = "xABg",
    leading: tuple = (3, 7),
    layers: tuple[tuple[int, int, int], ...] = LAYERS,
) -> list[Tensor]:
    """Outputs of a group of layers (N, R, E) and the gradients asked for; all but the first have a bias."""
    generator, generator_of_gates = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)

    def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
        return torch.randn(*shape, generator=generator)

    K, rows = 40, torch.Size(leading).numel()
    x = normal(*leading, K).to(DEVICE, dtype).requires_grad_("x" in needed)
    lists: dict[str, list[Tensor]] = {"weights": [], "lora_A": [], "lora_B": [], "gates": []}
    for N, R, E in layers:
        lists["weights"].append((normal(N, K) * K**-0.5).to(DEVICE, dtype))
        lists["lora_A"].append((normal(R, K) * K**-0.5).to(DEVICE).requires_grad_("A" in needed))
        lists["lora_B"].append(normal(N, R).to(DEVICE).requires_grad_("B" in needed))
        lines = rows if layout == "per row gates" else 2
        gates = torch.softmax(normal(lines, E, generator=generator_of_gates), -1)
        lists["gates"].append(gates.to(DEVICE).requires_grad_("g" in needed))
    ids = {
        "per sequence": torch.arange(leading[0], device=DEVICE) % 2,
        "per token": torch.arange(rows, device=DEVICE).view(leading) % 2,
        "one id": 1,
        "per row gates": None,
    }[layout]
    outputs = moda_linear_group(
        x, **lists, modality_ids=ids, scalings=[2.0 / R * 8 for _, R, _ in layers],
        biases=[None if place == 0 else normal(N).to(DEVICE, dtype) for place, (N, _, _) in enumerate(layers)],
        dropout=dropout, seed=2**40 + 1, backend=backend,
    )  # fmt: skip
    inputs = [t for t in (x, *lists["lora_A"], *lists["lora_B"], *lists["gates"]) if t.requires_grad]
    directions = [normal(*y.shape).to(DEVICE, dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, directions)]


def assert_close(
    ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, sizes: list[float] | None = None
) -> None:
    """Both round h, dhg and the results to `dtype`, at other places; `sizes` are norms, theirs if absent."""
    tolerance = 32 * torch.finfo(dtype).eps
    for a, b, size in zip(ours, theirs, sizes or [norm(b) for b in theirs], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert norm(a.double() - b.double()) <= tolerance * size + 1e-12


def norm(values: Tensor) -> float:
    return values.double().norm().item()


def sizes_of_terms(results: list[Tensor], dtype: torch.dtype, dropout: float) -> list[float]:
    """Norms of the results; of a gate's gradient, which is a sum over rows that cancel, that of its terms' sizes.

    The gradients of gates given per row are these terms.
    """
    by_row = run("torch", dtype, "per row gates", dropout)
    return [*map(norm, results[:-2]), *(norm(terms.double().abs().sum(0)) for terms in by_row[-2:])]


@pytest.mark.parametrize("layout", ["per sequence", "per token", "one id", "per row gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_equals_pytorch_with_the_same_seed(dtype: torch.dtype, dropout: float, layout: str) -> None:
    ours, theirs = (run(backend, dtype, layout, dropout) for backend in ("triton", "torch"))
    assert_close(ours, theirs, dtype, sizes_of_terms(theirs, dtype, dropout))


@pytest.mark.parametrize("needed", ["x", "A", "B", "g", "xg", "AB"])
def test_triton_gives_only_the_gradients_asked_for(needed: str) -> None:
    ours, theirs = (run(backend, torch.float32, "per sequence", 0.25, needed) for backend in ("triton", "torch"))
    assert len(ours) == 2 + sum(1 if name == "x" else 2 for name in needed)
    assert_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("leading", [(1, 1), (0, 3)])
def test_triton_takes_one_row_and_none(leading: tuple[int, ...]) -> None:
    ours, theirs = (
        run(backend, torch.float32, "per sequence", 0.25, leading=leading) for backend in ("triton", "torch")
    )
    assert_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("layout", ["per sequence", "one id", "per row gates"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_are_alike_share_launches_and_others_do_not(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, list[int]] = {"expand_group": [], "dy_pass_of_group": []}

    def counted(name: str) -> Callable[..., object]:
        function = getattr(passes.TRITON, name)
        place = 0 if name == "dy_pass_of_group" else 1
        return lambda *given, **options: launched[name].append(len(given[place])) or function(*given, **options)

    replaced = {name: counted(name) for name in launched}
    monkeypatch.setattr(passes, "TRITON", dataclasses.replace(passes.TRITON, **replaced))
    # The first has no bias, the next three are alike, the last two too.
    layers = (33, 8, 4), (16, 8, 4), (40, 8, 4), (33, 8, 4), (8, 6, 1), (17, 6, 1)
    ours, theirs = (run(backend, dtype, layout, 0.25, layers=layers) for backend in ("triton", "torch"))
    assert_close(ours[: len(layers)], theirs[: len(layers)], dtype)
    sizes = [norm(one) for one in theirs[len(layers) : -len(layers)]]
    by_row = run("torch", dtype, "per row gates", 0.25, layers=layers)[-len(layers) :]
    sizes += [norm(terms.double().abs().sum(0) if layout != "per row gates" else terms) for terms in by_row]
    assert_close(ours[len(layers) :], theirs[len(layers) :], dtype, sizes)
    assert launched == {"expand_group": [3, 2], "dy_pass_of_group": [3, 2]}


def test_layers_of_a_large_rank_have_passes_of_their_own() -> None:
    layers = (33, 64, 4), (16, 64, 4)
    ours, theirs = (run(backend, torch.float32, "one id", 0.25, layers=layers) for backend in ("triton", "torch"))
    assert_close(ours[:-2], theirs[:-2], torch.float32)
