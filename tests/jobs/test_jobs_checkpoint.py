import json
import logging
import random

import numpy as np
import pytest
import torch

from sda_fast.jobs import checkpoint
from sda_fast.jobs.run_log import RunLog, read_log


def write_one(folder, step, content="x"):
    return checkpoint.write_checkpoint(
        folder, step, {"note": content}, lambda path: (path / "a.txt").write_text(content)
    )


def test_newest_valid_checkpoint_is_found(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path / "absent") is None
    write_one(tmp_path, 9)
    newest = write_one(tmp_path, 10, "y")
    path, state = checkpoint.newest_checkpoint(tmp_path)
    assert path == newest and state == {"note": "y", "step": 10}


@pytest.mark.parametrize("damage", ["content", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    good, bad = write_one(tmp_path, 1), write_one(tmp_path, 2)
    if damage == "content":
        (bad / "a.txt").write_text("z")
    elif damage == "missing":
        (bad / "a.txt").unlink()
    elif damage == "manifest":
        (bad / checkpoint.MANIFEST).write_text((bad / checkpoint.MANIFEST).read_text()[:-20])
    else:
        (bad / checkpoint.MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_checkpoint(tmp_path)[0] == good
    assert str(bad) in caplog.text


def test_a_half_written_checkpoint_is_ignored_with_a_warning_and_later_removed(tmp_path, caplog):
    good = write_one(tmp_path, 1)
    (tmp_path / "unfinished-00000002").mkdir()
    assert checkpoint.newest_checkpoint(tmp_path)[0] == good
    assert "unfinished-00000002" in caplog.text
    checkpoint.prune_checkpoints(write_one(tmp_path, 3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_older_checkpoints_and_no_half_folder(tmp_path, error):
    good = write_one(tmp_path, 1)

    def fail(path):
        (path / "a.txt").write_text("half")
        raise error

    with pytest.raises(type(error)):
        checkpoint.write_checkpoint(tmp_path, 2, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert checkpoint.newest_checkpoint(tmp_path)[0] == good


def test_pruning_never_counts_later_damaged_checkpoints(tmp_path):
    for step in (1, 2, 3, 9):
        write_one(tmp_path, step)
    checkpoint.prune_checkpoints(tmp_path / "step-00000003", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000009"]


def trained_optimizer(seed, steps):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(()))]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (parameters[0].square().sum() + parameters[1].square()).backward()
        optimizer.step()
    return optimizer


def test_optimizer_state_survives_bit_for_bit(tmp_path):
    optimizer, other = trained_optimizer(0, 3), trained_optimizer(1, 0)
    checkpoint.save_optimizer(optimizer, tmp_path / "o.safetensors")
    checkpoint.load_optimizer(other, tmp_path / "o.safetensors")
    a, b = optimizer.state_dict(), other.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        assert all(torch.equal(state[name], b["state"][index][name]) for name in state)


def test_an_optimizer_without_steps_can_be_saved(tmp_path):
    checkpoint.save_optimizer(trained_optimizer(0, 0), tmp_path / "o.safetensors")
    other = trained_optimizer(1, 2)
    checkpoint.load_optimizer(other, tmp_path / "o.safetensors")
    assert other.state_dict()["state"] == {}


def test_random_states_of_torch_numpy_and_python_survive():
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)
    state = checkpoint.random_state()

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(2).tolist()

    first = draw()
    draw()
    checkpoint.restore_random_state(state)
    assert draw() == first


def test_log_drops_what_lies_beyond_the_checkpoint_and_a_torn_line(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, loss=float(step) if step < 3 else float("nan"))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["loss"] for record in read_log(log.path)] == [1.0, 2.0, None]
    resumed = RunLog(tmp_path, after_step=2, tensorboard=False)
    resumed.write(3, loss=7.0)
    resumed.close()
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 7.0},
    ]
