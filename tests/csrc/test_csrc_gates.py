"""The CUDA kernels of the gates, run thread by thread on the host, against the operation in PyTorch."""

import pytest
import torch

from sda_fast.ops.gates import moda_gates

SIZES = [(2, 8, 64), (1, 1, 1), (3, 5, 7), (2, 64, 64), (2, 256, 33), (4, 9, 300)]


def parameters(sizes, dtype):
    modalities, experts, gate_dim = sizes
    draw = torch.Generator().manual_seed(experts)
    shapes = (modalities, gate_dim), (experts, gate_dim)
    return [torch.randn(*shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gates_and_gradients_equal_the_operation(emulated_kernels, sizes, dtype):
    embedding, proj = parameters(sizes, dtype)
    for modality in (-1, sizes[0] - 1):
        expected = moda_gates(embedding, proj, None if modality < 0 else modality)
        gates = emulated_kernels.gates(embedding, proj, modality)
        torch.testing.assert_close(gates, expected.detach())
        dgates = torch.linspace(-1, 1, gates.numel()).view(gates.shape)
        of_both = torch.autograd.grad(expected, (embedding, proj), dgates)
        for needs in ((True, True), (True, False), (False, True)):
            given = emulated_kernels.gates_backward(dgates, gates, embedding, proj, modality, needs)
            for one, other, needed in zip(given, of_both, needs, strict=True):
                assert (one is not None) == needed
                if needed:
                    torch.testing.assert_close(one, other, atol=1e-6, rtol=torch.finfo(dtype).eps * 4)


def test_large_logits_do_not_overflow(emulated_kernels):
    gates = emulated_kernels.gates(torch.full((1, 4), 100.0), torch.tensor([[100.0] * 4, [-100.0] * 4]), 0)
    assert gates.tolist() == [[1.0, 0.0]]
