"""Random cases of the operation through Triton against the formula in float64, at ranks and experts to the limits."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sda_fast.ops import regimes
from sda_fast.ops.dropout import dropout_scale, keep_mask
from sda_fast.ops.moda_linear import moda_linear_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (R, E): of one layer 256 at most, of a group more than one block of 256.
ADAPTERS = ((64, 64), (96, 3), (128, 8), (256, 64), (256, 1), (8, 8), (1, 1))
LAYOUTS = ("per sequence", "per token", "one id", "one line", "per row gates")


@dataclass
class Case:
    """Layers that share x, and what they are called with."""

    x: Tensor
    weights: list[Tensor]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    gates: list[Tensor]
    ids: Tensor | int | None
    scalings: list[float]
    biases: list[Tensor | None]
    dropout: float
    seed: int
    way: regimes.Update

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.lora_A, *self.lora_B, *self.gates]


def drawn(seed: int) -> Case:
    """Three layers; every third case has them alike, as in a model, and every fourth has strided tensors."""
    choices, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, strided: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.mT.contiguous().mT if strided else values

    leading = choices.choice(((5,), (3, 7), (2, 17), (40,)))
    K, layout, modalities = choices.choice((7, 16, 40, 130)), choices.choice(LAYOUTS), choices.choice((1, 2, 5))
    strided = seed % 4 == 0
    rows = torch.Size(leading).numel()
    lines = {"one line": 1, "per row gates": rows}.get(layout, modalities)
    dtype = choices.choice((torch.float32, torch.float16))
    case = Case(
        normal(*leading, K, strided=strided).to(DEVICE, dtype).requires_grad_(), [], [], [], [], None, [], [],
        dropout=choices.choice((0.0, 0.1, 0.5)), seed=choices.randrange(2**63),
        way=choices.choice(("before", "in place", "accumulator")),
    )  # fmt: skip
    kinds = [choices.choice(ADAPTERS)] * 3 if seed % 3 == 0 else choices.sample(ADAPTERS[:5], 3)
    for R, E in kinds:
        N = choices.choice((3, 16, 33, 130))
        case.weights.append(normal(N, K, scale=K**-0.5, strided=strided).to(DEVICE, dtype))
        case.lora_A.append(normal(R, K, scale=K**-0.5, strided=strided).to(DEVICE).requires_grad_())
        case.lora_B.append(normal(N, R, scale=R**-0.5, strided=strided).to(DEVICE).requires_grad_())
        case.gates.append(torch.softmax(normal(lines, E), -1).to(DEVICE).requires_grad_())
        case.scalings.append(4.0 if seed % 3 == 0 else choices.choice((0.5, 4.0)))
        case.biases.append(normal(N).to(DEVICE, dtype) if choices.random() < 0.5 else None)
    if layout in ("per sequence", "per token"):
        shape = leading if layout == "per token" else leading[:1]
        kind = choices.choice((torch.int64, torch.int32, torch.uint8))
        case.ids = torch.randint(0, modalities, shape, generator=generator).to(DEVICE, kind)
    elif layout == "one id":
        case.ids = modalities - 1
    return case


def expected_of(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, the tensors that require grad, and the layers' h, in float64."""
    inputs = [one.detach().double().requires_grad_() for one in case.tensors()]
    x, rest = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1:]
    M, K = x.shape
    dropped = x
    if case.dropout:
        dropped = x * keep_mask(M, K, case.dropout, case.seed).to(DEVICE) * dropout_scale(case.dropout)
    outputs, hidden = [], []
    for A, B, gates, weight, bias, scaling in zip(
        rest[:3], rest[3:6], rest[6:], case.weights, case.biases, case.scalings, strict=True
    ):
        if isinstance(case.ids, int):
            gates = gates[case.ids].expand(M, -1)
        elif case.ids is not None:
            gates = gates[case.ids.long().reshape(-1).repeat_interleave(M // case.ids.numel())]
        of_rows = scaling * gates.expand(M, -1).repeat_interleave(A.shape[0] // gates.shape[1], 1)
        hidden.append(dropped @ A.t())
        y = x @ weight.double().t() + (hidden[-1] * of_rows) @ B.t()
        outputs.append((y if bias is None else y + bias.double()).view(*case.x.shape[:-1], -1))
    return outputs, inputs, hidden


def size_of_gate_terms(dy: Tensor, B: Tensor, h: Tensor, scaling: float, experts: int) -> Tensor:
    """Norm over experts of what their gates' gradients are sums of, |dhg h|: the sums themselves cancel."""
    terms = ((dy.double().reshape(len(h), -1) @ B.double()) * h).abs() * scaling
    return terms.sum(0).view(experts, -1).sum(1).norm()


@pytest.mark.parametrize("seed", range(20))
def test_triton_gives_the_formula_whatever_ranks_layouts_and_strides_are(seed: int) -> None:
    case = drawn(seed)
    with regimes.forced_update(case.way):
        outputs = moda_linear_group(
            case.x, case.weights, case.lora_A, case.lora_B, case.gates, case.ids, scalings=case.scalings,
            biases=case.biases, dropout=case.dropout, seed=case.seed, backend="triton",
        )  # fmt: skip
        directions = [torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y) for y in outputs]
        gradients = torch.autograd.grad(outputs, case.tensors(), directions)
    expected, inputs, hidden = expected_of(case)
    wanted = torch.autograd.grad(expected, inputs, [one.double() for one in directions])
    tolerance = 32 * torch.finfo(case.x.dtype).eps
    for ours, exact in zip([*outputs, *gradients[:-3]], [*expected, *wanted[:-3]], strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
    for i, (ours, exact) in enumerate(zip(gradients[-3:], wanted[-3:], strict=True)):
        size = size_of_gate_terms(directions[i], case.lora_B[i], hidden[i], case.scalings[i], ours.shape[1])
        assert (ours.double() - exact).norm() <= tolerance * size
