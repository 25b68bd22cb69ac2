"""MoDA through PEFT's own doors, and as stock LoRAs that unmodified PEFT loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sda_fast import MoDAConfig, MoDALinear, adapt_model, load_adapter, modality, save_adapter
from sda_fast.moda import adapted
from sda_fast.moda.context import NoModalityError
from sda_fast.moda.export import export_lora, merge_into
from sda_fast.moda.fold import fold_model
from sda_fast.moda.inject import named_moda_parameters
from sda_fast.moda.linear import ADAPTER_PARAMETERS
from sda_fast.moda.peft_tuner import MoDAPeftConfig, MoDATunerLayer
from sda_fast.moda.save import AdapterMismatchError

SIZES = {"r": 4, "num_experts": 2, "lora_dropout": 0.0}


def base_model() -> transformers.LlamaModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaModel(config).eval()


def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6)


def vectors(model: nn.Module, which: str) -> Tensor:
    with modality(which), torch.no_grad():
        return model(tokens()).last_hidden_state


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Every adapter value random, so that B = 0 hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moda_" in name or name.endswith(ADAPTER_PARAMETERS):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[nn.Module, Path]:
    """An adapted model with random adapter values, and its adapter on disk."""
    model = base_model()
    adapt_model(model, MoDAConfig(**SIZES))
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_model_name="tiny-llama")
    return model, tmp_path / "adapter"


def test_an_adapter_of_save_adapter_loads_through_peft_and_gives_the_same_vectors(
    adapter: tuple[nn.Module, Path],
) -> None:
    model, folder = adapter
    loaded = PeftModel.from_pretrained(base_model(), folder)
    for which in ("image", "text"):
        assert torch.equal(vectors(loaded, which), vectors(model, which))
    assert not torch.allclose(vectors(model, "image"), vectors(model, "text"))


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21), reason="PEFT before 0.21 saves only its own methods"
)
def test_an_adapter_saved_by_peft_loads_with_load_adapter(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    randomise(model)
    model.save_pretrained(tmp_path)
    ours = base_model()
    load_adapter(ours, tmp_path)
    assert torch.equal(vectors(ours, "text"), vectors(model, "text"))


def test_peft_and_adapt_model_start_from_the_same_values() -> None:
    ours, theirs = base_model(), get_peft_model(base_model(), MoDAPeftConfig(**SIZES, seed=3))
    adapt_model(ours, MoDAConfig(**SIZES, seed=3))
    A = {name: value for name, value in named_moda_parameters(ours) if name.endswith("lora_A")}
    for name, module in theirs.get_base_model().named_modules():
        if isinstance(module, MoDATunerLayer):
            assert torch.equal(A[f"{name}.lora_A"], module.lora_A), name


def test_only_adapters_train_and_peft_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    ours = base_model()
    adapt_model(ours, MoDAConfig(**SIZES))
    expected = sum(parameter.numel() for _, parameter in named_moda_parameters(ours))
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"{expected:,}" in capsys.readouterr().out
    randomise(model)
    with modality("image"):
        model(tokens()).last_hidden_state.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("moda_" in name), name


def test_q_k_v_and_gate_up_share_their_input_under_peft_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    served: list[int] = []
    original = adapted.moda_linear_group

    def counted(x, weights, *others, **options):
        served.append(len(weights))
        return original(x, weights, *others, **options)

    monkeypatch.setattr(adapted, "moda_linear_group", counted)
    vectors(model, "image")
    assert served == [3, 1, 2, 1] * 2


def test_disabled_adapters_give_the_base_model_without_a_modality() -> None:
    plain = base_model()(tokens()).last_hidden_state
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    randomise(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(tokens()).last_hidden_state, plain)
    assert not torch.allclose(vectors(model, "image"), plain)
    with pytest.raises(NoModalityError):
        model(tokens())


def test_disabled_adapters_cannot_be_folded_and_the_error_says_so() -> None:
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    randomise(model)
    expected = vectors(model, "text")
    with model.disable_adapter(), pytest.raises(ValueError, match=r"\(default\) do not compute now: disabled"):
        fold_model(model, "text")
    fold_model(model, "text")
    torch.testing.assert_close(vectors(model, "text"), expected)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(tokens()).last_hidden_state, base_model()(tokens()).last_hidden_state)


def test_several_adapters_are_kept_apart_switched_and_deleted(adapter: tuple[nn.Module, Path]) -> None:
    moda, folder = adapter
    model = get_peft_model(base_model(), MoDAPeftConfig(r=2, num_experts=1, lora_dropout=0.0), adapter_name="first")
    randomise(model, seed=5)
    first = vectors(model, "text")
    model.load_adapter(folder, adapter_name="second")
    assert torch.equal(vectors(model, "text"), first)
    model.set_adapter("second")
    assert torch.equal(vectors(model, "text"), vectors(moda, "text"))
    model.set_adapter("first")
    assert torch.equal(vectors(model, "text"), first)
    model.delete_adapter("first")
    assert torch.equal(vectors(model, "text"), vectors(moda, "text"))


def test_merging_says_what_to_do_instead_and_unload_gives_the_base_model_back() -> None:
    model = get_peft_model(base_model(), MoDAPeftConfig(**SIZES))
    with pytest.raises(NotImplementedError, match="sda-fast export"):
        model.merge_adapter()
    plain = model.unload()
    assert not any(isinstance(module, MoDATunerLayer) for module in plain.modules())
    assert torch.equal(plain(tokens()).last_hidden_state, base_model()(tokens()).last_hidden_state)


def test_wrong_sizes_are_refused_by_the_peft_config_too() -> None:
    with pytest.raises(ValueError, match="num_experts must divide the total rank r, got r=8 and num_experts=3"):
        MoDAPeftConfig(r=8, num_experts=3)


@pytest.mark.parametrize("which", ["image", "text"])
def test_one_modality_exports_to_a_lora_that_unmodified_peft_loads(
    adapter: tuple[nn.Module, Path], tmp_path: Path, which: str
) -> None:
    model, folder = adapter
    export_lora(folder, tmp_path / "lora", which)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["base_model_name_or_path"] == "tiny-llama"
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "lora")
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).last_hidden_state, vectors(model, which), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["image", 1])
def test_a_merged_model_gives_the_vectors_of_its_modality(adapter: tuple[nn.Module, Path], which: str | int) -> None:
    model, folder = adapter
    merged = base_model()
    merge_into(merged, folder, which)
    assert not any(isinstance(module, MoDALinear) for module in merged.modules())
    expected = vectors(model, "image" if which == "image" else "text")
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_a_merged_weight_is_rounded_once(adapter: tuple[nn.Module, Path]) -> None:
    _, folder = adapter
    narrow, wide = base_model().to(torch.bfloat16), base_model().to(torch.bfloat16).float()
    merge_into(narrow, folder, "image")
    merge_into(wide, folder, "image")
    for (name, a), (_, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16)), name


def test_what_cannot_be_exported_is_said(adapter: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = adapter
    with pytest.raises(ValueError, match="modality 'sound' is not among the adapter's image, text"):
        export_lora(folder, tmp_path / "lora", "sound")
    with pytest.raises(ValueError, match="modality id 2 is not below the adapter's 2 modalities"):
        export_lora(folder, tmp_path / "lora", 2)
    with pytest.raises(AdapterMismatchError, match="Linear has no layer layers"):
        merge_into(nn.Linear(2, 2), folder, "image")
    with pytest.raises(FileNotFoundError):
        export_lora(tmp_path / "nowhere", tmp_path / "lora", "image")


def test_a_peft_model_can_be_copied(adapter: tuple[nn.Module, Path]) -> None:
    _, folder = adapter
    loaded = PeftModel.from_pretrained(base_model(), folder)
    twin = copy.deepcopy(loaded)
    randomise(loaded, seed=9)
    assert not torch.allclose(vectors(twin, "image"), vectors(loaded, "image"))
