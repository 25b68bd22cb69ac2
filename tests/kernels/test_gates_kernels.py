"""The gates' kernels against float64."""

from __future__ import annotations

import pytest
import torch

from sda_fast.kernels.gates import gates_backward_of_layers, gates_of_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# layers, modalities, E, D
SIZES = [(1, 2, 8, 64), (3, 3, 5, 7), (2, 1, 1, 1), (3, 2, 64, 130), (2, 4, 33, 65)]


def parameters(layers: int, modalities: int, E: int, D: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], ...]:
    """Embeddings and projs, one of them not dense in memory."""
    draw = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(modalities, D, generator=draw).to(DEVICE, dtype) for _ in range(layers)]
    projs = [torch.randn(D, E, generator=draw).to(DEVICE, dtype).t() for _ in range(layers)]
    return embeddings, projs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("of_one", [False, True])
def test_gates_and_their_gradients(sizes: tuple[int, ...], dtype: torch.dtype, of_one: bool) -> None:
    layers, modalities, E, _ = sizes
    embeddings, projs = parameters(*sizes, dtype)
    first, lines = (modalities - 1, 1) if of_one else (0, modalities)
    gates = gates_of_layers(embeddings, projs, first, lines)
    truths = [one.double().requires_grad_() for one in (*embeddings, *projs)]
    pairs = list(zip(truths[:layers], truths[layers:], strict=True))
    expected = [torch.softmax(one[first : first + lines] @ proj.t(), -1) for one, proj in pairs]
    for ours, truth in zip(gates, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    dgates = [torch.linspace(-1, 1, lines * E, device=DEVICE).view(lines, E) for _ in gates]
    gradients = torch.autograd.grad(expected, truths, [one.double() for one in dgates])
    ours = gates_backward_of_layers(dgates, gates, embeddings, projs, first, needs_embedding=True, needs_proj=True)
    for mine, truth in zip([*ours[0], *ours[1]], gradients, strict=True):
        assert mine.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            mine.double(), truth, rtol=tolerance, atol=max(tolerance * float(truth.abs().max()), 1e-6)
        )


@pytest.mark.parametrize(("needs_embedding", "needs_proj"), [(True, False), (False, True)])
def test_only_what_is_needed_is_given(needs_embedding: bool, needs_proj: bool) -> None:
    embeddings, projs = parameters(2, 2, 8, 64, torch.float32)
    gates = gates_of_layers(embeddings, projs, 0, 2)
    needed = {"needs_embedding": needs_embedding, "needs_proj": needs_proj}
    of_embeddings, of_projs = gates_backward_of_layers(gates, gates, embeddings, projs, 0, **needed)
    both = gates_backward_of_layers(gates, gates, embeddings, projs, 0, needs_embedding=True, needs_proj=True)
    assert (of_embeddings is not None, of_projs is not None) == (needs_embedding, needs_proj)
    for mine, theirs in zip(of_embeddings or of_projs, both[0] if needs_embedding else both[1], strict=True):
        assert torch.equal(mine, theirs)


def test_a_modality_that_is_not_wanted_gets_a_gradient_of_zero() -> None:
    embeddings, projs = parameters(3, 3, 8, 64, torch.float32)
    gates = gates_of_layers(embeddings, projs, 1, 1)
    given = gates_backward_of_layers(gates, gates, embeddings, projs, 1, needs_embedding=True, needs_proj=False)[0]
    for one in given:
        assert one[1].abs().min() > 0
        assert one[[0, 2]].abs().max() == 0
