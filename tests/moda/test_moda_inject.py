"""Adapting models, layers that share their input, and adapters on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_fast import MoDAConfig, adapt_model, load_adapter, modality, save_adapter
from sda_fast.moda import adapted as adapted_layers
from sda_fast.moda.inject import moda_parameters, named_moda_layers, named_moda_parameters
from sda_fast.moda.save import AdapterMismatchError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.o_proj = nn.Linear(16, 16)
        self.copy_input = False

    def forward(self, x: Tensor) -> Tensor:
        other = x.clone() if self.copy_input else x
        keys = torch.cat([self.k_proj(other), self.v_proj(x)], -1)
        return self.o_proj(torch.tanh(self.q_proj(x)) * keys)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)


class TinyCrossAttentionLayer(Cross):
    pass


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([Block(), TinyCrossAttentionLayer(), Block()])
        self.checkpointing: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[2]):
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        return x


class VisionLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Block()
        self.multi_modal_projector = nn.Linear(16, 16)
        self.language_model = Decoder()
        self.lm_head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.language_model(x)


def adapted(**options: object) -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel().double()
    adapt_model(model, MoDAConfig(**{"lora_dropout": 0.0, **options}))  # type: ignore[arg-type]
    for _, parameter in named_moda_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def without_groups(model: nn.Module) -> nn.Module:
    alone = copy.deepcopy(model)
    for module in alone.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return alone


def results(model: nn.Module, *passes: object) -> list[Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    outputs = []
    for which in passes or ("image",):
        with modality(which):
            outputs.append(model(x))
    model.zero_grad()
    sum((y**2).sum() for y in outputs).backward()
    return [*outputs, x.grad, *(parameter.grad.clone() for parameter in moda_parameters(model))]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each operation served."""
    sizes: list[int] = []
    original = adapted_layers.moda_linear_group

    def counted(x: Tensor, weights: list[Tensor], *others: object, **options: object) -> list[Tensor]:
        sizes.append(len(weights))
        return original(x, weights, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapted_layers, "moda_linear_group", counted)
    return sizes


def test_only_the_language_models_own_linears_are_adapted_and_all_else_is_frozen() -> None:
    model = VisionLanguageModel()
    names = adapt_model(model, MoDAConfig())
    assert names == [
        f"language_model.layers.{i}.{part}"
        for i in (0, 2)
        for part in (
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        )
    ]
    assert [name for name, _ in named_moda_layers(model)] == names
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in named_moda_parameters(model)}
    assert len(moda_parameters(model)) == 4 * len(names)


def test_target_modules_by_suffix_regex_and_exclusion() -> None:
    assert len(adapt_model(VisionLanguageModel(), MoDAConfig(target_modules=("q_proj", "v_proj")))) == 4
    by_regex = adapt_model(VisionLanguageModel(), MoDAConfig(target_modules=r"visual\..*\.(q|k)_proj"))
    assert by_regex == ["visual.self_attn.q_proj", "visual.self_attn.k_proj"]
    rest = adapt_model(VisionLanguageModel(), MoDAConfig(exclude_modules=["down_proj"]))  # type: ignore[arg-type]
    assert len(rest) == 12
    with pytest.raises(ValueError, match=r"target_modules=\('qkv',\).*linear layers, named .*down_proj.*lm_head"):
        adapt_model(VisionLanguageModel(), MoDAConfig(target_modules=("qkv",)))
    model = adapted()
    with pytest.raises(ValueError, match="14 adapted layers already"):
        adapt_model(model, MoDAConfig())


def test_seed_decides_the_initial_values() -> None:
    first, second, other = (VisionLanguageModel() for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        adapt_model(model, MoDAConfig(seed=seed))
    a, b, c = (moda_parameters(model)[0] for model in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_shared_inputs_are_computed_once_and_change_nothing(checkpointing: str | None, calls: list[int]) -> None:
    model = adapted()
    expected = results(without_groups(model), "image", [1, 0])
    assert set(calls) == {1}
    calls.clear()
    model.language_model.checkpointing = checkpointing
    assert_close(results(model, "image", [1, 0]), expected)
    passes = 2 if checkpointing is None else 4
    assert calls.count(3) == calls.count(2) == 2 * passes
    assert calls.count(1) in (4 * passes, 4 * passes - 4)


def test_nothing_is_left_on_the_layers_after_a_forward_even_a_failing_one() -> None:
    model = adapted()
    results(model)
    attention = model.language_model.layers[0].self_attn
    attention.v_proj.register_forward_pre_hook(lambda module, arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), modality("image"):
        model(torch.randn(2, 3, 16, dtype=torch.float64))
    assert all(layer.shared_input is None for _, layer in named_moda_layers(model))


def test_a_sibling_called_with_another_tensor_computes_alone(calls: list[int]) -> None:
    model = adapted()
    for index in (0, 2):
        model.language_model.layers[index].self_attn.copy_input = True
    assert_close(results(model), results(without_groups(model)))
    calls.clear()
    results(model)
    assert calls.count(3) == 0, "a group that does not share its input stops trying"


def test_an_input_changed_in_place_between_siblings_is_noticed() -> None:
    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.q_proj(x)
            x.mul_(2)
            return first, self.k_proj(x), self.v_proj(x)  # type: ignore[return-value]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Changing()

    model = Holder()
    adapt_model(model, MoDAConfig())
    x = torch.randn(2, 16)
    with modality("image"), torch.no_grad():
        _, k, v = model.self_attn(x)
        assert torch.equal(k, model.self_attn.k_proj(2 * x))
        assert torch.equal(v, model.self_attn.v_proj(2 * x))


def test_layers_called_on_their_own_and_copies_work(calls: list[int]) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.language_model.layers[0].self_attn.k_proj.lora_B)
    attention, other = (m.language_model.layers[0].self_attn for m in (model, twin))
    x = torch.randn(2, 16, dtype=torch.float64)
    with modality("image"):
        attention(x)
        assert not torch.allclose(attention.k_proj(x), other.k_proj(x))
        torch.testing.assert_close(other.k_proj(x), other.k_proj.base_layer(x))
        calls.clear()
        other(x)
    assert sorted(calls) == [1, 3]


def test_decoder_layer_with_checkpointing_compiles_into_one_graph() -> None:
    model = adapted(target_modules=("q_proj", "k_proj"))
    expected = results(model)
    model.language_model.checkpointing = "non-reentrant"
    for index in (0, 2):
        model.language_model.layers[index].compile(fullgraph=True, backend="aot_eager")
    assert_close(results(model), expected)


def test_the_backend_is_of_the_layers_and_not_of_the_adapters_files(tmp_path: Path) -> None:
    model = VisionLanguageModel()
    adapt_model(model, MoDAConfig(), backend="torch")
    assert {layer.backend for _, layer in named_moda_layers(model)} == {"torch"}
    save_adapter(model, tmp_path)
    assert "backend" not in json.loads((tmp_path / "adapter_config.json").read_text())
    for options, expected in (({}, "auto"), ({"backend": "torch"}, "torch")):
        other = VisionLanguageModel()
        load_adapter(other, tmp_path, **options)
        assert {layer.backend for _, layer in named_moda_layers(other)} == {expected}
    with pytest.raises(ValueError, match="got 'cuda'"):
        adapt_model(VisionLanguageModel(), MoDAConfig(), backend="cuda")


def test_an_adapter_goes_to_disk_and_back(tmp_path: Path) -> None:
    model = adapted()
    expected = results(model)
    save_adapter(model, tmp_path / "adapter", base_model_name="tiny")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == "tiny" and description["peft_type"] == "MODA"
    torch.manual_seed(0)
    fresh = VisionLanguageModel().double()
    config = load_adapter(fresh, tmp_path / "adapter")
    assert config == MoDAConfig(lora_dropout=0.0)
    again = adapted()
    load_adapter(again, tmp_path / "adapter")
    for loaded in (fresh, again):
        for (name, a), (_, b) in zip(named_moda_parameters(loaded), named_moda_parameters(model), strict=True):
            # The fresh model's adapter is float32, the config's dtype, as the saved one was.
            assert torch.equal(a, b), name
        assert_close(results(loaded), expected)


def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = adapted()
    save_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "language_model.layers.0.self_attn.q_proj.lora_A"
    saved = "base_model.model.language_model.layers.0.self_attn.q_proj.moda_A"
    changed = {**tensors, "base_model.model.surplus.moda_A": torch.zeros(1), saved: torch.zeros(2, 2)}
    del changed["base_model.model.language_model.layers.2.mlp.up_proj.moda_gate_proj"]
    save_file(changed, weights)
    before = [parameter.clone() for parameter in moda_parameters(model)]
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(model, tmp_path)
    message = str(caught.value)
    assert "missing: language_model.layers.2.mlp.up_proj.gate_proj" in message
    assert "unexpected: surplus.lora_A" in message
    assert f"{name} is (2, 2), expected (8, 16)" in message
    assert all(torch.equal(a, b) for a, b in zip(before, moda_parameters(model), strict=True))

    with pytest.raises(AdapterMismatchError, match="num_experts is 4 in the model and 8 in the adapter"):
        load_adapter(adapted(num_experts=4), tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"Block lacks 15 of the adapter's 15 layers"):
        load_adapter(Block(), tmp_path)
    with pytest.raises(ValueError, match="not adapted"):
        save_adapter(VisionLanguageModel(), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterMismatchError, match="not a MoDA adapter"):
        load_adapter(model, tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("sda_fast.atomic.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(adapted(num_experts=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_round_trip_and_checks() -> None:
    config = MoDAConfig(target_modules=["q_proj"], num_experts=2)  # type: ignore[arg-type]
    assert MoDAConfig(**json.loads(json.dumps(config.as_dict()))) == config
    for wrong in ({"num_experts": 3}, {"lora_dropout": -0.1}, {"adapter_dtype": "int8"}, {"num_modalities": 1}):
        with pytest.raises(ValueError):
            MoDAConfig(**wrong)  # type: ignore[arg-type]
