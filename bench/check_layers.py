"""Whether a contestant computes what it should: outputs and gradients against the formulas of DESIGN.md, section 3.

Only what passes is timed. Sums run in float32 for 16-bit activations and in float64 for float32 ones; the formulas are
written out here and share no code with what they check, the dropout mask excepted (`keep_mask`, plain PyTorch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from baselines.moda_layers import METHODS, OURS, Contestant, Method, Settings
from cases import Case
from sda_fast.ops.dropout import dropout_scale, keep_mask

MASK_SEED = 1234


def unit_in_the_last_place(dtype: torch.dtype) -> float:
    """What rounding once to `dtype` can do at most, relative to the value; 4e-6 for sums in float32."""
    return max(torch.finfo(dtype).eps, 2**-18)


def dense_weight(base_layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The frozen weight, decoded."""
    state = getattr(base_layer.weight, "quant_state", None)
    if state is None:
        return base_layer.weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base_layer.weight.data, state).to(dtype)


class PlainVersion:
    """One case worked out plainly; the products with the frozen weight are made once for all contestants."""

    def __init__(self, case: Case, base_layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.settings = case.settings
        self.wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        self.x, self.dy = x.detach().to(self.wide), dy.to(self.wide)
        weight = dense_weight(base_layer, self.wide)
        self.y, self.dx = self.x @ weight.t(), self.dy @ weight

    def expected(self, contestant: Contestant, keep: Tensor | None = None) -> dict[str, tuple[Tensor, float]]:
        """y, dx, and where there is an adapter dA, dB and the gradient of the gate's projection.

        Each with the size that its error is relative to: its Euclidean norm, but for the gate, whose sums over rows
        cancel, at least the root of the sum of the squared terms, to which their rounding errors add up.
        """
        if not contestant.lora_A:
            return with_norms({"y": self.y, "dx": self.dx})
        A = torch.cat([part.detach() for part in contestant.lora_A]).to(self.wide)
        B = torch.cat([part.detach() for part in contestant.lora_B], dim=1).to(self.wide)
        s, experts = self.settings.scaling, self.settings.num_experts
        mask = 1.0 if keep is None else keep * dropout_scale(self.settings.dropout)
        if contestant.gate is None:
            gate = torch.full((A.shape[0],), s, dtype=self.wide, device=A.device)
        else:
            embedding = contestant.gate[0].detach()[0].to(self.wide)
            projection = contestant.gate[1].detach().to(self.wide).requires_grad_()
            gates = torch.softmax(projection @ embedding, dim=-1)
            gate = s * gates.detach().repeat_interleave(A.shape[0] // experts)
        dropped = self.x * mask
        h, dhg = dropped @ A.t(), self.dy @ B
        dh = dhg * gate
        values = with_norms(
            {
                "y": self.y + (h * gate) @ B.t(),
                "dx": self.dx + (dh @ A) * mask,
                "dA": dh.t() @ dropped,
                "dB": self.dy.t() @ (h * gate),
            }
        )
        if contestant.gate is not None and experts > 1:
            terms = s * (dhg * h).t().reshape(experts, -1)
            dprojection = torch.autograd.grad(gates, projection, terms.sum(1))[0]
            uncancelled = float((gates.detach() * terms.norm(dim=1)).norm() * embedding.norm())
            values["dgate"] = dprojection, max(float(dprojection.norm()), uncancelled)
        return values


def with_norms(values: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    return {name: (value, float(value.norm())) for name, value in values.items()}


def results(contestant: Contestant, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same from the contestant itself."""
    x = x.detach().clone().requires_grad_()
    contestant.layer.zero_grad()
    y = contestant.layer(x)
    y.backward(dy)
    values = {"y": y.detach(), "dx": x.grad}
    if contestant.lora_A:
        values["dA"] = torch.cat([part.grad for part in contestant.lora_A])
        values["dB"] = torch.cat([part.grad for part in contestant.lora_B], dim=1)
    if contestant.gate is not None:
        values["dgate"] = contestant.gate[1].grad
    contestant.layer.zero_grad()
    return values


def relative_errors(actual: dict[str, Tensor], expected: dict[str, tuple[Tensor, float]]) -> dict[str, float]:
    """Relative errors in the Euclidean norm; NaN counts as infinite."""
    errors = {
        name: float((actual[name].to(truth.dtype) - truth).norm()) / size for name, (truth, size) in expected.items()
    }
    return {name: error if error == error else float("inf") for name, error in errors.items()}


@dataclass(frozen=True)
class Verdict:
    """The largest relative error of a method, and what it has to be blamed for ("" if nothing)."""

    error: float
    fault: str = ""


class Checker:
    """Judges methods on one case: no relative error may exceed a unit in the last place of the activations' dtype."""

    def __init__(self, case: Case, base_layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.case, self.base_layer, self.x, self.dy = case, base_layer, x, dy
        self.plain = PlainVersion(case, base_layer, x, dy)
        self.allowed = unit_in_the_last_place(x.dtype)

    def errors(self, contestant: Contestant, keep: Tensor | None = None) -> dict[str, float]:
        return relative_errors(results(contestant, self.x, self.dy), self.plain.expected(contestant, keep))

    def judge(self, name: str) -> Verdict:
        """Compare a method with its dropout off, and ours, whose mask the seed gives away, with dropout on as well."""
        still = replace(self.case.settings, dropout=0.0)
        errors = [self.errors(build(METHODS[name], still, self.base_layer))]
        if self.case.settings.dropout and name == OURS:
            errors.append(self.errors_with_dropout(build(METHODS[name], self.case.settings, self.base_layer)))
        faults = [
            f"the error of its {quantity} is {error:.1e}, allowed are {self.allowed:.1e}"
            for of_run in errors
            for quantity, error in of_run.items()
            if error > self.allowed
        ]
        return Verdict(max(max(of_run.values()) for of_run in errors), "; ".join(faults))

    def errors_with_dropout(self, contestant: Contestant) -> dict[str, float]:
        torch.manual_seed(MASK_SEED)
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=self.x.device)
        keep = keep_mask(*self.x.shape, self.case.settings.dropout, int(seed), self.x.device)
        torch.manual_seed(MASK_SEED)
        return self.errors(contestant, keep)


def build(method: Method, settings: Settings, base_layer: nn.Module) -> Contestant:
    """A contestant with the same initial gate whatever was built before it."""
    torch.manual_seed(0)
    contestant = method.build(settings, base_layer)
    contestant.layer.train()
    return contestant
