"""The whole job on small generated logs: what must win wins, what was done is kept, the test items stay unseen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sda_fast.data.split import Split
from sda_fast.data.vectors import ItemVectors, write_item_vectors
from sda_fast.recommend import RecommendConfig, read_results, recommend
from sda_fast.recommend import run as job
from sda_fast.recommend.baselines import factor_scorer
from sda_fast.recommend.training import network_scorer, train_sequence_model

NUM_ITEMS, NUM_TOPICS = 240, 8
SMALL = {
    "embedding_dim": 16,
    "adapter_hidden": 24,
    "max_length": 10,
    "num_heads": 1,
    "batch_positions": 64,
    "learning_rate": 5e-3,
    "sampled_negatives": 20,
    "factor_epochs": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Users walk through the topics in a fixed order, items of a topic are interchangeable and each is rare."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    topic_of_item = np.arange(NUM_ITEMS) % NUM_TOPICS
    lines = ["user_id\titem_id\ttimestamp"]
    for user in range(160):
        topic = rng.integers(NUM_TOPICS)
        seen: set[int] = set()
        for step in range(7):
            members = [
                item for item in np.flatnonzero(topic_of_item == (topic + step) % NUM_TOPICS) if item not in seen
            ]
            item = int(rng.choice(members))
            seen.add(item)
            lines.append(f"user{user}\titem{item}\t{step}")
    log = folder / "interactions.tsv"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    oracle = np.eye(NUM_TOPICS, dtype=np.float32)[topic_of_item]
    oracle = oracle + 0.05 * rng.standard_normal(oracle.shape).astype(np.float32)
    ids = [f"item{item}" for item in range(NUM_ITEMS)]
    noise = rng.standard_normal(oracle.shape).astype(np.float32)
    write_item_vectors(folder / "oracle.safetensors", ItemVectors(ids, oracle, oracle, oracle))
    write_item_vectors(folder / "noise.safetensors", ItemVectors(ids, noise, noise, noise))
    return {"interactions": log, "oracle": folder / "oracle.safetensors", "noise": folder / "noise.safetensors"}


def config_for(inputs: dict[str, Path], output: Path, **changes) -> RecommendConfig:
    settings = {
        **SMALL,
        "interactions": inputs["interactions"],
        "output": output,
        "seeds": (0,),
        "epochs": 2,
        **changes,
    }
    return RecommendConfig(**settings)


def mean_of(result, method: str, recommender: str, group: str = "all", metric: str = "ndcg@10") -> float:
    for row in result.rows:
        wanted = (method, recommender, "full", group, metric)
        if (row.method, row.recommender, row.protocol, row.group, row.metric) == wanted:
            return row.mean
    raise AssertionError(f"no row for {method}, {recommender}, {group}")


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_content_vectors_beat_ids_and_noise_where_every_item_is_rare(loss: str, inputs, tmp_path) -> None:
    config = config_for(
        inputs,
        tmp_path,
        vectors={"oracle": inputs["oracle"], "noise": inputs["noise"]},
        recommenders=("sasrec", "gru4rec") if loss == "ce" else ("sasrec",),
        epochs=6,
        loss=loss,
    )
    result = recommend(config)
    for recommender in config.recommenders:
        oracle = mean_of(result, "oracle", recommender)
        assert oracle > 1.5 * mean_of(result, "ID only", recommender)
        assert oracle > 1.5 * mean_of(result, "noise", recommender)
        assert oracle > 2 * mean_of(result, "baseline", "random")


def test_bert4rec_and_vbpr_learn_from_vectors(inputs, tmp_path) -> None:
    config = config_for(
        inputs, tmp_path, vectors={"oracle": inputs["oracle"]}, recommenders=("bert4rec", "vbpr"), epochs=8
    )
    result = recommend(config)
    assert mean_of(result, "oracle", "bert4rec") > 1.5 * mean_of(result, "ID only", "bert4rec")
    assert {(row.method, row.recommender) for row in result.rows} >= {("oracle", "vbpr"), ("ID only", "bpr")}


def test_results_on_disk_hold_settings_counts_and_every_run(inputs, tmp_path) -> None:
    config = config_for(inputs, tmp_path, seeds=(0, 1), vectors={"oracle": inputs["oracle"]}, baselines=("popularity",))
    recommend(config)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["complete"]
    assert data["dataset"]["evaluated_users"] == 160
    assert data["dataset"]["training_interactions"] == 160 * 5
    assert data["dataset"]["groups"]["short users"] == 160
    assert data["config"]["epochs"] == 2
    assert {"torch", "cornac", "python"} <= set(data["versions"])
    assert [(run["method"], run["seed"]) for run in data["runs"]] == [
        ("baseline", 0),
        ("ID only", 0),
        ("oracle", 0),
        ("ID only", 1),
        ("oracle", 1),
    ]
    values = [run["metrics"]["full"]["all"]["ndcg@10"] for run in data["runs"] if run["method"] == "oracle"]
    row = next(
        row
        for row in read_results(tmp_path).rows
        if (row.method, row.protocol, row.group, row.metric) == ("oracle", "full", "all", "ndcg@10")
    )
    assert row.mean == pytest.approx(np.mean(values))
    assert row.std == pytest.approx(np.std(values, ddof=1))


def test_a_killed_job_continues_with_the_missing_runs_only(inputs, tmp_path, monkeypatch) -> None:
    config = config_for(inputs, tmp_path / "killed", seeds=(0, 1), vectors={"oracle": inputs["oracle"]})
    trained: list[tuple[str, int]] = []
    whole = job._Bench._train

    def train(self, run, table):
        if len(trained) == 5 and not continued:
            raise KeyboardInterrupt
        trained.append((run.method, run.seed))
        return whole(self, run, table)

    continued = False
    monkeypatch.setattr(job._Bench, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        recommend(config)
    assert not read_results(tmp_path / "killed").data["complete"]
    continued = True
    resumed = recommend(config)
    assert len(trained) == len(set(trained) | {("baseline", 0), ("baseline", 1)}) + 2
    straight = recommend(dataclasses.replace(config, output=tmp_path / "straight"))
    assert [dataclasses.replace(row) for row in resumed.rows] == straight.rows


def test_other_settings_or_vectors_are_not_taken_from_old_runs(inputs, tmp_path) -> None:
    config = config_for(inputs, tmp_path, vectors={"oracle": inputs["oracle"]}, baselines=())
    first = recommend(config)
    longer = recommend(dataclasses.replace(config, epochs=3))
    assert [run["epochs"] for run in longer.data["runs"]] == [3, 3]
    other = recommend(dataclasses.replace(config, vectors={"oracle": inputs["noise"]}))
    assert mean_of(first, "ID only", "sasrec") == mean_of(other, "ID only", "sasrec")
    assert mean_of(first, "oracle", "sasrec") != mean_of(other, "oracle", "sasrec")


def test_a_seed_gives_the_same_run_whatever_was_drawn_before(inputs, tmp_path) -> None:
    split = split_from(inputs)
    config = config_for(inputs, tmp_path)
    users = split.evaluated_users

    def scores(seed: int) -> torch.Tensor:
        torch.rand(7)
        network, _ = train_sequence_model("sasrec", split, config, seed)
        return network_scorer(network, split, config)(users, True)

    torch.testing.assert_close(scores(0), scores(0), rtol=0, atol=0)
    assert not torch.equal(scores(0), scores(1))
    vectors = torch.randn(split.num_items, 6, generator=torch.Generator().manual_seed(0))
    factors = [
        factor_scorer(split, config_for(inputs, tmp_path, factor_epochs=1), 3, vectors)(users, True) for _ in "ab"
    ]
    torch.testing.assert_close(factors[0], factors[1], rtol=0, atol=0)


def split_from(inputs: dict[str, Path]) -> Split:
    from sda_fast.data.interactions import read_interactions
    from sda_fast.data.split import leave_one_out

    return leave_one_out(read_interactions(inputs["interactions"]))


@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "gru4rec"])
def test_training_and_model_choice_never_see_the_test_items(name: str, inputs, tmp_path) -> None:
    split = split_from(inputs)
    hidden = dataclasses.replace(split, test_items=np.where(split.test_items >= 0, 0, -1).astype(np.int32))
    config = config_for(inputs, tmp_path, epochs=2)
    networks = [train_sequence_model(name, data, config, 0)[0] for data in (split, hidden)]
    for first, second in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_epoch_kept_is_the_best_on_validation(inputs, tmp_path) -> None:
    split = split_from(inputs)
    config = config_for(inputs, tmp_path, epochs=6, patience=2)
    _, log = train_sequence_model("sasrec", split, config, 0)
    assert log.best_validation == max(log.validation)
    assert log.validation[log.best_epoch - 1] == log.best_validation
    assert len(log.losses) == min(6, log.best_epoch + 2)


def test_items_without_a_vector_get_the_mean_and_are_counted(inputs, caplog) -> None:
    ids = [f"item{item}" for item in range(NUM_ITEMS)] + ["stranger"]
    table = job.read_table(inputs["oracle"], ids)
    assert "missing_vector x 1" in caplog.text
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    with pytest.raises(ValueError, match="vectors for 1 of 3 items"):
        job.read_table(inputs["oracle"], ["item0", "a", "b"])


def test_alignment_adds_rows_of_its_own(inputs, tmp_path) -> None:
    pytest.importorskip("sda_fast.ops.cmsa")
    for over in ("items", "positions"):
        config = config_for(
            inputs,
            tmp_path,
            vectors={"oracle": inputs["oracle"]},
            baselines=(),
            alignment_weight=0.5,
            alignment_over=over,
        )
        result = recommend(config)
        assert [run["method"] for run in result.data["runs"]] == ["ID only", "oracle", "oracle + alignment"]
        first, second = (run["losses"][0] for run in result.data["runs"][1:])
        assert second > first


def test_settings_that_no_path_supports_are_refused(tmp_path) -> None:
    for changes, message in [
        ({"recommenders": ("svd",)}, "unknown 'svd'"),
        ({"loss": "hinge"}, "unknown 'hinge'"),
        ({"embedding_dim": 15, "num_heads": 2}, "15 is not a multiple of num_heads 2"),
        ({"seeds": ()}, "at least one seed"),
        ({"vectors": {"ID only": "x"}}, "is taken"),
        ({"alignment_weight": 1.0, "id_only": False}, "needs id_only=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            RecommendConfig(interactions="log.tsv", output=tmp_path, **changes)
