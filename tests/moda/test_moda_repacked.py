"""Few rows on a CPU by bitsandbytes' product from a repacked copy: right, never stale, freed in training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sda_fast import MoDALinear, modality
from sda_fast.moda.fold import fold_model, unfold_model
from sda_fast.ops import repacked
from sda_fast.ops.fold_regimes import BITSANDBYTES, Way, evaluation_way, forced_evaluation
from sda_fast.ops.gates import moda_gates
from sda_fast.ops.kept_gates import KeptGates
from sda_fast.ops.quantized import decode, describe_weight, layout_of
from sda_fast.ops.repacked import RepackedWeight, repack

bnb = pytest.importorskip("bitsandbytes")
needs_product = pytest.mark.skipif(
    not repacked.product_exists(), reason="bitsandbytes has no product on this processor"
)
K, N = 192, 64


def frozen(
    outputs: int = N, inputs: int = K, *, bias: bool = True, quant_type: str = "nf4", blocksize: int = 64, **options
) -> nn.Module:
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, quant_type=quant_type)
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    kinds = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": True, **options}
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kinds)
    return base.to("cpu")


def layer(base: nn.Module | None = None, **options) -> MoDALinear:
    base = base or frozen()
    torch.manual_seed(1)
    made = MoDALinear(base, **{"num_experts": 4, **options})
    nn.init.normal_(made.lora_B, std=0.2)
    return made.eval()


def few(rows: int = 3, inputs: int = K) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()


def evaluate(one: nn.Module, x: Tensor, which: object = 1, way: str | None = None) -> Tensor:
    with torch.no_grad():
        if way is None:
            return one(x, which)
        with forced_evaluation(way):  # type: ignore[arg-type]
            return one(x, which)


def bounds(one: MoDALinear, x: Tensor, which: int = 1) -> tuple[Tensor, Tensor]:
    """y in float64 from the weight as it is stored, and how far this way may be from it (docs/folding.md)."""
    u, wide = 2**-8, x.double()
    u, features = u / (1 - 8 * u), x.shape[-1]
    weight = decode(*describe_weight(one.weight), torch.float32).clone().double()
    bias = 0 if one.bias is None else one.bias.to(x.dtype).double()
    gate = one.scaling * one.gates(which)[0].detach().double().repeat_interleave(one.r // one.num_experts)
    lora_A, lora_B = one.lora_A.detach().double(), one.lora_B.detach().double() * gate
    y = wide @ weight.t() + bias + wide @ lora_A.t() @ lora_B.t()
    base = wide.abs() @ weight.abs().t() + (bias if one.bias is None else bias.abs())
    update = wide.abs() @ lora_A.abs().t() @ lora_B.abs().t()
    return y, u * (4 * base + update) + 2 * (features + one.r + 4) * 2**-24 * (base + update)


@needs_product
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [1, 4, 8])
@pytest.mark.parametrize("shape", [(1, K), (16, K), (2, 5, K), (K,)])
def test_few_rows_are_right_to_the_bound(shape: tuple[int, ...], experts: int, bias: bool) -> None:
    one = layer(frozen(bias=bias), num_experts=experts)
    x = torch.randn(shape).bfloat16()
    y = evaluate(one, x)
    assert one.repacked.kept is not None and y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], N)
    exact, bound = bounds(one, x)
    assert ((y.double() - exact).abs() <= bound).all()
    frozen_alone = x.double() @ decode(*describe_weight(one.weight), torch.float32).double().t()
    frozen_alone += 0 if one.bias is None else one.bias.bfloat16().double()
    assert (exact - frozen_alone).norm() > 3 * (y.double() - exact).norm()


@needs_product
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_format_is_right_to_the_bound(quant_type: str, blocksize: int, adapter_dtype: torch.dtype) -> None:
    for nested in (True, False):
        options = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
        one = layer(frozen(96, 2 * blocksize, **options), adapter_dtype=adapter_dtype)
        x = few(5, 2 * blocksize)
        y = evaluate(one, x, way="bitsandbytes")
        exact, bound = bounds(one, x)
        assert one.repacked.kept is not None and ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_the_layout_is_that_of_bitsandbytes_and_the_weight_stays_as_it_is(nested: bool, storage: torch.dtype) -> None:
    weight = frozen(compress_statistics=nested, quant_storage=storage).weight
    before = weight.data.clone()
    codes, scales = repack(*describe_weight(weight))
    assert torch.equal(weight.data.view(torch.uint8), before.view(torch.uint8))
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False) and weight.quant_state.nested == nested
    theirs, state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert torch.equal(codes, theirs) and torch.equal(scales, state.absmax)


@needs_product
def test_few_rows_go_this_way_and_many_rows_other_dtypes_and_shapes_do_not() -> None:
    one = layer()
    layout = layout_of(one.weight.quant_state)
    for rows, way in ((1, BITSANDBYTES), (16, BITSANDBYTES), (17, Way("unfold")), (4096, Way("fold"))):
        assert evaluation_way(few(rows), layout, "torch", False, may_repack=True) == way
    for x in (few().float(), few().half(), few(0), few(500)):
        assert evaluate(one, x).shape == (x.shape[0], N)
    for base in (frozen(33, K), frozen(64, 96), nn.Linear(K, N).bfloat16()):
        other = layer(base)
        evaluate(other, few(3, base.in_features), way="bitsandbytes")
        assert other.repacked.kept is None
    one.keep_repacked = False
    evaluate(one, few())
    one.keep_repacked, one.backend = True, "torch"
    assert one.repacked.kept is None
    evaluate(one, few())
    assert one.repacked.kept is not None


@needs_product
def test_only_evaluation_without_gradients_and_with_one_modality_goes_this_way() -> None:
    one, x = layer(), few()
    one(x, 1)
    with torch.no_grad():
        one(x, [0, 1, 1])
        one.train()(x, 1)
    assert one.repacked.kept is None
    with torch.inference_mode(), modality("text"):
        y = one.eval()(x)
    kept = one.repacked.kept
    assert kept is not None
    assert torch.equal(y, evaluate(one, x)) and one.repacked.kept is kept


@needs_product
def test_inputs_that_do_not_fit_are_the_same_errors() -> None:
    one = layer()
    evaluate(one, few())
    with pytest.raises(ValueError, match="the weight takes 192 features"):
        evaluate(one, few(3, 128))
    for which in (2, -1):
        with pytest.raises(ValueError, match="is not below the number of modalities"):
            evaluate(one, few(), which)
    one.backend = "cuda"
    with pytest.raises(ValueError, match="backend must be one of"):
        evaluate(one, few())


def step(one: MoDALinear, **options: object) -> None:
    for parameter in one.adapter_tensors():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(one.adapter_tensors(), lr=0.1, **options).step()  # type: ignore[arg-type]


def write(name: str, through_data: bool) -> Callable[[MoDALinear], None]:
    def change(one: MoDALinear) -> None:
        parameter = one.get_parameter(name)
        with torch.no_grad():
            (parameter.data if through_data else parameter).mul_(-1)

    return change


def other_frozen_weight(one: MoDALinear) -> None:
    other = frozen(blocksize=32)
    one.base_layer.weight = other.weight


def other_base_layer(one: MoDALinear) -> None:
    one.base_layer = frozen(blocksize=32)


def codes_in_place(one: MoDALinear) -> None:
    with torch.no_grad():
        one.weight.bitwise_not_()


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


def new_parameter(one: MoDALinear) -> None:
    one.gate_proj = nn.Parameter(-one.gate_proj.detach())


def load(one: MoDALinear) -> None:
    adapter = {name: value + 0.1 for name, value in one.state_dict().items() if not name.startswith("base_layer")}
    one.load_state_dict(adapter, strict=False)


CHANGES: dict[str, Callable[[MoDALinear], None]] = {
    **{f"{name} in place": write(name, False) for name in ("lora_A", "lora_B", "gate_embedding", "gate_proj")},
    **{f"{name} through data": write(name, True) for name in ("lora_A", "lora_B", "gate_embedding", "gate_proj")},
    "parameter replaced": new_parameter,
    "optimizer": step,
    "fused optimizer": lambda one: step(one, fused=True),
    "foreach optimizer": lambda one: step(one, foreach=True),
    "scaling": lambda one: setattr(one, "scaling", one.scaling * 2),
    "load_state_dict": load,
    "other frozen weight": other_frozen_weight,
    "other base layer": other_base_layer,
    "codes in place": codes_in_place,
    **CHANGES_OF_STATE,
}


@needs_product
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_is_ever_stale(change: Callable[[MoDALinear], None]) -> None:
    one, x = layer(), few()
    before = evaluate(one, x)
    change(one)
    after = evaluate(one, x)
    assert one.repacked.kept is not None and not torch.equal(after, before)
    exact, bound = bounds(one, x)
    assert ((after.double() - exact).abs() <= bound).all()


@needs_product
@pytest.mark.parametrize("in_place", [True, False])
def test_another_code_takes_effect(in_place: bool) -> None:
    # Not in the table: on a CPU bitsandbytes decodes by the format's name and multiplies by what the code looks like.
    one, x = layer(), few()
    before = evaluate(one, x)
    state = one.weight.quant_state
    if in_place:
        state.code.neg_()
    else:
        state.code = -state.code
    after = evaluate(one, x)
    one.free_kept_weights()
    assert torch.equal(after, evaluate(one, x)) and not torch.equal(after, before)


@needs_product
@pytest.mark.parametrize("event", ["train", "gradients", "device", "dtype", "unfold", "copy", "pickle"])
def test_the_copy_is_freed_when_training_resumes_or_the_layer_moves(event: str, tmp_path: Path) -> None:
    one = layer()
    evaluate(one, few())
    assert one.repacked.kept is not None and one.kept_gates.by_modality
    assert not any("repacked" in name or "kept" in name for name in one.state_dict())
    if event == "train":
        one.train()
    elif event == "gradients":
        one(few(), 1)
    elif event == "device":
        one.to("cpu")
    elif event == "dtype":
        one.to(torch.bfloat16)
    elif event == "unfold":
        unfold_model(one)
    elif event == "copy":
        one = copy.deepcopy(one)
    else:
        torch.save(one, tmp_path / "layer.pt")
        one = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert one.repacked.kept is None and one.kept_gates.by_modality == {}
    exact, bound = bounds(one, few())
    assert ((evaluate(one, few()).double() - exact).abs() <= bound).all()


@needs_product
def test_training_after_evaluation_is_exactly_as_without_it() -> None:
    results = []
    for evaluates in (False, True):
        one = layer()
        saved = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        if evaluates:
            evaluate(one, few())
            assert all(torch.equal(tensor, saved[name]) for name, tensor in one.state_dict().items())
            assert one.weight.quant_state.nested
        optimizer = torch.optim.AdamW(one.adapter_tensors(), lr=1e-2)
        for _ in range(3):
            one.train()
            one(few(7), 0).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                evaluate(one.eval(), few())
        results.append([evaluate(one.eval(), few()), *(tensor.detach() for tensor in one.adapter_tensors())])
    for without, with_ in zip(*results, strict=True):
        assert torch.equal(without, with_)


@needs_product
def test_a_frozen_layer_that_bitsandbytes_repacked_is_used_as_it_is() -> None:
    base = frozen()
    expected = evaluate(layer(copy.deepcopy(base)), few())
    with torch.no_grad():
        base.eval()(few())
    assert base.weight.quant_state.packing_format_for_cpu
    one = layer(base)
    y = evaluate(one, few())
    assert (
        one.repacked.kept.codes.data_ptr() == base.weight.data_ptr() and base.weight.quant_state.packing_format_for_cpu
    )
    assert torch.equal(y, expected)
    # Rows that another way multiplies restore the layout, and the next few make a copy.
    many = evaluate(one, few(400))
    assert not base.weight.quant_state.packing_format_for_cpu
    assert torch.equal(evaluate(one, few()), expected) and one.repacked.kept.codes.data_ptr() != base.weight.data_ptr()
    exact, bound = bounds(one, few(400))
    assert ((many.double() - exact).abs() <= 2 * bound).all()
    with torch.no_grad():
        base(few())
    assert torch.equal(evaluate(one, few()), expected)


@needs_product
def test_kept_folded_weights_go_first() -> None:
    one = layer()
    fold_model(one, 1)
    evaluate(one, few(), 1)
    assert one.repacked.kept is None and one.folded.by_modality
    evaluate(one, few(), 0)
    assert one.repacked.kept is not None


class Attention(nn.Module):
    def __init__(self, *outputs: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = map(frozen, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@needs_product
def test_layers_that_share_x_go_each_its_own_way() -> None:
    from sda_fast import MoDAConfig, adapt_model

    model = nn.ModuleDict({"self_attn": Attention(64, 32, 33)}).eval()
    adapt_model(model, MoDAConfig(num_experts=4, target_modules=r".*_proj"))
    block = model["self_attn"]
    for name in ("q_proj", "k_proj", "v_proj"):
        nn.init.normal_(getattr(block, name).lora_B, std=0.02)
    with torch.no_grad(), modality("text"):
        y = block(few())
    parts = (block.q_proj, block.k_proj, block.v_proj)
    assert [part.repacked.kept is not None for part in parts] == [True, True, False]
    for part, piece in zip(parts, y.split([64, 32, 33], -1), strict=True):
        assert torch.equal(piece, evaluate(part, few(), 1))
        exact, bound = bounds(part, few())
        assert ((piece.double() - exact).abs() <= 2 * bound).all()


@needs_product
def test_a_peft_adapter_that_takes_over_is_what_computes() -> None:
    peft = pytest.importorskip("peft")
    from sda_fast.moda.peft_tuner import MoDAPeftConfig

    settings = {"num_experts": 4, "target_modules": r".*_proj"}
    model = peft.get_peft_model(nn.ModuleDict({"self_attn": Attention(64, 32, 32)}), MoDAPeftConfig(**settings))
    model.add_adapter("second", MoDAPeftConfig(**settings, seed=1))
    for name, parameter in model.named_parameters():
        if "moda_B" in name:
            nn.init.normal_(parameter, std=0.1)
    block, seen = model.base_model.model["self_attn"], []
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        model.eval()
        with torch.no_grad(), modality("image"):
            seen.append(block(few()))
            assert block.q_proj.repacked.kept is not None
            with forced_evaluation("unfold"):
                torch.testing.assert_close(seen[-1], block(few()), rtol=0.05, atol=0.02)
        with torch.no_grad(), model.disable_adapter(), modality("image"):
            block(few())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@needs_product
@pytest.mark.parametrize("rows", [4, 400])
def test_a_disabled_adapter_leaves_the_frozen_weight_as_it_is(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    from sda_fast.moda.peft_tuner import MoDAPeftConfig

    model = peft.get_peft_model(
        nn.ModuleDict({"self_attn": Attention(64, 32, 33)}), MoDAPeftConfig(num_experts=4, target_modules=r".*_proj")
    ).eval()
    block, x = model.base_model.model["self_attn"], few(rows)
    parts = [block.q_proj, block.k_proj, block.v_proj]
    before = [decode(*describe_weight(part.base_layer.weight), torch.float32).clone() for part in parts]
    with torch.no_grad(), model.disable_adapter():
        y = block(x)
    for part, piece, weight in zip(parts, y.split([64, 32, 33], -1), before, strict=True):
        assert not getattr(part.base_layer.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(decode(*describe_weight(part.base_layer.weight), torch.float32), weight)
        bias = part.base_layer.bias.bfloat16().double()
        base = x.double().abs() @ weight.double().abs().t() + bias.abs()
        bound = 4 * 2**-8 / (1 - 2**-5) * base + 2 * (K + 4) * 2**-24 * base
        assert ((piece.double() - (x.double() @ weight.double().t() + bias)).abs() <= bound).all()
    assert (parts[0].repacked.kept is not None) == (rows == 4) and not caplog.records


@needs_product
def test_autocast_goes_this_way_in_bfloat16() -> None:
    one = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = evaluate(one, few().float())
    assert one.repacked.kept is not None and torch.equal(y, evaluate(one, few()))


@needs_product
def test_threads_that_evaluate_together_agree() -> None:
    one, x = layer(), few(8)
    expected, results = evaluate(copy.deepcopy(one), x), []

    def run() -> None:
        results.extend(evaluate(one, x) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(torch.equal(y, expected) for y in results)


@needs_product
def test_compiled_layers_do_without_a_copy() -> None:
    one = layer()
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(few(), 1)
    assert one.repacked.kept is None
    exact, bound = bounds(one, few())
    assert ((y.double() - exact).abs() <= 2 * bound).all()


@needs_product
def test_weights_whose_changes_are_not_counted_are_not_copied() -> None:
    with torch.inference_mode():
        one = layer()
    x = few()
    y = evaluate(one, x)
    assert one.repacked.kept is None
    exact, bound = bounds(one, x)
    assert ((y.double() - exact).abs() <= 2 * bound).all()


@needs_product
@pytest.mark.parametrize("kind", ["transposed", "every second column", "expanded", "rows of a wider matrix"])
def test_inputs_of_any_strides_give_the_same(kind: str) -> None:
    one = layer()
    x = {
        "transposed": few(K, 5).t(),
        "every second column": few(4, 2 * K)[:, ::2],
        "expanded": few(1).expand(6, K),
        "rows of a wider matrix": few(4, K + 8)[:, 8:],
    }[kind]
    assert torch.equal(evaluate(one, x), evaluate(one, x.clone(memory_format=torch.contiguous_format)))
    assert one.repacked.kept is not None


@needs_product
def test_the_copy_goes_with_its_weight() -> None:
    one = layer()
    evaluate(one, few())
    copied = one.repacked.kept
    assert copied.codes is not None
    one.base_layer.weight = frozen(blocksize=32).weight
    assert copied.codes is None and copied.sources is None
    exact, bound = bounds(one, few())
    assert ((evaluate(one, few()).double() - exact).abs() <= bound).all()


def test_a_copy_knows_its_weight() -> None:
    weight = frozen().weight
    copied = RepackedWeight(weight)
    assert copied.is_valid(weight) and not copied.is_valid(frozen().weight)
    weight.data = weight.data.clone()
    assert not copied.is_valid(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_gates_are_those_of_the_parameters_now(dtype: torch.dtype) -> None:
    embedding, proj = (nn.Parameter(torch.randn(n, 64).to(dtype)) for n in (2, 4))
    kept = KeptGates()
    with torch.no_grad():
        for _ in range(2):
            for which in (0, 1):
                assert torch.equal(kept.get(embedding, proj, which), moda_gates(embedding, proj, which))
        assert kept.get(embedding, proj, 0) is kept.get(embedding, proj, 0)
        for change in (lambda: proj.data[3].neg_(), lambda: embedding[1].add_(1), lambda: proj.data.fill_(0.0)):
            change()
            assert torch.equal(kept.get(embedding, proj, 1), moda_gates(embedding, proj, 1))
        transposed = nn.Parameter(torch.randn(64, 4).to(dtype).t())
        for _ in range(2):
            assert torch.equal(kept.get(embedding, transposed, 1), moda_gates(embedding, transposed, 1))
            transposed.data.neg_()
    with pytest.raises(ValueError, match="modality id 2"):
        kept.get(embedding, proj, 2)
