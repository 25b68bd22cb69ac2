"""The planner's command: what it reads, what it says, and how it looks for the largest chunk."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from sda_fast.plan import PlanConfig, bytes_of, fewest_layers_that_fit, largest_that_fits, plan
from sda_fast.planning.cards import GIB, card_named, card_of_device


@pytest.mark.parametrize(("words", "number"), [("12GiB", 12 * GIB), ("1.5 gb", 1_500_000_000), ("77", 77)])
def test_sizes_are_read(words, number):
    assert bytes_of(words) == number


def test_a_size_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="expected a size like 12GiB, got 'much'"):
        PlanConfig(model="m", gpu_memory="much")


def test_cards_are_found_by_words_of_their_names():
    assert card_named("h200").memory == 141
    with pytest.raises(ValueError, match="several cards match 'a100'"):
        card_named("a100")
    with pytest.raises(ValueError, match="no card match"):
        card_named("Voodoo 2")


@pytest.mark.parametrize(
    ("device", "memory", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "H100 SXM"),
        ("NVIDIA H200", 150e9, "H200 SXM"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100 40GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 17e9, "RTX 4060 Ti 16GB"),
    ],
)
def test_cards_are_found_by_the_driver_s_name(device, memory, card):
    assert card_of_device(device, memory).name == card


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_a_slower_or_faster_kind_of_a_card_is_not_that_card(device):
    with pytest.raises(ValueError, match="no card matches"):
        card_of_device(device, 24 * GIB)


@pytest.mark.parametrize("memory", [5, 24, 37, 100, 400])
def test_the_search_finds_the_largest_chunk_that_fits_within_few_runs(memory):
    reserved = bytes_of("0.75GiB")
    runs = []

    def step(size):
        runs.append(size)
        return SimpleNamespace(peak=max(10, 8 + 3 * size) * GIB)

    limit = memory * GIB + reserved
    found = largest_that_fits(step, lambda one: one.peak + reserved <= limit, limit, 32, {})
    best = max((size for size in range(1, 33) if max(10, 8 + 3 * size) <= memory), default=None)
    assert (found is None) if best is None else (found.peak == max(10, 8 + 3 * best) * GIB)
    assert len(runs) <= 6 and len(set(runs)) == len(runs)


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """config.json of a Qwen2.5-VL with two layers."""
    from sda_fast.planning.model import preset_configs

    config = preset_configs()["Qwen/Qwen2.5-VL-7B-Instruct"].to_dict()
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 152064, "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    config["vision_config"] |= {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_the_page_names_settings_parts_and_assumptions(tiny_config):
    answer = plan(
        PlanConfig(
            model=str(tiny_config), text_tokens=40, image_tokens=9, batch_size=4, chunk_sizes=(1, 4), search=False
        )
    )
    chunked, whole = answer.lines
    assert (chunked.chunk_size, whole.chunk_size) == (1, None)
    assert chunked.parts["weights"] == whole.parts["weights"]
    assert chunked.kept < whole.kept
    assert whole.parts["workspaces"] >= 2 * 256 * 128
    page = str(answer)
    assert "all 4" in page and "RTX 3060 12GB" in page and "40 tokens in a text" in page


def test_a_large_batch_costs_hardly_more_memory_than_a_small_one_in_the_same_chunks(tiny_config):
    def peak(batch_size):
        config = PlanConfig(
            model=str(tiny_config),
            text_tokens=40,
            image_tokens=9,
            batch_size=batch_size,
            chunk_sizes=(4,),
            search=False,
        )
        return plan(config).lines[0].peak

    # Vectors, their gradients and the loss's tiles: 128 wide here, in float32.
    assert peak(256) - peak(8) < 256 * 128 * 4 * 8 + 3 * 256 * 256 * 4


def test_without_items_and_lengths_the_planner_says_what_is_missing(tiny_config):
    with pytest.raises(ValueError, match="give items, or text_tokens"):
        plan(PlanConfig(model=str(tiny_config)))


@pytest.mark.parametrize("layers", [1, 2, 3, 28])
@pytest.mark.parametrize("memory", [10, 11, 14, 31, 50, 200])
def test_the_search_finds_the_fewest_checkpointed_layers_that_fit_within_few_runs(layers, memory):
    reserved = bytes_of("0.75GiB")
    runs = []

    def peak(checkpointed):
        return (8 + 1.5 * max(0, layers - 1 - checkpointed)) * GIB

    def step(checkpointed):
        runs.append(checkpointed)
        return SimpleNamespace(peak=peak(checkpointed), checkpointed_layers=checkpointed, num_layers=layers)

    complete = SimpleNamespace(peak=peak(layers), checkpointed_layers=layers, num_layers=layers)
    limit = memory * GIB + reserved
    found = fewest_layers_that_fit(step, lambda one: one.peak + reserved <= limit, limit, complete)
    assert found.checkpointed_layers == min(count for count in range(layers + 1) if peak(count) <= memory * GIB)
    assert len(runs) <= 5


def test_some_checkpointed_layers_lie_between_none_and_all(tiny_config):
    def step(**changes):
        config = PlanConfig(model=str(tiny_config), text_tokens=40, image_tokens=9, batch_size=4, chunk_sizes=(4,))
        return plan(dataclasses.replace(config, search=False, **changes)).lines[0]

    none, one, both = step(gradient_checkpointing=False), step(checkpointed_layers=1), step()
    assert [(each.checkpointed_layers, each.num_layers) for each in (none, one, both)] == [(0, 2), (1, 2), (2, 2)]
    assert none.flops < one.flops < both.flops and none.seconds < one.seconds < both.seconds
    assert none.kept > one.kept > both.kept and none.peak > one.peak


def test_the_page_says_how_many_layers_have_to_be_checkpointed(tiny_config):
    config = PlanConfig(model=str(tiny_config), text_tokens=40, image_tokens=9, batch_size=4, chunk_sizes=(4,))
    answer = plan(config)
    assert answer.fewest is not None and answer.fewest.checkpointed_layers == 0
    assert "of its layers 0 of 2 have to be under it (`finetune --checkpointed-layers auto`)" in str(answer)
