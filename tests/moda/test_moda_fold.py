"""Folding in evaluation: it meets the bound of docs/folding.md, happens only where it may, and is never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDAConfig, MoDALinear, adapt_model, load_adapter, modality, save_adapter
from sda_fast.moda import fold
from sda_fast.moda.fold import fold_model, unfold_model
from sda_fast.ops import cuda_library, fold_regimes, folding, moda_evaluate
from sda_fast.ops.fold_regimes import Way, evaluation_way, forced_evaluation
from sda_fast.ops.folding import folded_weight
from sda_fast.ops.moda_torch import Member
from sda_fast.ops.quantized import WeightLayout, decode, describe_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 128), (33, 100), (1, 17), (129, 64)]


def layer(N: int, K: int, *, quantised: bool = False, dtype: torch.dtype = torch.float32, **options) -> MoDALinear:
    """An adapted layer in evaluation whose update is a few per cent of y."""
    torch.manual_seed(N * 1000 + K)
    if quantised:
        bnb = pytest.importorskip("bitsandbytes")
        base = bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4").to("cpu")
    else:
        base = nn.Linear(K, N).to(dtype)
    made = MoDALinear(base, **{"num_experts": 4, **options})
    nn.init.normal_(made.lora_B, std=0.02)
    return made.eval()


def subnormal_rounding(dtype: torch.dtype) -> float:
    """The largest rounding error of a number too small for a relative one."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def difference_bound(one: MoDALinear, x: Tensor, modality_id: int) -> Tensor:
    """The bound of docs/folding.md for every output element, float64."""
    dtype, K, R = x.dtype, x.shape[-1], one.r
    u = torch.finfo(dtype).eps / 2
    u = u / (1 - 8 * u)
    x = x.detach().double().abs()
    weight = decode(*describe_weight(one.weight), torch.float32).clone().double()
    gates = one.gates()[modality_id].detach().double().repeat_interleave(R // one.num_experts) * one.scaling
    lora_A, lora_B = one.lora_A.detach().double().abs(), one.lora_B.detach().double().abs() * gates
    bias = one.bias.to(dtype).double().abs()
    base, update = x @ weight.abs().t() + bias, x @ lora_A.t() @ lora_B.t()
    accumulated = 2 * (K + R + 4) * 2**-24 * (base + update)
    rounded = u * (5 * base + 8 * update)
    sum_x, sum_B, h = x.sum(-1, keepdim=True), one.lora_B.detach().double().abs().sum(1), x @ lora_A.t()
    numbers = (2 + lora_B.sum(1)) * sum_x + lora_B.sum(1) + sum_B + (h * gates).sum(-1, keepdim=True) + 4
    return rounded + accumulated + numbers * subnormal_rounding(dtype)


def evaluate(one: nn.Module, x: Tensor, which: object = 1, way: str = "fold") -> Tensor:
    with torch.no_grad(), forced_evaluation(way):  # type: ignore[arg-type]
        return one(x, which)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ways that evaluation went, and the weights that were folded to be kept."""
    seen: list[str] = []

    def spy(module: object, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **o: (seen.append(name), function(*a, **o))[1])

    for name in ("folded_output", "small_output", "unfolded_output"):
        spy(moda_evaluate, name)
    spy(fold, "fold_layer")
    yield seen


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_and_unfolded_differ_by_less_than_the_bound_and_the_update_is_more(
    dtype: torch.dtype, shape: tuple[int, int], quantised: bool
) -> None:
    one = layer(*shape, quantised=quantised, dtype=dtype)
    x = torch.randn(3, 7, shape[1]).to(dtype)
    with forced_evaluation("fold"):
        unfolded = one(x, 1)
    folded, beside = evaluate(one, x), evaluate(one, x, way="unfold")
    assert unfolded.requires_grad and not folded.requires_grad and folded.dtype == dtype
    torch.testing.assert_close(beside, unfolded, rtol=0, atol=0)
    bound = difference_bound(one, x, 1)
    assert ((folded.double() - unfolded.double()).abs() <= bound).all()
    weight = decode(*describe_weight(one.weight), torch.float32).double()
    frozen = x.double() @ weight.t() + one.bias.to(dtype).double()
    if shape[0] > 1:
        assert (folded.double() - frozen).norm() > (10 if dtype == torch.float32 else 1) * (folded - unfolded).norm()


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_folded_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype, quantised: bool) -> None:
    one = layer(33, 100, quantised=quantised, dtype=dtype)
    layout, data, statistics = describe_weight(one.weight)
    gates = one.gates()[1:].detach()
    lora_A, lora_B = one.lora_A.detach(), one.lora_B.detach()
    member = Member(layout, data, statistics, None, lora_A, lora_B, gates, one.scaling, slice(0, one.r))
    ours = folded_weight(member, dtype, backend="torch", out=torch.full((33, 100), torch.nan, dtype=dtype))
    gate = gates[0].double().repeat_interleave(2) * one.scaling
    update = (lora_B.double() * gate) @ lora_A.double()
    exact = decode(layout, data, statistics, torch.float32).double() + update
    assert (ours == exact.to(dtype)).float().mean() > (0.5 if dtype == torch.float32 else 0.99)
    atol = 1e-8 if dtype == torch.float32 else subnormal_rounding(dtype)
    torch.testing.assert_close(ours.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("quantised", [False, True])
def test_chunks_of_rows_of_any_size_give_the_same_weight(quantised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(129, 100, quantised=quantised)
    x = torch.randn(40, 100).bfloat16()
    whole = evaluate(one, x)
    monkeypatch.setattr(folding, "ELEMENTS_PER_CHUNK", {"cpu": 300})
    torch.testing.assert_close(evaluate(one, x), whole)


def test_float64_is_folded_in_float64() -> None:
    one = layer(10, 12, dtype=torch.float64, adapter_dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(evaluate(one, x), one(x, 1).detach(), rtol=0, atol=1e-13)


def test_it_folds_only_without_gradients_in_evaluation_with_one_modality_for_all(calls: list[str]) -> None:
    one = layer(24, 16, lora_dropout=0.5)
    x = torch.randn(4, 6, 16)
    with forced_evaluation("fold"):
        one(x, 1)
        with modality([0, 1, 1, 0]), torch.no_grad():
            one(x)
        with torch.no_grad():
            one(x, torch.ones(4, 6, dtype=torch.int64))
            one.train()(x, 1)
            nn.Module.eval(one)
        assert calls == []
        with torch.inference_mode():
            one(x, 1)
        with torch.no_grad(), modality("text"):
            one(x)
    assert calls == ["folded_output"] * 2


def test_on_a_cpu_many_rows_are_folded_and_few_are_not() -> None:
    layout = WeightLayout(256, 256)
    for dtype in (torch.float32, torch.bfloat16):
        assert evaluation_way(torch.zeros(1, 256, dtype=dtype), layout, "torch", False).what == "unfold"
        assert evaluation_way(torch.zeros(4096, 256, dtype=dtype), layout, "torch", False).what == "fold"


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_folds_by_itself_where_that_pays_and_keeps_nothing(
    dtype: torch.dtype, quantised: bool, calls: list[str]
) -> None:
    one = layer(64, 128, quantised=quantised, dtype=dtype)
    x = torch.randn(500, 128).to(dtype)
    expected = one(x, 1)
    with torch.no_grad(), modality("text"):
        y = one(x)
    assert calls == ["folded_output"] and one.folded.by_modality == {}
    assert ((y.double() - expected.double()).abs() <= difference_bound(one, x, 1)).all()
    with torch.no_grad(), modality([1] * 500):
        one(x)
    assert calls == ["folded_output"]


def test_where_kernels_decode_the_weights_size_and_the_rows_decide_who_multiplies() -> None:
    small, large = WeightLayout(512, 3584, 1, 64), WeightLayout(3584, 3584, 1, 64)
    for rows, by_library, in_triton in ((1, "small product", "unfold"), (17, "fold", "unfold"), (9000, "fold", "fold")):
        x = torch.zeros(1, 3584).half().expand(rows, 3584)
        assert evaluation_way(x, large, "torch", True) == Way(by_library, by_library=True)
        assert evaluation_way(x, large, "triton", False) == Way(in_triton)
        assert evaluation_way(x, small, "torch", True) == Way("fold", by_library=True)
        assert evaluation_way(x, small, "triton", False) == Way("fold")
    with pytest.raises(ValueError, match="'merge'"), forced_evaluation("merge"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("rows", [0, 1, 5, 100])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 100), (20, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_agrees_to_the_bound(
    dtype: torch.dtype, shape: tuple[int, int], quantised: bool, rows: int, calls: list[str]
) -> None:
    # Triton's interpreter does not compute bfloat16 rightly.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = layer(*shape, quantised=quantised, dtype=dtype).to(device)
    x = torch.randn(rows, shape[1]).to(device, dtype)
    expected = one(x, 1)
    one.backend = "triton"
    y = evaluate(one, x, way="small product" if rows <= 64 and quantised else "fold")
    assert calls == ["small_output" if rows <= 64 and quantised else "folded_output"]
    assert y.shape == expected.shape
    assert ((y.double() - expected.double()).abs() <= difference_bound(one, x, 1)).all()


@pytest.mark.parametrize("rows", [5, 100])
def test_the_cuda_library_is_given_what_it_asks_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(64, 128, quantised=True, dtype=torch.bfloat16)
    x = torch.randn(rows, 128).bfloat16()
    one.keep_repacked = False
    called = []

    def decode_fold(layout, data, statistics, lora_A, lora_B, gates, scaling, out):
        called.append("fold")
        update = scaling * (lora_B * gates.repeat_interleave(2)) @ lora_A
        return out.copy_(decode(layout, data, statistics, torch.float32) + update)

    def linear(x, layout, data, statistics, bias, hidden, lora_B, gates, scaling, splits):
        assert splits == 0
        called.append("linear")
        hidden = hidden * scaling * gates.repeat_interleave(2)
        y = x.float() @ decode(layout, data, statistics, torch.float32).t() + bias.float() + hidden @ lora_B.t()
        return y.to(x.dtype)

    monkeypatch.setattr(cuda_library, "is_available", lambda device: True)
    monkeypatch.setattr(cuda_library, "decode_fold", decode_fold)
    monkeypatch.setattr(cuda_library, "linear", linear)
    with torch.no_grad(), forced_evaluation("small product" if rows <= 64 else "fold", by_library=True):
        y = one(x, 1)
    assert called == ["linear" if rows <= 64 else "fold"]
    assert ((y.double() - one(x, 1).double()).abs() <= difference_bound(one, x, 1)).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_own_product_agrees_to_the_bound(
    backend: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's interpreter does not compute bfloat16 rightly.
    dtype = torch.bfloat16 if backend == "torch" else torch.float16
    one, x = layer(64, 128, quantised=True, dtype=dtype), torch.randn(7, 128).to(dtype)
    if not nested:
        from bitsandbytes.nn import Params4bit

        weight = decode(*describe_weight(one.weight), torch.float32).clone()
        one.base_layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        one.base_layer.to("cpu")
    expected = one(x, 1)
    one.backend = backend
    with monkeypatch.context() as patched:
        # On a CPU it is not among the ways of a weight as it is, only of a repacked copy.
        one.keep_repacked = False
        patched.setattr(fold_regimes, "bitsandbytes_multiplies", lambda device, dtype, layout: True)
        patched.setattr(fold_regimes, "way_of", fold_regimes.way_of.__wrapped__)
        called = []
        real = moda_evaluate.bitsandbytes_output
        patched.setattr(moda_evaluate, "bitsandbytes_output", lambda *a: (called.append(a), real(*a))[1])
        y = evaluate(one, x, way="bitsandbytes")
    assert len(called) == 1
    assert ((y.double() - expected.double()).abs() <= difference_bound(one, x, 1)).all()


def test_autocast_folds_in_its_dtype() -> None:
    one = layer(64, 128)
    x = torch.randn(9, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = evaluate(one, x)
        one.cache_folded = True
        kept = evaluate(one, x)
    assert y.dtype == kept.dtype == torch.bfloat16
    assert torch.equal(y, evaluate(layer(64, 128), x.bfloat16()))
    assert torch.equal(y, kept)


def test_a_folded_layer_compiles_into_one_graph() -> None:
    one = layer(24, 16)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x = torch.randn(100, 16)
    with torch.no_grad(), modality("image"):
        torch.testing.assert_close(compiled(x), one(x))
    packed = describe_weight(one.weight)[1]
    adapter = [one.lora_A, one.lora_B, one.gates()[:1]]
    arguments = (x, [packed], [tensor.detach() for tensor in adapter], [24, 16, 0, 0, 0, 0], [4.0], "torch", False)
    torch.library.opcheck(torch.ops.sda_fast.moda_evaluate, arguments)


def test_nothing_is_kept_by_default_and_one_weight_per_modality_if_told(calls: list[str]) -> None:
    one = layer(24, 16)
    x = torch.randn(50, 16)
    expected = [evaluate(one, x, which) for which in (0, 1)]
    assert one.folded.by_modality == {}
    one.cache_folded = True
    calls.clear()
    for _ in range(3):
        for which in (0, 1):
            assert torch.equal(evaluate(one, x, which), expected[which])
    assert calls == ["fold_layer", "fold_layer"]
    for dtype in DTYPES:
        assert evaluate(one, x.to(dtype)).dtype == dtype


def test_a_folded_model_keeps_the_weights_of_one_modality_until_unfolded(calls: list[str]) -> None:
    model = nn.Sequential(layer(24, 16), nn.Tanh(), layer(8, 24))
    x = torch.randn(5, 16)
    for name in ("image", "text"):
        fold_model(model, name)
        for which in ("image", "text", 0):
            with torch.no_grad(), modality(which):
                model(x)
        assert [list(model[i].folded.by_modality) for i in (0, 2)] == [[("image", "text").index(name)]] * 2
    unfold_model(model)
    assert not model[0].folded.by_modality and model[0].cache_folded is False
    for wrong in ("sound", 2, -1, True, 1.0):
        with pytest.raises(ValueError, match=f"{wrong!r} is not among"):
            fold_model(model, wrong)  # type: ignore[arg-type]
    fold_model(model, torch.tensor(1))  # type: ignore[arg-type]
    assert model[0].cache_folded == 1
    with pytest.raises(ValueError, match="Linear has no adapted layers"):
        fold_model(nn.Linear(2, 2), "text")


@pytest.mark.parametrize("keeps", [True, False])
def test_an_x_that_does_not_fit_is_the_same_error_with_kept_weights(keeps: bool) -> None:
    one = layer(24, 16, cache_folded=keeps)
    evaluate(one, torch.zeros(3, 16))
    for x, message in (
        (torch.zeros(3, 15), "the weight takes 16 features"),
        (torch.tensor(1.0), r"x has shape \(\) but"),
        (torch.ones(3, 16, dtype=torch.int64), "x must be one of float64, .* got int64"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(one, x)


def sgd(one: MoDALinear, **options: object) -> None:
    for parameter in one.adapter_tensors():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(one.adapter_tensors(), lr=0.1, **options).step()  # type: ignore[arg-type]


def in_place(name: str) -> Callable[[MoDALinear], None]:
    def change(one: MoDALinear) -> None:
        with torch.inference_mode():
            one.get_parameter(name).mul_(-1)

    return change


def replace_data_twice(one: MoDALinear) -> None:
    for _ in range(2):
        one.lora_B.data = one.lora_B.data * 2


def replace_parameter(one: MoDALinear) -> None:
    one.lora_A = nn.Parameter(-one.lora_A.detach())


def other_scaling(one: MoDALinear) -> None:
    one.scaling *= 2


def load_state(one: MoDALinear) -> None:
    one.load_state_dict({name: value + 0.1 for name, value in one.state_dict().items()})


def requantise(one: MoDALinear) -> None:
    one.base_layer = nn.Linear(16, 24)


CHANGES = {
    **{f"{name} in place": in_place(name) for name in ("lora_A", "lora_B", "gate_embedding", "gate_proj")},
    "base weight in place": in_place("base_layer.weight"),
    "optimizer": sgd,
    "fused optimizer": lambda one: sgd(one, fused=True),
    "foreach optimizer": lambda one: sgd(one, foreach=True),
    "data replaced": replace_data_twice,
    "parameter replaced": replace_parameter,
    "other base layer": requantise,
    "scaling": other_scaling,
    "load_state_dict": load_state,
    "dtype": lambda one: one.to(torch.bfloat16),
    "there and back": lambda one: one.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_kept_weight_is_never_stale(change: Callable[[MoDALinear], object]) -> None:
    one = layer(24, 16)
    one.cache_folded = True
    x = torch.randn(50, 16)
    before = evaluate(one, x)
    assert one.folded.by_modality
    change(one)
    after = evaluate(one, x)
    one.cache_folded = False
    assert not torch.equal(after, before)
    assert torch.equal(after, evaluate(one, x))


def codes_in_place(one: MoDALinear) -> None:
    with torch.no_grad():
        one.weight.bitwise_not_()


def other_4bit_layer(one: MoDALinear) -> None:
    one.base_layer = layer(24, 16, quantised=True).base_layer
    codes_in_place(one)


def load_adapter_state(one: MoDALinear) -> None:
    adapter = {name: value + 0.1 for name, value in one.state_dict().items() if "base_layer" not in name}
    one.load_state_dict(adapter, strict=False)


def in_state(change: Callable[[Any], None]) -> Callable[[MoDALinear], None]:
    """A change of the 4-bit weight's quantisation state."""
    return lambda one: change(one.weight.quant_state)


def another_state(one: MoDALinear) -> None:
    state = copy.deepcopy(one.weight.quant_state)
    state.absmax = state.absmax.flip(0)
    one.weight.quant_state = state


CHANGES_OF_STATE: dict[str, Callable[[MoDALinear], None]] = {
    "scales replaced": in_state(lambda state: setattr(state, "absmax", state.absmax.flip(0))),
    "scales in place": in_state(lambda state: state.absmax.copy_(state.absmax.flip(0))),
    "scales' data replaced": in_state(lambda state: setattr(state.absmax, "data", state.absmax.flip(0))),
    "nested scales replaced": in_state(lambda state: setattr(state.state2, "absmax", state.state2.absmax * 3)),
    "nested scales in place": in_state(lambda state: state.state2.absmax.mul_(3)),
    "nested code replaced": in_state(lambda state: setattr(state.state2, "code", state.state2.code.flip(0))),
    "nested code in place": in_state(lambda state: state.state2.code.neg_()),
    "offset replaced": in_state(lambda state: setattr(state, "offset", state.offset * 3)),
    "offset in place": in_state(lambda state: state.offset.mul_(3)),
    "another state": another_state,
}
CHANGES_OF_4BIT = {
    **CHANGES,
    **CHANGES_OF_STATE,
    "code replaced": in_state(lambda state: setattr(state, "code", -state.code)),
    "code in place": in_state(lambda state: state.code.neg_()),
    "base weight in place": codes_in_place,
    "load_state_dict": load_adapter_state,
    "other base layer": other_4bit_layer,
}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("change", CHANGES_OF_4BIT.values(), ids=CHANGES_OF_4BIT.keys())
def test_a_4bit_layer_is_never_stale_kept_or_not(change: Callable[[MoDALinear], object], keeps: bool) -> None:
    one = layer(24, 16, quantised=True, cache_folded=keeps)
    x = torch.randn(50, 16)
    before = evaluate(one, x)
    assert bool(one.folded.by_modality) == keeps
    change(one)
    after = evaluate(one, x)
    assert not torch.equal(after, before)
    assert ((after.double() - one(x, 1).double()).abs() <= difference_bound(one, x, 1)).all()


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_training_after_folding_is_exactly_as_without_it(keeps: bool, quantised: bool) -> None:
    results = []
    for folds in (False, True):
        one = layer(24, 16, quantised=quantised, lora_dropout=0.1, cache_folded=keeps)
        x, frozen = torch.randn(50, 16), one.weight.data.clone()
        optimizer = torch.optim.AdamW(one.adapter_tensors(), lr=0.01)
        for step in range(3):
            if folds:
                evaluate(one.eval(), x)
                assert bool(one.folded.by_modality) == keeps
            torch.manual_seed(step)
            one.train()(x, 0).square().mean().backward()
            assert one.folded.by_modality == {}
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(one.weight.data, frozen)
        results.append([*(tensor.detach() for tensor in one.adapter_tensors()), evaluate(one.eval(), x)])
    for without, with_ in zip(*results, strict=True):
        assert torch.equal(without, with_)


@pytest.mark.parametrize("event", ["train", "gradients", "device", "copy"])
def test_kept_weights_are_freed_when_training_resumes_or_the_layer_moves(event: str) -> None:
    one = layer(24, 16, cache_folded=True)
    x = torch.randn(50, 16)
    evaluate(one, x)
    assert list(one.folded.by_modality) == [1]
    assert len(one.state_dict()) == 6
    if event == "train":
        one.train()
    elif event == "gradients":
        one(x, 1)
    elif event == "device":
        one.to("meta")
    else:
        assert copy.copy(one.folded).by_modality == {}
        one = copy.deepcopy(one)
    assert one.folded.by_modality == {}
    assert one.cache_folded is True


def test_parameters_whose_changes_are_not_counted_are_refused() -> None:
    with torch.inference_mode():
        one = layer(24, 16, cache_folded=True)
    with pytest.raises(RuntimeError, match="inference_mode"):
        evaluate(one, torch.randn(50, 16))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)


def attention(seed: int = 0) -> nn.Module:
    torch.manual_seed(3)
    model = nn.ModuleDict({"self_attn": Attention()}).eval()
    adapt_model(model, MoDAConfig(num_experts=4, target_modules=r".*_proj", seed=seed))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def test_layers_that_share_x_fold_each_their_own_weight(calls: list[str]) -> None:
    model = attention()
    x = torch.randn(30, 16)
    with modality("image"):
        expected = model["self_attn"](x)
        with torch.no_grad(), forced_evaluation("fold"):
            folded = model["self_attn"](x)
            assert calls == ["folded_output"] * 3
            fold_model(model, "image")
            kept = model["self_attn"](x)
            assert calls[3:] == ["fold_layer"] * 3
            model["self_attn"].k_proj.cache_folded = False
            mixed = model["self_attn"](x)
    for y in (folded, kept, mixed):
        torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)


def test_loading_an_adapter_into_a_folded_model_takes_effect(tmp_path) -> None:
    model, other = attention(), attention(seed=1)
    fold_model(model, "text")
    x = torch.randn(30, 16)
    with torch.no_grad(), modality("text"):
        expected, before = other["self_attn"](x), model["self_attn"](x)
        save_adapter(other, tmp_path)
        load_adapter(model, tmp_path)
        after = model["self_attn"](x)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_peft_adapters_fold_and_switch() -> None:
    peft = pytest.importorskip("peft")
    from sda_fast.moda.peft_tuner import MoDAPeftConfig

    torch.manual_seed(0)
    settings = {"num_experts": 4, "target_modules": r".*_proj"}
    model = peft.get_peft_model(nn.ModuleDict({"self_attn": Attention()}), MoDAPeftConfig(**settings)).eval()
    model.add_adapter("second", MoDAPeftConfig(**settings, seed=1))
    for name, parameter in model.named_parameters():
        if "moda_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(30, 16)
    block = model.base_model.model["self_attn"]
    for keep in (False, True):
        if keep:
            fold_model(model, "image")
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            model.eval()
            with modality("image"):
                with torch.no_grad(), forced_evaluation("fold"):
                    folded = block(x)
                assert all(bool(layer.folded.by_modality) == keep for layer in fold.foldable_layers(model))
                torch.testing.assert_close(folded, block(x).detach(), rtol=1e-5, atol=1e-5)
