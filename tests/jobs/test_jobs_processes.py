"""The long jobs under torchrun and accelerate with two and three CPU processes against one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sda_fast.data.vectors import read_item_vectors
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs.checkpoint import newest_checkpoint
from sda_fast.jobs.run_log import read_log
from sda_fast.train import ConfigMismatchError, finetune

RUN_JOBS = """
import json, os, sys
import torch
torch.set_num_threads(1)
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs import train_step
from sda_fast.losses.cached import is_out_of_memory
from sda_fast.train import FinetuneConfig, finetune

encode = train_step.encode
rank = os.environ["RANK"]

def encode_with_little_memory(most_items):
    def encode_few(lvlm, tensors, *arguments, **options):
        if len(tensors["input_ids"]) > most_items and rank == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(lvlm, tensors, *arguments, **options)
    return encode_few

embed(EmbedConfig(**json.loads(sys.argv[1])))
for settings in map(json.loads, sys.argv[2:]):
    name = os.path.basename(settings["output"])
    train_step.encode = encode_with_little_memory({"scarce": 1, "hopeless": 0}.get(name.split("-")[0], 100))
    try:
        finetune(FinetuneConfig(**settings))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: rank {rank} ended with {type(error).__name__}", flush=True)
"""


def run_together(processes, embedding, configs, folder):
    """`embed` and then `finetune` with each config, in processes under torchrun; what they printed and logged."""
    script = folder / "jobs.py"
    script.write_text(RUN_JOBS)
    arguments = [json.dumps(embedding), *(json.dumps(config.as_json()) for config in configs)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def embedding_settings(small_world, folder):
    return {
        "model": str(small_world.model), "items": str(small_world.items), "device": "cpu", "max_pixels": 56 * 56,
        "shard_items": 7, "batch_size": 4, "pca_dim": 4, "progress": False, "tower_cache": str(folder / "tower"),
    }  # fmt: skip


def assert_same_run(folder, alone):
    """The run in `folder` has the losses and, to rounding, the adapter of the result `alone`."""
    losses = [record["loss"] for record in read_log(folder / "log.jsonl")]
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    for parameter, tensor in load_file(alone.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(theirs[parameter], tensor, rtol=0, atol=3e-4, msg=parameter)


def read_training(folder):
    return json.loads((folder / "adapter" / "training.json").read_text())["training"]


def assert_same_vectors(table, alone):
    together, alone = read_item_vectors(table), read_item_vectors(alone)
    assert together.item_ids == alone.item_ids
    np.testing.assert_allclose(together.image, alone.image, rtol=0, atol=2e-5)
    np.testing.assert_allclose(together.text, alone.text, rtol=0, atol=2e-5)


def test_two_processes_give_what_one_does_with_an_uneven_batch(small_world, finetune_config, tmp_path):
    embedding = embedding_settings(small_world, tmp_path)
    common = {"batch_size": 7, "steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    fewest_layers = {"gradient_checkpointing": True, "checkpointed_layers": "auto"}
    cached = {**common, **fewest_layers, "chunk_size": 2, "tower_cache": tmp_path / "tower"}
    runs = {"chunked": cached, "infonce": {**common, "loss": "infonce"}}
    runs["scarce"] = {**common, **fewest_layers, "chunk_size": 100}
    runs["scarce-auto"] = {**common, "chunk_size": "auto"}
    hopeless = {"hopeless": {**common, "chunk_size": 2}, "hopeless-auto": {**common, "chunk_size": "auto"}}
    every = {**hopeless, **runs}
    together = {name: finetune_config(output=tmp_path / name, **settings) for name, settings in every.items()}
    done = run_together(2, {**embedding, "output": str(tmp_path / "two.safetensors")}, together.values(), tmp_path)

    # shares of 4 and 3 items, halved alike
    assert done.stderr.count("out of memory at step 1; going on with chunks of 2 items") == 2
    for name in hopeless:
        assert f"{name}: rank 0 ended with OutOfMemoryOnAnotherRank" in done.stdout
        assert f"{name}: rank 1 ended with OutOfMemoryError" in done.stdout
    _, state = newest_checkpoint(tmp_path / "scarce-auto" / "checkpoints")
    assert state["chunk_size"] == 1

    one = embed(EmbedConfig(**embedding, output=tmp_path / "one.safetensors"))
    assert_same_vectors(tmp_path / "two.safetensors", one)

    with pytest.raises(ConfigMismatchError, match=r"processes \(checkpoint: 2, now: 1\)"):
        finetune(together["chunked"])
    for name, settings in runs.items():
        alone = finetune(finetune_config(output=tmp_path / f"{name}-alone", **settings))
        assert_same_run(tmp_path / name, alone)


def test_three_processes_give_what_one_does_with_an_uneven_batch(small_world, finetune_config, tmp_path):
    embedding = embedding_settings(small_world, tmp_path)
    settings = {"batch_size": 7, "steps": 2, "lora_dropout": 0.0, "learning_rate": 1e-3, "chunk_size": 2}
    together = finetune_config(output=tmp_path / "together", **settings)
    run_together(3, {**embedding, "output": str(tmp_path / "three.safetensors")}, [together], tmp_path)
    one = embed(EmbedConfig(**embedding, output=tmp_path / "one.safetensors"))
    assert_same_vectors(tmp_path / "three.safetensors", one)
    assert_same_run(tmp_path / "together", finetune(finetune_config(output=tmp_path / "alone", **settings)))


def test_the_command_runs_under_accelerate_launch_and_one_process_prints(small_world, finetune_config, tmp_path):
    settings = {"batch_size": 5, "steps": 2, "lora_dropout": 0.0, "learning_rate": 1e-3}
    # with --cpu it would start one process
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m"),
        *("sda_fast", "finetune", "--model", str(small_world.model), "--items", str(small_world.items)),
        *("--output", str(tmp_path / "together"), "--device", "cpu", "--max-pixels", str(56 * 56)),
        *("--no-gradient-checkpointing", "--no-progress", "--temperature", "1", "--lora-dropout", "0"),
        *("--batch-size", "5", "--steps", "2", "--learning-rate", "1e-3"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "no-defaults")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("FinetuneResult(") == 1
    assert read_training(tmp_path / "together")["processes"] == 2
    assert_same_run(tmp_path / "together", finetune(finetune_config(output=tmp_path / "alone", **settings)))
