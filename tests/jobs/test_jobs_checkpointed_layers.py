"""Gradient checkpointing of some layers: the same gradients, less recomputed, and as few layers as memory asks for."""

import logging

import pytest
import torch

from sda_fast import train
from sda_fast.data.items import Catalogue, read_items
from sda_fast.jobs import fitting
from sda_fast.jobs.batches import BatchMaker
from sda_fast.jobs.features import Tower
from sda_fast.jobs.fitting import LongestFirst, fewest_checkpointed_layers
from sda_fast.jobs.train_step import ContrastiveStep, training_mode
from sda_fast.losses.modules import CMSALoss
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.load import load_lvlm
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.inject import adapt_model
from sda_fast.train import finetune

LAYERS = 6


@pytest.fixture(scope="module")
def deep_model(small_world, tmp_path_factory):
    """Folder of a model whose decoder has some layers to choose among."""
    from sda_fast.lvlm.tiny import build_tiny_lvlm

    catalogue = Catalogue(read_items(small_world.items).items)
    folder = tmp_path_factory.mktemp("deep") / "model"
    return build_tiny_lvlm(
        catalogue, folder, pretrain_steps=0, hidden_size=64, num_layers=LAYERS, image_side=56, vocab_size=400
    )


@pytest.fixture
def deep_config(finetune_config, deep_model):
    def make(**changes):
        return finetune_config(**{"model": str(deep_model), "gradient_checkpointing": True, "steps": 2, **changes})

    return make


@pytest.fixture(scope="module")
def measured(deep_model, small_world):
    """A step, the longest items, and the bytes that a pass keeps with so many layers checkpointed."""
    lvlm = load_lvlm(str(deep_model), quantization="none", device="cpu", dtype=torch.float32)
    adapt_model(lvlm.model, MoDAConfig(lora_dropout=0.1, target_modules=lvlm.family.target_modules))
    loss = CMSALoss()
    step = ContrastiveStep(lvlm, loss, None, Tower(lvlm, None, group_size=None, offload=False))
    maker = BatchMaker(lvlm, PromptConfig(), ImageOptions(20 * 20, 56 * 56))
    return step, LongestFirst(maker, read_items(small_world.items).items)


def adapter_bytes(result):
    return (result.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_any_number_of_checkpointed_layers_gives_the_same_adapter(deep_config, tmp_path, chunk_size):
    runs = [
        finetune(deep_config(output=tmp_path / str(count), chunk_size=chunk_size, checkpointed_layers=count))
        for count in (None, 0, 4, "auto")
    ]
    assert len({adapter_bytes(run) for run in runs}) == 1


def test_the_first_layers_are_the_checkpointed_ones_and_all_are_as_before_afterwards(measured):
    step, _ = measured
    with training_mode(step.lvlm, gradient_checkpointing=True, checkpointed_layers=2) as layers:
        assert [layer.gradient_checkpointing for layer in layers.layers] == [True] * 2 + [False] * 4
        assert layers.count == 2 and len(layers) == LAYERS
        layers.limit(LAYERS)
        assert layers.count == LAYERS
    assert layers.count == 0
    with training_mode(step.lvlm, gradient_checkpointing=False) as layers:
        assert layers.count == 0


def test_a_layer_that_keeps_its_activations_is_not_run_again(measured):
    step, longest = measured
    chunk = longest.chunks(3)["text"]
    for count in (0, 2, LAYERS):
        with training_mode(step.lvlm, gradient_checkpointing=True, checkpointed_layers=count) as layers:
            runs = [0] * LAYERS

            def counting(place, runs):
                return lambda *_: runs.__setitem__(place, runs[place] + 1)

            hooks = [
                layer.input_layernorm.register_forward_hook(counting(place, runs))
                for place, layer in enumerate(layers.layers)
            ]
            step.encode(chunk, "text").sum().backward()
            for hook in hooks:
                hook.remove()
        assert runs == [2] * count + [1] * (LAYERS - count)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_auto_checkpoints_the_fewest_layers_that_fit(measured, monkeypatch, chunk_size):
    step, longest = measured
    chunks = longest.chunks(chunk_size or 4)
    step.tower.complete([chunks["image"]])
    together = [["image", "text"]] if chunk_size is None else [["image"], ["text"]]

    def kept(modalities):
        return fitting.bytes_of_pass(lambda: torch.cat([step.encode(chunks[name], name) for name in modalities]))[0]

    def fewest(room, layers):
        monkeypatch.setattr(fitting, "free_memory", lambda device: room / fitting.FREE_MEMORY_SHARE)
        return fewest_checkpointed_layers(step, longest, 4, chunk_size, layers)

    with training_mode(step.lvlm, gradient_checkpointing=True) as layers:
        needs = []
        for count in range(LAYERS + 1):
            layers.limit(count)
            needs.append(max(map(kept, together)))
        step.lvlm.model.zero_grad(set_to_none=True)
        assert needs == sorted(needs, reverse=True) and needs[0] > 2 * needs[-1]
        state = torch.get_rng_state()
        for count in range(LAYERS + 1):
            assert fewest(needs[count] + 1, layers) == count
            # A little less, and one layer more has to be checkpointed; with all of them there is nothing left to do.
            assert fewest(needs[count] - 1, layers) == min(count + 1, LAYERS)
        torch.testing.assert_close(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in step.lvlm.model.parameters())


def test_auto_survives_running_out_of_memory_while_it_measures(measured, monkeypatch):
    step, longest = measured
    with training_mode(step.lvlm, gradient_checkpointing=True) as layers:
        measure = fitting.bytes_of_pass

        def scarce(encode):
            if layers.count < 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return measure(encode)

        monkeypatch.setattr(fitting, "bytes_of_pass", scarce)
        assert fewest_checkpointed_layers(step, longest, 4, None, layers) == 5


@pytest.mark.parametrize("count", [0, 1])
def test_out_of_memory_checkpoints_all_layers_before_it_halves_the_chunk(
    deep_config, tmp_path, monkeypatch, caplog, count
):
    whole = finetune(deep_config(output=tmp_path / "whole", chunk_size=2))
    encode = ContrastiveStep.encode
    failures = iter([True] * 2)

    def scarce(self, chunk, modality):
        if torch.is_grad_enabled() and next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, chunk, modality)

    monkeypatch.setattr(ContrastiveStep, "encode", scarce)
    with caplog.at_level(logging.WARNING):
        run = finetune(deep_config(output=tmp_path / "scarce", chunk_size=4, checkpointed_layers=count))
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert said == [
        "out of memory at step 1; going on with all 6 layers recomputed",
        "out of memory at step 1; going on with chunks of 2 items",
    ]
    assert adapter_bytes(run) == adapter_bytes(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpointed_layers": -1}, "checkpointed_layers must be at least 0, 'auto' or None, got -1"),
        ({"checkpointed_layers": "some"}, "got 'some'"),
        (
            {"checkpointed_layers": 1, "gradient_checkpointing": False},
            "checkpointed_layers is 1 but gradient_checkpointing is off",
        ),
    ],
)
def test_a_number_that_means_nothing_is_refused(deep_config, changes, message):
    with pytest.raises(ValueError, match=message):
        deep_config(**changes)


def test_more_layers_than_there_are_is_an_error_before_the_first_step(deep_config):
    with pytest.raises(ValueError, match="checkpointed_layers is 7 but the decoder has 6 layers"):
        train.finetune(deep_config(checkpointed_layers=7))
