"""Who serves the low-rank passes of MoDA, and that a layer is the same with either; CUDA kernels run on the host."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sda_fast.ops import cuda_library, passes
from sda_fast.ops.moda_linear import moda_linear_group
from sda_fast.ops.regimes import forced_update

HALF = torch.float16
NAMES = ("moda_project", "moda_expand", "moda_dy_pass", "moda_dx_pass")


def without_gpu(test):
    return pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU, the CUDA kernels on the host")(
        test
    )


def group(backend, layout, dropout=0.25):
    """Outputs of a group of two layers and all gradients."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    K, rows = 40, 21
    x = normal(3, 7, K).to(HALF).requires_grad_()
    lists = {"weights": [], "lora_A": [], "lora_B": [], "gates": []}
    for N, R, E in ((48, 8, 4), (16, 6, 1)):
        lists["weights"].append((normal(N, K) * K**-0.5).to(HALF))
        lists["lora_A"].append((normal(R, K) * K**-0.5).requires_grad_())
        lists["lora_B"].append(normal(N, R).requires_grad_())
        lists["gates"].append(torch.softmax(normal(rows if layout == "per row gates" else 2, E), -1).requires_grad_())
    ids = {"per sequence": torch.tensor([0, 1, 0]), "one id": 1, "per row gates": None}[layout]
    options = {"modality_ids": ids, "scalings": [2.0, 0.5], "biases": [None, normal(16).to(HALF)]}
    outputs = moda_linear_group(x, **lists, **options, dropout=dropout, seed=2**40 + 1, backend=backend)
    inputs = [x, *lists["lora_A"], *lists["lora_B"], *lists["gates"]]
    directions = [normal(*y.shape).to(HALF) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, directions)]


@pytest.fixture
def calls(cuda_passes_on_host, monkeypatch):
    """The names of the library's passes that were called."""
    called = set()
    for name in NAMES:
        operation = getattr(cuda_passes_on_host, name)

        def recorded(*arguments, name=name, operation=operation):
            called.add(name)
            return operation(*arguments)

        monkeypatch.setattr(cuda_passes_on_host, name, recorded)
    # Decoding and gates stay where they are.
    monkeypatch.setattr(cuda_library, "is_available", lambda device="cuda": False)
    return called


def choose(monkeypatch, choice):
    """Set the variable, which is read once, or unset it."""
    if choice is None:
        monkeypatch.delenv(passes.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(passes.VARIABLE, choice)
    passes.chosen.cache_clear()


@pytest.fixture(autouse=True)
def the_choice_ends_with_the_test():
    yield
    passes.chosen.cache_clear()


@without_gpu
@pytest.mark.parametrize("way", ["before", "in place"])
@pytest.mark.parametrize("layout", ["per sequence", "one id", "per row gates"])
def test_a_group_of_layers_is_the_same_with_the_cuda_passes(calls, monkeypatch, layout, way):
    truth = group("torch", layout)
    choose(monkeypatch, "cuda")
    with forced_update(way):
        ours = group("triton", layout)
    assert calls == set(NAMES)
    choose(monkeypatch, "triton")
    calls.clear()
    with forced_update(way):
        theirs = group("triton", layout)
    assert not calls
    for cuda, triton, torchs in zip(ours, theirs, truth, strict=True):
        # Both round in the same places and sum in other orders.
        size = torchs.double().norm()
        assert (cuda.double() - triton.double()).norm() <= 4 * torch.finfo(HALF).eps * size
        assert (cuda.double() - torchs.double()).norm() <= 32 * torch.finfo(HALF).eps * size


def test_the_default_is_triton(calls, monkeypatch):
    choose(monkeypatch, None)
    assert passes.passes_for(8, torch.zeros(4, 16, dtype=HALF)) is passes.TRITON


def test_triton_takes_what_the_library_cannot(calls, monkeypatch):
    choose(monkeypatch, "cuda")
    fitting = torch.zeros(4, 16, dtype=HALF)
    assert passes.passes_for(64, fitting, fitting) is passes.CUDA
    assert passes.passes_for(65, fitting) is passes.TRITON
    assert passes.passes_for(8, fitting, torch.zeros(4, 12, dtype=HALF)) is passes.TRITON
    assert passes.passes_for(8, fitting.float()) is passes.TRITON
    assert passes.passes_for(8, torch.zeros(16, 4, dtype=HALF).t()) is passes.TRITON


def test_a_choice_that_does_not_exist_or_cannot_be_met_is_an_error(monkeypatch):
    x = torch.zeros(4, 16, dtype=HALF)
    choose(monkeypatch, "cutlass")
    with pytest.raises(ValueError, match=r"must be one of .* got 'cutlass'"):
        passes.passes_for(8, x)
    choose(monkeypatch, "cuda")
    monkeypatch.setattr(cuda_library, "reason_unavailable", lambda device: "it was not built")

    class OnGpu:
        device = torch.device("cuda")

    with pytest.raises(RuntimeError, match="it was not built"):
        passes.passes_for(8, OnGpu())
    assert passes.passes_for(8, x) is passes.TRITON


def test_the_check_before_a_speed_is_printed_covers_every_pass(calls):
    path = Path(__file__).resolve().parents[2] / "bench" / "check_kernels.py"
    specification = importlib.util.spec_from_file_location("check_kernels", path)
    check_kernels = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(check_kernels)
    ratios = check_kernels.moda_ratios(check_kernels.CUDA_SHAPES[0], HALF, torch.device("cpu"), passes.CUDA)
    names = ("project", "project, split", "expand_add", "expand", "dy_pass", "dx_pass")
    assert set(ratios) == {f"{name}, CUDA" for name in names}
    assert all(ratio <= 1 for ratio in ratios.values()), ratios
    assert calls == set(NAMES)
