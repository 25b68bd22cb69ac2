"""Adapters by the id of a repository on the hub, from huggingface_hub's cache; nothing here reaches the network."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from sda_fast import MoDAConfig, adapt_model, load_adapter, save_adapter
from sda_fast.moda.export import export_lora
from sda_fast.moda.folder import adapter_folder
from sda_fast.moda.inject import moda_parameters

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaModel(config)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An adapter as huggingface_hub keeps "somebody/lamps" after a download, and the adapted model."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository = cache / "models--somebody--lamps"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    adapted = model()
    adapt_model(adapted, MoDAConfig(r=4, num_experts=2, seed=7))
    save_adapter(adapted, repository / "snapshots" / COMMIT, base_model_name="tiny")
    return adapted


def test_a_hub_id_is_found_in_the_cache_and_loads(cached, tmp_path):
    fresh = model()
    config = load_adapter(fresh, "somebody/lamps")
    assert config.seed == 7
    for ours, theirs in zip(moda_parameters(fresh), moda_parameters(cached), strict=True):
        assert torch.equal(ours, theirs)
    assert export_lora(Path("somebody/lamps"), tmp_path / "lora", "image").is_dir()
    assert adapter_folder("somebody/lamps", revision="main").name == COMMIT


def test_a_folder_of_that_name_comes_first(cached, tmp_path):
    save_adapter(cached, tmp_path / "somebody" / "lamps")
    assert adapter_folder("somebody/lamps") == Path("somebody/lamps")


@pytest.mark.parametrize("name", ["somebody/else", "no/such/folder", "/nowhere/at/all"])
def test_what_is_neither_folder_nor_repository_is_named(cached, name):
    with pytest.raises(
        FileNotFoundError, match=f"{name} is neither a folder with an adapter, adapter_config.json, nor"
    ):
        adapter_folder(name)


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: adapter_config\.json is missing"):
        adapter_folder(tmp_path)
