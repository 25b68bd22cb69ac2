"""The contrastive losses under pytest-benchmark: `python -m pytest bench/test_bench_cmsa.py`.

The short table of `cmsa_cases`; memory, bigger batches and the tables of docs/cmsa.md: `sda-fast bench --what cmsa`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from cmsa_cases import METHODS, Case, cases
from cmsa_run import ALLOWED_ERROR, error_on_a_small_batch, step, vectors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRIES = [(case, method) for case in cases(DEVICE, quick=True) for method in METHODS[case.loss]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "method"), ENTRIES, ids=str)
@pytest.mark.benchmark(
    timer=time.process_time if DEVICE == "cpu" else time.perf_counter, min_rounds=5, max_time=1.0, warmup=True,
    warmup_iterations=1,
)  # fmt: skip
def test_loss(benchmark, case: Case, method: str) -> None:
    loss = METHODS[case.loss][method].make()
    error = error_on_a_small_batch(case.loss, loss, case.B, case.D, case.dtype, DEVICE)
    assert error <= ALLOWED_ERROR[case.dtype], "a wrong answer has no speed"
    given = vectors(case.B, case.D, case.dtype, DEVICE)

    def finished_step() -> None:
        step(loss, given)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["error"] = error
    benchmark(finished_step)
