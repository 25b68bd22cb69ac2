import dataclasses
import json
import logging
import math
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sda_fast import train
from sda_fast.jobs import checkpoint, train_state
from sda_fast.losses.modules import CMSALoss
from sda_fast.train import ConfigMismatchError, FinetuneConfig, NonFiniteLossError, finetune, preset


def adapter_bytes(result):
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def test_loss_falls_and_the_adapter_folder_is_complete(finetune_config):
    config = finetune_config(steps=12, batch_size=12, learning_rate=1e-2, lora_dropout=0.0, checkpoint_every=0)
    result = finetune(config)
    assert result.steps == 12 and len(result.losses) == 12
    assert sum(result.losses[-3:]) < 0.9 * sum(result.losses[:3])
    assert result.temperature != 1.0
    assert sorted(path.name for path in result.adapter.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "training.json",
    ]  # fmt: skip
    card = (result.adapter / "README.md").read_text()
    assert "24 catalogue items" in card and "`batch_size` is 12; published: 32" in card and version("torch") in card
    records = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert {"loss", "temperature", "learning_rate", "grad_norm", "seconds"} <= records[0].keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "infonce", "normalize": True},
        {"adapter": "lora"},
        {"quantization": "none", "learnable_temperature": False},
    ],
    ids=["infonce", "lora", "16-bit, fixed temperature"],
)
def test_ablations_train(finetune_config, changes):
    result = finetune(finetune_config(steps=3, **changes))
    assert all(math.isfinite(loss) for loss in result.losses)
    trained = load_file(result.adapter / "adapter_model.safetensors")
    # B starts at zero.
    assert trained and all(bool(tensor.any()) for tensor in trained.values())
    assert (result.temperature == 1.0) == (changes.get("learnable_temperature") is False)


def test_the_same_settings_give_the_same_run_and_another_seed_another(finetune_config, tmp_path):
    runs = [finetune(finetune_config(steps=3, output=tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1]) and runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


@pytest.mark.parametrize("chunk_size", [2, 4, 100])
def test_chunked_step_equals_the_direct_step(finetune_config, tmp_path, chunk_size):
    settings = {"steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    direct = finetune(finetune_config(output=tmp_path / "direct", **settings))
    chunked = finetune(finetune_config(output=tmp_path / "chunked", chunk_size=chunk_size, **settings))
    assert chunked.losses == pytest.approx(direct.losses, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(finetune_config, tmp_path):
    plain = finetune(finetune_config(output=tmp_path / "plain", steps=3))
    recomputed = finetune(finetune_config(output=tmp_path / "recomputed", steps=3, gradient_checkpointing=True))
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-5)


def test_an_interrupted_run_continues_bit_for_bit(finetune_config, tmp_path, monkeypatch):
    whole = finetune(finetune_config(output=tmp_path / "whole"))
    config = finetune_config(output=tmp_path / "cut")
    write = train.RunLog.write

    def interrupt(self, step, **values):
        write(self, step, **values)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.RunLog, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert not (config.output / "adapter").exists()
    resumed = finetune(config)
    assert adapter_bytes(resumed) == adapter_bytes(whole) and resumed.losses == whole.losses


def test_a_run_killed_at_any_moment_continues_bit_for_bit(finetune_config, tmp_path, run_and_kill):
    whole = finetune(finetune_config(output=tmp_path / "whole", steps=10))
    config = finetune_config(output=tmp_path / "killed", steps=10)
    log = config.output / "log.jsonl"
    run_and_kill(config, lambda: log.is_file() and log.read_text().count("\n") >= 5)
    with log.open("a") as file:
        file.write('{"step": 6, "loss')
    resumed = finetune(config)
    assert adapter_bytes(resumed) == adapter_bytes(whole) and resumed.losses == whole.losses


def test_a_kill_while_a_checkpoint_is_being_written_loses_only_that_checkpoint(
    finetune_config, tmp_path, caplog, run_and_kill
):
    whole = finetune(finetune_config(output=tmp_path / "whole"))
    config = finetune_config(output=tmp_path / "killed")
    (config.output / "hold").mkdir(parents=True)
    slow = (
        "import time\n"
        "from sda_fast.jobs import checkpoint\n"
        "save = checkpoint.save_optimizer\n"
        "def slow(optimizer, path):\n"
        "    save(optimizer, path)\n"
        "    if '00000004' in str(path):\n"
        "        time.sleep(600)\n"
        "checkpoint.save_optimizer = slow\n"
    )
    half = config.output / "checkpoints" / "unfinished-00000004"
    run_and_kill(config, lambda: (half / "optimizer.safetensors").is_file(), first=slow)
    assert half.is_dir()
    with caplog.at_level(logging.WARNING):
        resumed = finetune(config)
    assert "unfinished-00000004" in caplog.text and not half.exists()
    assert adapter_bytes(resumed) == adapter_bytes(whole) and resumed.losses == whole.losses


def test_a_finished_run_is_returned_without_loading_the_model(finetune_config, monkeypatch):
    config = finetune_config(steps=2)
    first = finetune(config)
    monkeypatch.setattr(train, "build_state", lambda *_: pytest.fail("the model was loaded"))
    assert finetune(config) == first


def test_a_finished_run_whose_adapter_was_deleted_writes_it_again(finetune_config):
    config = finetune_config(steps=2)
    before = adapter_bytes(finetune(config))
    for path in (config.output / "adapter").iterdir():
        path.unlink()
    (config.output / "adapter").rmdir()
    assert adapter_bytes(finetune(config)) == before


def test_other_settings_than_the_checkpoint_s_are_named(finetune_config, small_world, tmp_path):
    config = finetune_config(steps=2)
    finetune(config)
    changed = dataclasses.replace(config, temperature=2.0, lora_dropout=0.5)
    with pytest.raises(ConfigMismatchError, match=r"lora_dropout \(checkpoint: 0.1, now: 0.5\), temperature"):
        finetune(changed)
    fewer = small_world.items.with_name("fewer.jsonl")
    fewer.write_text("".join(small_world.items.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigMismatchError, match="items"):
        finetune(dataclasses.replace(config, items=fewer))
    with pytest.raises(FileExistsError, match="resume"):
        finetune(dataclasses.replace(config, resume="never"))


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_keeps_the_last_checkpoint(finetune_config, monkeypatch):
    config = finetune_config(prefetch=False)
    call = train.ContrastiveStep.__call__
    steps = []

    def nan_at_the_fourth(self, batch):
        steps.append(1)
        return call(self, batch) * (math.nan if len(steps) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(train.ContrastiveStep, "__call__", nan_at_the_fourth)
        with pytest.raises(NonFiniteLossError, match="step 4: loss nan") as caught:
            finetune(config)
    assert len(set(caught.value.item_ids)) == 6 and all(name in str(caught.value) for name in caught.value.item_ids)
    path, state = checkpoint.newest_checkpoint(config.output / "checkpoints")
    assert state["step"] == 2 and path.name in str(caught.value)
    assert finetune(config).steps == 6


def test_a_full_disk_loses_nothing_that_was_written(finetune_config, tmp_path, monkeypatch):
    whole = finetune(finetune_config(output=tmp_path / "whole"))
    config = finetune_config(output=tmp_path / "full")
    save = checkpoint.save_file

    def full_at_step_four(tensors, path, metadata=None):
        if "00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_at_step_four)
        with pytest.raises(OSError, match=r"step 4 .*No space left.*step-00000002"):
            finetune(config)
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step-00000002"]
    assert adapter_bytes(finetune(config)) == adapter_bytes(whole)


def test_out_of_memory_halves_the_chunk_and_says_so(finetune_config, tmp_path, monkeypatch, caplog):
    settings = {"steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    whole = finetune(finetune_config(output=tmp_path / "whole", **settings))
    encode = train.ContrastiveStep.encode

    def small_card(self, chunk, modality):
        if len(chunk.tensors["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, chunk, modality)

    monkeypatch.setattr(train.ContrastiveStep, "encode", small_card)
    with caplog.at_level(logging.INFO):
        small = finetune(finetune_config(output=tmp_path / "small", **settings))
        assert "chunks of 3 items" in caplog.text and "chunks of 2 items" in caplog.text
        caplog.clear()
        chosen = finetune(finetune_config(output=tmp_path / "chosen", chunk_size="auto", **settings))
        assert "chunk size: 2" in caplog.text and "out of memory" not in caplog.text
    assert small.losses == pytest.approx(whole.losses, rel=1e-4)
    assert chosen.losses == pytest.approx(whole.losses, rel=1e-4)


def test_running_out_of_memory_in_the_loss_is_said_without_trying_smaller_chunks(finetune_config, monkeypatch, caplog):
    encode, encoded = train.ContrastiveStep.encode, []

    def counted(self, chunk, modality):
        encoded.append(modality)
        return encode(self, chunk, modality)

    def out_of_memory(self, images, texts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.ContrastiveStep, "encode", counted)
    monkeypatch.setattr(CMSALoss, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="in the loss, not in a chunk"):
        finetune(finetune_config(chunk_size=3))
    assert encoded == ["image"] * 2 + ["text"] * 2 and "out of memory" not in caplog.text


@pytest.mark.parametrize(
    ("wanted", "here", "processes", "expected", "current"),
    [
        ("cuda", "cuda:3", 4, "cuda:3", ["cuda:3"]),
        (None, "cuda:3", 4, "cuda:3", ["cuda:3"]),
        ("cuda", "cuda", 1, "cuda", ["cuda:0"]),
        ("cuda:1", "cuda", 1, "cuda:1", ["cuda:1"]),
        ("cpu", "cpu", 2, "cpu", []),
        (None, "cpu", 2, "cpu", []),
    ],
)
def test_each_process_takes_its_own_device(wanted, here, processes, expected, current, monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(str(device)))
    accelerator = SimpleNamespace(device=torch.device(here), num_processes=processes)
    assert str(train_state.chosen_device(wanted, accelerator)) == expected
    assert made_current == current


def test_one_gpu_by_number_for_several_processes_is_an_error():
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), num_processes=2)
    with pytest.raises(ValueError, match="device is cuda:1 but there are 2 processes"):
        train_state.chosen_device("cuda:1", accelerator)


def test_checkpoints_are_pruned_and_hold_no_pickle(finetune_config):
    result = finetune(finetune_config(keep_checkpoints=2))
    folder = result.adapter.parent / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_only_the_adapters_and_the_temperature_are_trained(finetune_config):
    from accelerate import Accelerator

    state = train_state.build_state(finetune_config(), Accelerator(cpu=True))
    trained = {name for name, parameter in state.lvlm.model.named_parameters() if parameter.requires_grad}
    assert trained and all("language_model.layers" in name for name in trained)
    assert len(state.parameters) == len(trained) + 1


def config(**changes):
    return FinetuneConfig(model="m", items="i.jsonl", output="o", **changes)


def test_defaults_are_the_published_settings():
    assert config().differences_from_published() == {}
    assert config(**preset("published")).total_steps(10) == 4000
    assert config(**preset("published", batch_size=16)).differences_from_published() == {"batch_size": (16, 32)}
    assert config(epochs=2.5).total_steps(10) == 25
    with pytest.raises(ValueError, match="published"):
        preset("other")


def test_every_setting_has_a_help_text():
    from sda_fast.embed import EmbedConfig

    for kind in (FinetuneConfig, EmbedConfig):
        assert all(setting.metadata.get("help") for setting in dataclasses.fields(kind))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 8, "num_experts": 3},
        {"temperature": 0.0},
        {"batch_size": 1},
        {"chunk_size": 0},
        {"steps": 5, "epochs": 1.0},
        {"lora_dropout": 1.0},
        {"learning_rate": float("nan")},
        {"min_pixels": 500, "max_pixels": 400},
    ],
)
def test_impossible_settings_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config(**changes)


def test_learning_rate_schedules():
    linear = config(learning_rate=1.0, schedule="linear", warmup_steps=2)
    assert [linear.learning_rate_at(step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = config(learning_rate=1.0, schedule="cosine")
    assert cosine.learning_rate_at(0, 4) == 1.0 and cosine.learning_rate_at(2, 4) == pytest.approx(0.5)
    assert config(learning_rate=1.0).learning_rate_at(3, 4) == 1.0


def test_more_items_in_a_batch_than_in_the_catalogue_is_an_error(finetune_config):
    with pytest.raises(ValueError, match=r"25 .* 24 items"):
        finetune(finetune_config(batch_size=25))


def test_compiled_layers_change_nothing(finetune_config, tmp_path, monkeypatch):
    compiled_layers = train.compiled_layers
    backends = []

    def without_code_generation(decoder):
        backends.append("aot_eager")
        return compiled_layers(decoder, "aot_eager")

    monkeypatch.setattr(train, "compiled_layers", without_code_generation)
    plain = finetune(finetune_config(output=tmp_path / "plain", steps=3))
    compiled = finetune(finetune_config(output=tmp_path / "compiled", steps=3, compile=True))
    assert backends == ["aot_eager"]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
