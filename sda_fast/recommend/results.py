"""Results on disk: one file per finished run, so that a killed job continues, and one results.json over all."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sda_fast.atomic import write_json_atomic
from sda_fast.recommend.ranking import GROUPS, METRICS, PROTOCOLS

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
FORMAT = 1


@dataclass(frozen=True)
class ResultRow:
    """Mean and spread over seeds of one metric of one method with one recommender.

    Attributes:
        std: standard deviation over the seeds (n - 1 in the denominator); None for a single seed.
    """

    method: str
    recommender: str
    protocol: str
    group: str
    metric: str
    mean: float
    std: float | None
    seeds: int
    users: int


def summarize(runs: Iterable[Mapping[str, Any]]) -> list[ResultRow]:
    """Rows for every method, recommender, protocol, group and metric that has a value, in the order of the runs."""
    of_pair: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        of_pair.setdefault((run["method"], run["recommender"]), []).append(run["metrics"])
    rows = []
    for (method, recommender), metrics in of_pair.items():
        for protocol in PROTOCOLS:
            for group in GROUPS:
                cells = [entry[protocol][group] for entry in metrics if protocol in entry]
                cells = [cell for cell in cells if cell["users"]]
                for metric in METRICS if cells else ():
                    values = np.array([cell[metric] for cell in cells])
                    std = float(values.std(ddof=1)) if len(values) > 1 else None
                    rows.append(
                        ResultRow(
                            method,
                            recommender,
                            protocol,
                            group,
                            metric,
                            float(values.mean()),
                            std,
                            len(values),
                            cells[0]["users"],
                        )
                    )
    return rows


@dataclass
class RecommendResult:
    """What `recommend` found; `data` is the content of results.json at `path`."""

    path: Path
    data: dict[str, Any]

    @property
    def rows(self) -> list[ResultRow]:
        return [ResultRow(**row) for row in self.data["table"]]

    def __str__(self) -> str:
        return str(self.path)


def read_results(path: str | Path) -> RecommendResult:
    """Read results.json, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a results file of this version.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of format {FORMAT}")
    return RecommendResult(path, data)


class RunStore:
    """Finished runs below one folder, each with a fingerprint of everything that its outcome depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def path(self, method: str, recommender: str, seed: int) -> Path:
        words = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word) for word in (method, recommender))
        digest = hashlib.sha256(f"{method}\n{recommender}".encode()).hexdigest()[:6]
        return self.folder / f"{words}_{digest}_seed{seed}.json"

    def load(self, method: str, recommender: str, seed: int, fingerprint: str) -> dict[str, Any] | None:
        """The run, or None if it was not finished or was made from other data or settings."""
        path = self.path(method, recommender, seed)
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s is not readable JSON; the run is made again", path)
            return None
        if run.get("fingerprint") != fingerprint:
            logger.info("%s was made from other data or settings; the run is made again", path)
            return None
        return run

    def save(self, run: Mapping[str, Any]) -> None:
        write_json_atomic(self.path(run["method"], run["recommender"], run["seed"]), run)


def fingerprint_of(parts: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """A digest of settings and arrays."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(str((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
