"""Gradient checkpointing repeats no frozen product whose result nothing needs, and gradients stay what they are."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from sda_fast.ops.moda_linear import moda_linear_group

ROWS, WIDTH, RANK, EXPERTS = 6, 64, 4, 2


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Block(nn.Module):
    """A group of two layers, a nonlinearity, a layer back to the residual; all adapted."""

    def __init__(self, quantized=False, last_norm=False, dtype=torch.float32, backend="torch"):
        super().__init__()
        self.backend = backend
        self.weights = [draw(WIDTH, WIDTH, seed=i, dtype=dtype) / 8 for i in range(3)]
        if quantized:
            from bitsandbytes.nn import Params4bit

            self.weights = [
                Params4bit(w, requires_grad=False, quant_type="nf4", blocksize=64).to("cpu") for w in self.weights
            ]
        self.lora_A = nn.ParameterList(draw(RANK, WIDTH, seed=10 + i) / 8 for i in range(3))
        self.lora_B = nn.ParameterList(draw(WIDTH, RANK, seed=20 + i) / 2 for i in range(3))
        self.gates = nn.ParameterList(draw(2, EXPERTS, seed=30 + i).softmax(1) for i in range(3))
        self.last_norm = nn.LayerNorm(WIDTH, dtype=dtype) if last_norm else nn.Identity()

    def adapted(self, x, layers, dropout=0.25):
        return moda_linear_group(
            x,
            self.weights[layers],
            list(self.lora_A)[layers],
            list(self.lora_B)[layers],
            list(self.gates)[layers],
            torch.tensor([0, 1]),
            scalings=[2.0] * len(self.weights[layers]),
            biases=[None] * len(self.weights[layers]),
            dropout=dropout,
            backend=self.backend,
        )

    def forward(self, x):
        gate, up = self.adapted(x, slice(0, 2))
        return x + self.last_norm(self.adapted(torch.tanh(gate) * up, slice(2, 3))[0])


@pytest.fixture
def step(operation_counter):
    return functools.partial(gradients_and_calls, operation_counter)


def gradients_and_calls(operation_counter, blocks, dtype=torch.float32, **checkpointing):
    """All gradients of a small step from the same random state, and the operations that ran."""
    torch.manual_seed(3)
    x = draw(2, ROWS // 2, WIDTH, seed=4, dtype=dtype).requires_grad_()
    with operation_counter() as operations:
        hidden = x
        for block in blocks:
            hidden = checkpoint(block, hidden, **checkpointing) if checkpointing else block(hidden)
        hidden.square().mean().backward()
    parameters = [one for block in blocks for one in block.parameters()]
    gradients = [hidden.detach(), x.grad, *(one.grad for one in parameters)]
    for one in parameters:
        one.grad = None
    return gradients, operations.calls


def assert_same_bits(given, expected):
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("torch", torch.float64),
        ("triton", torch.float32),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_last_product_of_a_checkpointed_block_is_made_once(quantized, backend, dtype, step):
    if quantized and dtype == torch.float64:
        pytest.skip("bitsandbytes quantises no float64")
    blocks = [Block(quantized, dtype=dtype, backend=backend) for _ in range(2)]
    expected, _ = step(blocks, dtype)
    given, calls = step(blocks, dtype, use_reentrant=False)
    assert_same_bits(given, expected)
    assert calls["moda_group"] == 4
    # Recomputed: what backward needs of both calls of each block, but only gate's and up's outputs.
    assert calls["moda_group_hidden"] == 4
    assert calls["moda_group_outputs"] == 2
    assert calls["moda_group_backward"] == 4


def test_a_product_whose_result_is_needed_is_repeated(step):
    blocks = [Block(last_norm=True) for _ in range(2)]
    expected, _ = step(blocks)
    given, calls = step(blocks, use_reentrant=False)
    assert_same_bits(given, expected)
    assert calls["moda_group_hidden"] == calls["moda_group_outputs"] == 4


def test_torchs_switch_for_stopping_early_turns_it_off(step):
    blocks = [Block() for _ in range(2)]
    expected, _ = step(blocks)
    with set_checkpoint_early_stop(False):
        given, calls = step(blocks, use_reentrant=False)
    assert_same_bits(given, expected)
    assert calls["moda_group_outputs"] == 4


def test_reentrant_checkpointing_repeats_everything_and_gives_the_same(step):
    blocks = [Block() for _ in range(2)]
    expected, _ = step(blocks)
    given, calls = step(blocks, use_reentrant=True)
    assert_same_bits(given, expected)
    assert calls["moda_group_outputs"] == 4


def test_without_checkpointing_nothing_runs_in_two_parts(step):
    _, calls = step([Block()])
    assert calls["moda_group"] == 2 and calls["moda_group_hidden"] == calls["moda_group_outputs"] == 0


def test_a_second_backward_pass_over_a_kept_graph_recomputes_again():
    block = Block()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = draw(2, 3, WIDTH, seed=4).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        loss = y.square().sum()
        results.append([torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True) for _ in range(2)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_outputs_nobody_reads_get_no_gradient():
    block = Block()

    def one_output(x):
        return x + block.adapted(torch.sin(x), slice(0, 2))[1]

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = draw(2, 3, WIDTH, seed=4).requires_grad_()
        y = checkpoint(one_output, x, use_reentrant=False) if checkpointed else one_output(x)
        results.append(torch.autograd.grad(y.square().sum(), [x, block.lora_A[1], block.lora_B[1], block.gates[1]]))
    assert_same_bits(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_of_both_parts(dropout):
    x = draw(ROWS, WIDTH, seed=1)
    adapters = [draw(RANK, WIDTH, seed=2), draw(8, RANK, seed=3), draw(2, EXPERTS, seed=4)]
    seed = torch.tensor([5]) if dropout else None
    torch.library.opcheck(torch.ops.sda_fast.moda_group_hidden, (x, adapters, dropout, seed, "torch"))
    h, _ = torch.ops.sda_fast.moda_group_hidden(x, adapters, dropout, seed, "torch")
    ids = torch.tensor([0, 1])
    arguments = (x, h, [draw(8, WIDTH, seed=6)], adapters, [8, WIDTH, 0, 0, 0, 0], [2.0], ids, "torch")
    torch.library.opcheck(torch.ops.sda_fast.moda_group_outputs, arguments)
