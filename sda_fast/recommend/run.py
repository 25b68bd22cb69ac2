"""The job `recommend`: every method with every recommender and seed, evaluated alike."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from sda_fast.atomic import write_json_atomic, write_safetensors_atomic
from sda_fast.data.interactions import read_interactions
from sda_fast.data.items import read_items
from sda_fast.data.split import Split, leave_one_out
from sda_fast.data.vectors import read_item_vectors
from sda_fast.presets import log_differences
from sda_fast.recommend.config import BASELINE, ID_ONLY, RecommendConfig
from sda_fast.recommend.ranking import METRICS, Scorer, metrics_by_group, rank_held_out, user_groups
from sda_fast.recommend.results import (
    FORMAT,
    RESULTS_NAME,
    RecommendResult,
    RunStore,
    fingerprint_of,
    summarize,
)

logger = logging.getLogger(__name__)

ALIGNED = " + alignment"

_COMMON_SETTINGS = ("split_seed", "sampled_negatives")
_NETWORK_SETTINGS = (
    *("embedding_dim", "max_length", "num_blocks", "num_heads", "dropout", "mask_probability", "loss"),
    *("num_negatives", "epochs", "patience", "evaluate_every", "validation_users", "batch_positions"),
    *("learning_rate", "weight_decay"),
)
_ADAPTER_SETTINGS = ("adapter_hidden", "adapter_activation")
_ALIGNMENT_SETTINGS = ("alignment_weight", "alignment_temperature", "alignment_over")
_FACTOR_SETTINGS = ("factor_dim", "factor_epochs", "factor_learning_rate")


@dataclass(frozen=True)
class _Run:
    """One line of work; `vectors` names the table, None for none."""

    method: str
    recommender: str
    seed: int
    vectors: str | None = None

    @property
    def aligned(self) -> bool:
        return self.method.endswith(ALIGNED)

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields of the configuration that its outcome depends on."""
        if self.method == BASELINE:
            return _COMMON_SETTINGS
        if self.recommender in ("vbpr", "bpr"):
            return (*_COMMON_SETTINGS, *_FACTOR_SETTINGS)
        of_vectors = () if self.vectors is None else _ADAPTER_SETTINGS
        of_alignment = _ALIGNMENT_SETTINGS if self.aligned else ()
        return (*_COMMON_SETTINGS, *_NETWORK_SETTINGS, *of_vectors, *of_alignment)


def recommend(config: RecommendConfig) -> RecommendResult:
    """Train and evaluate recommenders on a leave-one-out split, with and without item vectors.

    Per user the last item is the test item, the last but one the validation item; models train on the rest, the best
    epoch is chosen on the validation items, the test items are looked at once, by the finished model. Metrics: Hit@10
    and NDCG@10, among all items not seen before ("full") and among fixed sampled negatives ("sampled"), for all users,
    by the test item's number of training interactions (tail, popular) and by the length of the user's history (short,
    long). Every finished run is kept in a file of its own; a second call makes only what is missing or was made from
    other data or settings.

    Returns:
        The result; results.json is in `config.output`.

    Raises:
        DataError: an input file is missing or broken.
        ValueError: no user has three different items, or fewer than half of the items have a vector.
    """
    start = time.perf_counter()
    log_differences(config)
    catalogue = None if config.items is None else read_items(config.items)
    split = leave_one_out(read_interactions(config.interactions, catalogue), config.split_seed)
    if not len(split.evaluated_users):
        raise ValueError(f"no user in {config.interactions} has 3 different items, so nothing can be evaluated")
    tables = {name: read_table(path, split.item_ids, config.vector_part) for name, path in config.vectors.items()}
    bench = _Bench(config, split, tables)
    runs = []
    planned = list(_planned_runs(config))
    with tqdm(planned, disable=not config.progress, unit="run", desc="recommenders") as progress:
        for run in progress:
            progress.set_postfix_str(f"{run.method}, {run.recommender}, seed {run.seed}")
            runs.append(bench.result_of(run))
            result = _write_results(config, split, bench, runs, len(planned), time.perf_counter() - start)
    return result


def read_table(path: Path, item_ids: list[str], part: str = "vectors") -> torch.Tensor:
    """[len(item_ids), d] float32 from a table of item vectors, in the order of `item_ids`.

    An item without a vector gets the table's mean and is counted in a warning.

    Raises:
        ValueError: more than half of the items have no vector.
    """
    table = read_item_vectors(path)
    values = getattr(table, part)
    index = {name: position for position, name in enumerate(table.item_ids)}
    positions = np.array([index.get(name, -1) for name in item_ids])
    missing = int((positions < 0).sum())
    if missing * 2 > len(item_ids):
        raise ValueError(f"{path} has vectors for {len(item_ids) - missing} of {len(item_ids)} items only")
    if missing:
        logger.warning("%s: missing_vector x %d. The item gets the mean of all vectors.", path, missing)
    rows = np.concatenate([values, values.mean(0, keepdims=True)])[positions]
    return torch.as_tensor(rows)


class _Bench:
    """Makes single runs, or finds them made."""

    def __init__(self, config: RecommendConfig, split: Split, tables: dict[str, torch.Tensor]) -> None:
        self.config, self.split, self.tables = config, split, tables
        self.store = RunStore(config.output)
        self.users = split.evaluated_users
        self.groups = user_groups(split, self.users)
        self.negatives: np.ndarray | None = None
        if config.sampled_negatives:
            self.negatives = split.sample_negatives(config.sampled_negatives)
        has_cuda = torch.cuda.is_available()
        self.device = torch.device(
            "cuda" if config.device == "cuda" or (config.device == "auto" and has_cuda) else "cpu"
        )
        self.data_fingerprint = fingerprint_of(
            {"items": split.num_items},
            [split.train_offsets, split.train_items, split.validation_items, split.test_items],
        )

    def result_of(self, run: _Run) -> dict[str, Any]:
        table = None if run.vectors is None else self.tables[run.vectors]
        settings = {name: getattr(self.config, name) for name in run.settings}
        parts = {"data": self.data_fingerprint, "settings": settings, **dataclasses.asdict(run)}
        fingerprint = fingerprint_of(parts, [] if table is None else [table.numpy()])
        found = self.store.load(run.method, run.recommender, run.seed, fingerprint)
        if found is not None and not self._lacks_embedding(run):
            return found
        begin = time.perf_counter()
        scorer, training = self._train(run, table)
        trained = time.perf_counter()
        ranks = rank_held_out(scorer, self.split, self.users, test=True, negatives=self.negatives)
        record = {
            **dataclasses.asdict(run),
            "fingerprint": fingerprint,
            "metrics": metrics_by_group(ranks, self.groups),
            "train_seconds": trained - begin,
            "evaluate_seconds": time.perf_counter() - trained,
            **training,
        }
        self.store.save(record)
        return record

    def _train(self, run: _Run, table: torch.Tensor | None) -> tuple[Scorer, dict[str, Any]]:
        from sda_fast.recommend.baselines import baseline_scorer, factor_scorer

        config, split = self.config, self.split
        if run.method == BASELINE:
            return baseline_scorer(run.recommender, split, run.seed), {}
        if run.recommender in ("vbpr", "bpr"):
            return factor_scorer(split, config, run.seed, table), {"epochs": config.factor_epochs}
        from sda_fast.recommend.training import network_scorer, train_sequence_model

        align_to = None
        if run.aligned:
            align_to = torch.as_tensor(load_file(self._id_embedding_path(run))["item_embedding"])
        network, log = train_sequence_model(
            run.recommender, split, config, run.seed, table=table, align_to=align_to, device=self.device
        )
        if run.method == ID_ONLY:
            weight = network.item_vectors().cpu().numpy()
            write_safetensors_atomic(self._id_embedding_path(run), {"item_embedding": weight})
        training = {
            "epochs": len(log.losses),
            "best_epoch": log.best_epoch,
            f"validation_{METRICS[1]}": log.validation,
            "losses": log.losses,
        }
        return network_scorer(network, split, config), training

    def _lacks_embedding(self, run: _Run) -> bool:
        is_network = run.method == ID_ONLY and run.recommender != "bpr"
        return is_network and bool(self.config.alignment_weight) and not self._id_embedding_path(run).is_file()

    def _id_embedding_path(self, run: _Run) -> Path:
        return self.store.path(ID_ONLY, run.recommender, run.seed).with_suffix(".safetensors")


def _planned_runs(config: RecommendConfig) -> Iterator[_Run]:
    for name in config.baselines:
        for seed in config.seeds if name == "random" else config.seeds[:1]:
            yield _Run(BASELINE, name, seed)
    for recommender in config.recommenders:
        for seed in config.seeds:
            if config.id_only:
                yield _Run(ID_ONLY, "bpr" if recommender == "vbpr" else recommender, seed)
            for name in config.vectors:
                yield _Run(name, recommender, seed, name)
                if config.alignment_weight and recommender != "vbpr":
                    yield _Run(name + ALIGNED, recommender, seed, name)


def _write_results(
    config: RecommendConfig, split: Split, bench: _Bench, runs: list[dict[str, Any]], planned: int, seconds: float
) -> RecommendResult:
    content = {
        "format": FORMAT,
        "complete": len(runs) == planned,
        "config": config.as_json(),
        "versions": _versions(),
        "device": _device_name(bench.device),
        "dataset": _describe(config, split, bench),
        "seconds": seconds,
        "runs": [{key: value for key, value in run.items() if key != "fingerprint"} for run in runs],
        "table": [dataclasses.asdict(row) for row in summarize(runs)],
    }
    path = config.output / RESULTS_NAME
    write_json_atomic(path, content)
    return RecommendResult(path, content)


def _describe(config: RecommendConfig, split: Split, bench: _Bench) -> dict[str, Any]:
    lengths = np.diff(split.train_offsets)
    return {
        "name": config.dataset_name or config.interactions.name,
        "users": split.num_users,
        "evaluated_users": len(bench.users),
        "items": split.num_items,
        "interactions": len(split.train_items) + 2 * len(bench.users),
        "training_interactions": len(split.train_items),
        "median_training_length": float(np.median(lengths)),
        "items_without_training_interaction": int((split.item_train_counts == 0).sum()),
        "groups": {name: int(members.sum()) for name, members in bench.groups.items()},
        "warnings": dict(split.warnings),
    }


def _versions() -> dict[str, str]:
    names = ("sda-fast", "torch", "cornac", "transformers", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            logger.debug("%s is not installed as a distribution", name)
    return versions


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
