"""The long jobs under torchrun with two CPU processes against one process."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sda_fast.data.vectors import read_item_vectors
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs.run_log import read_log
from sda_fast.train import ConfigMismatchError, finetune

RUN_JOBS = """
import json, os, sys
import torch
torch.set_num_threads(1)
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs import train_step
from sda_fast.train import FinetuneConfig, finetune

encode = train_step.encode

def encode_one_at_a_time(lvlm, tensors, *arguments, **options):
    if len(tensors["input_ids"]) > 1 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return encode(lvlm, tensors, *arguments, **options)

embed(EmbedConfig(**json.loads(sys.argv[1])))
for settings in map(json.loads, sys.argv[2:]):
    train_step.encode = encode_one_at_a_time if settings["output"].endswith("scarce") else encode
    finetune(FinetuneConfig(**settings))
"""


def test_two_processes_give_what_one_does_with_an_uneven_batch(small_world, finetune_config, tmp_path):
    embedding = {
        "model": str(small_world.model), "items": str(small_world.items), "device": "cpu", "max_pixels": 56 * 56,
        "shard_items": 7, "batch_size": 4, "pca_dim": 4, "progress": False, "tower_cache": str(tmp_path / "tower"),
    }  # fmt: skip
    common = {"batch_size": 7, "steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-3}
    cached = {**common, "chunk_size": 2, "tower_cache": tmp_path / "tower"}
    runs = {"chunked": cached, "infonce": {**common, "loss": "infonce"}}
    runs["scarce"] = {**common, "chunk_size": 3}
    together = {name: finetune_config(output=tmp_path / name, **settings) for name, settings in runs.items()}

    script = tmp_path / "jobs.py"
    script.write_text(RUN_JOBS)
    arguments = [{**embedding, "output": str(tmp_path / "two.safetensors")}, *(c.as_json() for c in together.values())]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, *map(json.dumps, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    assert "out of memory at step 1; going on with chunks of 1 items" in done.stderr

    two = read_item_vectors(tmp_path / "two.safetensors")
    one = read_item_vectors(embed(EmbedConfig(**embedding, output=tmp_path / "one.safetensors")))
    assert two.item_ids == one.item_ids
    np.testing.assert_allclose(two.image, one.image, rtol=0, atol=2e-5)
    np.testing.assert_allclose(two.text, one.text, rtol=0, atol=2e-5)

    with pytest.raises(ConfigMismatchError, match=r"processes \(checkpoint: 2, now: 1\)"):
        finetune(together["chunked"])
    for name, settings in runs.items():
        alone = finetune(finetune_config(output=tmp_path / f"{name}-alone", **settings))
        losses = [record["loss"] for record in read_log(tmp_path / name / "log.jsonl")]
        assert losses == pytest.approx(alone.losses, rel=1e-4)
        theirs = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for parameter, tensor in load_file(alone.adapter / "adapter_model.safetensors").items():
            torch.testing.assert_close(theirs[parameter], tensor, rtol=0, atol=3e-4, msg=parameter)
