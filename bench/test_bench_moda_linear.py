"""One adapted layer, ours and every other way, under pytest-benchmark, over the table in `cases`.

    python -m pytest bench/test_bench_moda_linear.py -k "small and NF4" --benchmark-sort=mean

`sda-fast bench` measures the same cases with the contestants taking turns, which a busy machine disturbs less, and
writes the results file; here they run one after the other. On a CPU times are processor time on one thread. A
contestant is timed only once its outputs and gradients have passed their check. SDA_FAST_BENCH=full takes the whole
table. Extra columns of the JSON: `error`, `peak_bytes` and `bytes_kept_per_x`.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator

import pytest
import torch

from baselines.moda_layers import METHODS
from cases import Case, cases
from check_layers import Checker, build
from layers import MODES, inputs_of, step_of
from measure import bytes_kept, peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(
    DEVICE.type,
    quick=os.environ.get("SDA_FAST_BENCH") != "full",
    four_bit=importlib.util.find_spec("bitsandbytes") is not None,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=str)
def checker(request: pytest.FixtureRequest) -> Checker:
    torch.compiler.reset()
    case: Case = request.param
    x, dy = inputs_of(case)
    return Checker(case, case.settings.base_layer(), x, dy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.benchmark(
    timer=time.process_time if DEVICE.type == "cpu" else time.perf_counter, min_rounds=5, max_time=2.0, warmup=True,
    warmup_iterations=1,
)  # fmt: skip
def test_layer(benchmark, checker: Checker, name: str, mode: str) -> None:
    settings = checker.case.settings
    reason = METHODS[name].reason_not_to(settings)
    if reason is not None:
        pytest.skip(reason)
    verdict = checker.judge(name)
    assert not verdict.fault, "a wrong answer has no speed"
    layer = build(METHODS[name], settings, checker.base_layer).layer
    step = step_of(layer, checker.x, checker.dy, mode)

    def finished_step() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{checker.case}, {mode}"
    benchmark.extra_info["error"] = verdict.error
    benchmark(finished_step)
    benchmark.extra_info["peak_bytes"] = peak_bytes(step, DEVICE)
    benchmark.extra_info["bytes_kept_per_x"] = round(bytes_kept(layer, checker.x) / checker.x.nbytes, 3)
