"""The gates of MoDA as one operation: what softmax and a product give, and their gradients."""

import pytest
import torch

from sda_fast import MoDALinear
from sda_fast.ops.gates import moda_gates

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def parameters(modalities=3, experts=5, gate_dim=7, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (modalities, gate_dim), (experts, gate_dim)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_definition(gate_embedding, gate_proj, modality=None):
    rows = gate_embedding if modality is None else gate_embedding[modality : modality + 1]
    return torch.softmax(rows.double() @ gate_proj.double().t(), -1)


@pytest.mark.parametrize("modality", [None, 0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_and_their_gradients_follow_the_definition(dtype, modality):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    gates, expected = moda_gates(*ours, modality), by_definition(*theirs, modality)
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gates.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    (gates * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("modality", [None, 1])
def test_gradcheck(modality):
    assert torch.autograd.gradcheck(lambda *tensors: moda_gates(*tensors, modality), parameters(dtype=torch.float64))


@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_is_trained_gets_a_gradient(trained):
    both = parameters()
    both[1 - trained].requires_grad_(False)
    moda_gates(*both, 1).square().sum().backward()
    assert both[trained].grad is not None
    assert both[1 - trained].grad is None


def test_a_modality_s_gradient_leaves_the_others_embeddings_alone():
    gate_embedding, gate_proj = parameters()
    moda_gates(gate_embedding, gate_proj, 1).square().sum().backward()
    assert gate_embedding.grad[1].abs().min() > 0
    assert gate_embedding.grad[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("modality", [-1, 1])
def test_opcheck(modality):
    layers = parameters(), parameters(experts=4, gate_dim=3, seed=1)
    gate_embeddings, gate_projs = map(list, zip(*layers, strict=True))
    torch.library.opcheck(torch.ops.sda_fast.moda_gates, (gate_embeddings, gate_projs, modality))


def test_autocast_does_not_round_gates():
    both = parameters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = moda_gates(*both)
    torch.testing.assert_close(under_autocast, moda_gates(*both), rtol=0, atol=0)


def test_compiled_gates_are_the_same():
    ours, theirs = parameters(), parameters()
    compiled = torch.compile(lambda *tensors: moda_gates(*tensors, 1), fullgraph=True, backend="aot_eager")
    compiled(*ours).square().sum().backward()
    moda_gates(*theirs, 1).square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("modality", [-1, 3])
def test_an_unknown_modality_is_refused(modality):
    with pytest.raises(ValueError, match=f"modality id {modality} is not below the number of modalities, 3"):
        moda_gates(*parameters(), modality)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \(3, 7\) and \(5, 6\)"):
        moda_gates(torch.zeros(3, 7), torch.zeros(5, 6))


def test_a_layer_whose_gate_parameters_do_not_fit_is_refused_too():
    layer = MoDALinear(torch.nn.Linear(4, 4), r=5, num_experts=5)
    layer.gate_embedding.data = torch.zeros(3, 7)
    layer.gate_proj.data = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"got \(3, 7\) and \(5, 6\)"):
        layer(torch.zeros(2, 4), 0)


@pytest.mark.parametrize("modality", [-1, 1])
def test_layers_of_one_size_have_their_gates_from_one_launch(modality, monkeypatch):
    from sda_fast.kernels import gates as kernels
    from sda_fast.ops import gates as operation

    layers = [*(parameters(seed=seed) for seed in range(4)), parameters(experts=4, seed=4), parameters(seed=5)]
    gate_embeddings, gate_projs = map(list, zip(*layers, strict=True))
    expected = torch.ops.sda_fast.moda_gates(gate_embeddings, gate_projs, modality)
    weights = [torch.linspace(-1, 1, one.numel()).view(one.shape) for one in expected]
    flat = [*gate_embeddings, *gate_projs]
    gradients = torch.autograd.grad(expected, flat, weights)
    launches = []

    def counted(function):
        return lambda *arguments, **options: launches.append(len(arguments[0])) or function(*arguments, **options)

    monkeypatch.setattr(operation, "takes_triton", lambda *layers: True)
    for name in ("gates_of_layers", "gates_backward_of_layers"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    ours = torch.ops.sda_fast.moda_gates(gate_embeddings, gate_projs, modality)
    assert launches == [3, 1, 1, 1]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(ours, flat, weights), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert launches == 2 * [3, 1, 1, 1]
