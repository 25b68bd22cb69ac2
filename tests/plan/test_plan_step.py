"""The planned step beside the real one: same bytes of parameters, optimiser and kept activations, same products."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from sda_fast.planning.cards import CARDS
from sda_fast.planning.gpu import as_on_a_gpu
from sda_fast.planning.ledger import Ledger
from sda_fast.planning.model import fake_lvlm
from sda_fast.planning.step import plan_step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny Qwen2.5-VL folder with eight items."""
    from sda_fast.data.items import Catalogue, read_items
    from sda_fast.data.synthetic import generate_catalogue
    from sda_fast.lvlm.tiny import build_tiny_lvlm

    folder = tmp_path_factory.mktemp("planned")
    paths = generate_catalogue(folder / "catalogue", num_items=60, num_users=1, seed=0, image_side=56)
    items = Catalogue(read_items(paths.items).items[:8])
    model = build_tiny_lvlm(
        items, folder / "model", pretrain_steps=0, hidden_size=64, num_layers=2, image_side=56, vocab_size=400
    )
    return model, items.items, paths.items


def config_for(model, **changes):
    from sda_fast.train import FinetuneConfig

    settings = {
        "model": str(model), "items": Path("items.jsonl"), "output": Path("run"), "batch_size": 4, "device": "cpu",
        "gradient_checkpointing": False, "quantization": "nf4", "max_pixels": 56 * 56,
    }  # fmt: skip
    return FinetuneConfig(**{**settings, **changes})


def real_step(model, items, config):
    """Bytes of a real step on the CPU: frozen, trained, optimiser, and storages kept for backward by the encoder."""
    from sda_fast.jobs.batches import BatchMaker
    from sda_fast.jobs.features import Tower
    from sda_fast.jobs.train_state import make_loss, make_optimizer, moda_config
    from sda_fast.jobs.train_step import ContrastiveStep, training_mode
    from sda_fast.lvlm.collate import ImageOptions
    from sda_fast.lvlm.load import load_lvlm
    from sda_fast.moda.inject import adapt_model
    from sda_fast.planning.model import weight_tensors

    lvlm = load_lvlm(model, quantization=config.quantization, dtype=torch.float32, device="cpu")
    adapt_model(lvlm.model, moda_config(config, lvlm))
    loss = make_loss(config)
    parameters = [*(one for one in lvlm.model.parameters() if one.requires_grad), *loss.parameters()]
    optimizer = make_optimizer(config, [{"params": parameters}], torch.device("cpu"))
    maker = BatchMaker(lvlm, config.prompts(), ImageOptions(config.min_pixels, config.max_pixels))
    batch = maker.make(items[: config.batch_size], config.chunk_size)
    frozen = storages(weight_tensors(lvlm.model))
    own = frozen | storages(parameters)
    kept = {}

    class Watched(ContrastiveStep):
        def encode(self, chunk, modality):
            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage
                return tensor if tensor.grad_fn is None else tensor.detach()

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return super().encode(chunk, modality)

    with training_mode(lvlm, gradient_checkpointing=config.gradient_checkpointing):
        Watched(lvlm, loss, config.loss_width(lvlm), Tower(lvlm))(batch)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    chunks = {"image": batch.images.chunks[0].tensors, "text": batch.texts.chunks[0].tensors}
    sizes = {
        "weights": sum(frozen.values()),
        "adapters": sum(storages(parameters).values()),
        "optimizer": sum(storages(states).values()),
        "activations": sum(storage.nbytes() for storage in kept.values()),
    }
    return sizes, chunks


def storages(tensors):
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def planned_step(model, config, chunks, card=None):
    from sda_fast.lvlm.load import read_config

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        dtype = torch.float32 if card is None else torch.bfloat16
        lvlm = fake_lvlm(read_config(model), str(model), quantization=config.quantization, dtype=dtype)
    return plan_step(lvlm, config, chunks, fake_mode, card=card)


@pytest.mark.parametrize(("quantization", "checkpointing"), [("none", False), ("nf4", True)])
def test_planned_bytes_are_those_of_the_real_step(world, quantization, checkpointing):
    model, items, _ = world
    config = config_for(model, quantization=quantization, gradient_checkpointing=checkpointing)
    real, chunks = real_step(model, items, config)
    step = planned_step(model, config, chunks)
    assert step.parts["adapters"] == real["adapters"]
    assert step.parts["optimizer"] == real["optimizer"]
    assert step.parts["weights"] == real["weights"]
    tolerance = 0 if checkpointing else 0.01
    assert step.kept == pytest.approx(real["activations"], rel=tolerance, abs=0)


def test_lengths_come_from_the_items_by_the_model_s_own_processor_or_are_estimated(world):
    from sda_fast.lvlm.collate import ImageOptions
    from sda_fast.lvlm.load import read_config
    from sda_fast.lvlm.prompts import PromptConfig
    from sda_fast.plan import PlanConfig, plan
    from sda_fast.planning.batch import estimated_lengths

    model, items, path = world
    settings = {"batch_size": 4, "chunk_sizes": (4,), "max_pixels": 56 * 56, "quantization": "none", "search": False}
    answer = plan(PlanConfig(model=str(model), items=path, **settings))
    assert "processor" in answer.lengths.source
    assert 0 < answer.lengths.text_share <= 1 and answer.lines[0].seconds > 0
    options = ImageOptions(max_pixels=56 * 56)
    chosen = {"text_tokens": None, "image_tokens": None}
    estimated = estimated_lengths(read_config(model), items, PromptConfig(), options, **chosen)
    assert estimated.grid == (2, 2) and "4 characters a token" in estimated.source


def planned(model, **changes):
    from sda_fast.plan import PlanConfig, plan

    settings = {"text_tokens": 40, "image_tokens": 16, "batch_size": 8, "chunk_sizes": (8,), "search": False}
    return plan(PlanConfig(model=str(model), **{**settings, **changes})).lines[0]


@pytest.fixture(scope="module")
def wide_tower(tmp_path_factory):
    """config.json of a Qwen2.5-VL whose tower is what takes the memory."""
    from sda_fast.planning.model import preset_configs

    config = preset_configs()["Qwen/Qwen2.5-VL-7B-Instruct"].to_dict()
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 152064, "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    config["vision_config"] |= {
        "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("wide") / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_fewer_pictures_at_a_time_lower_the_peak_and_not_the_work(wide_tower):
    at_once, alone = (planned(wide_tower, tower_batch=size, image_tokens=144) for size in (8, 1))
    assert alone.peak < at_once.peak and alone.parts["weights"] == at_once.parts["weights"]
    assert alone.flops == pytest.approx(at_once.flops, rel=1e-3)


def test_with_the_tower_cached_its_work_goes_and_parked_its_weights_too(wide_tower):
    from transformers import AutoModel

    from sda_fast.lvlm.load import read_config

    runs, cached = planned(wide_tower, tower_batch=1), planned(wide_tower, tower_cached=True)
    parked = planned(wide_tower, tower_cached=True, tower_offload=True)
    visits = planned(wide_tower, tower_batch=1, tower_offload=True)
    with torch.device("meta"):
        tower = AutoModel.from_config(read_config(wide_tower.parent)).visual
    size = sum(2 * one.numel() for one in tower.parameters())
    assert cached.flops < 0.9 * runs.flops and cached.parts["weights"] == runs.parts["weights"]
    assert cached.parts["weights"] - parked.parts["weights"] == pytest.approx(size, rel=0.01)
    assert parked.flops == cached.flops and visits.flops == runs.flops
    assert parked.peak < visits.peak <= runs.peak
    assert runs.picture_bytes == cached.picture_bytes == 16 * 128 * 2


def test_nested_statistics_and_the_dtype_show_in_the_weights(wide_tower):
    nested, plain = planned(wide_tower), planned(wide_tower, double_quant=False)
    # Three linears of 8192 x 128 with a scale of one byte, or four, per 64 elements; attention's are small.
    more = plain.parts["weights"] - nested.parts["weights"]
    assert more == pytest.approx(3 * (3 * 8192 * 128 // 64), rel=0.2)
    assert planned(wide_tower, precision="fp32").parts["weights"] > 1.5 * nested.parts["weights"]


def test_recomputation_is_planned_without_the_products_that_it_leaves_out(world):
    model, items, _ = world
    config = config_for(model, gradient_checkpointing=True)
    _, chunks = real_step(model, items, config)
    spared = planned_step(model, config, chunks, CARDS["RTX 3060 12GB"])
    with set_checkpoint_early_stop(False):
        repeated = planned_step(model, config, chunks, CARDS["RTX 3060 12GB"])
    text = json.loads((model / "config.json").read_text())["text_config"]
    rows = sum(chunk["input_ids"].numel() for chunk in chunks.values())
    down_proj = 2 * rows * text["intermediate_size"] * text["hidden_size"]
    assert repeated.flops - spared.flops == text["num_hidden_layers"] * down_proj
    assert spared.peak <= repeated.peak and spared.seconds < repeated.seconds


@pytest.mark.parametrize("rows", [8, 4096])
def test_the_frozen_products_of_an_adapted_layer_are_counted_whatever_way_its_update_takes(rows):
    from sda_fast.ops.moda_linear import moda_linear

    card = CARDS["RTX 3060 12GB"]
    fake_mode = FakeTensorMode()
    ledger = Ledger(fake_mode, card.seconds, rounding=512)
    ledger.section = "layer"
    with fake_mode, ledger, as_on_a_gpu(ledger, card):
        x = torch.empty(rows, 1024, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(2048, 1024, dtype=torch.bfloat16)
        lora_A, lora_B = torch.empty(8, 1024, requires_grad=True), torch.empty(2048, 8, requires_grad=True)
        gates = torch.empty(1, 4, requires_grad=True)
        y = moda_linear(x, weight, lora_A, lora_B, gates, dropout=0.1)
        assert ledger.flops["layer"] == 2 * rows * 1024 * 2048
        y.sum().backward()
        assert ledger.flops["layer"] == 2 * 2 * rows * 1024 * 2048
