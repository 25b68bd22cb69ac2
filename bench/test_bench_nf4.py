"""Products from 4-bit weights under pytest-benchmark, over the cases of `nf4_products`.

    python -m pytest bench/test_bench_nf4.py -k "k, v and M=16" --benchmark-sort=mean

`sda-fast bench --what nf4` measures the same with the contestants taking turns, which a busy machine disturbs less, and
writes the results file. On a CPU times are processor time on one thread. A contestant is timed only once its result has
passed its check. SDA_FAST_BENCH=full takes the whole table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from contest import Contestant, judge
from nf4_products import CPU_OPERATIONS, DTYPE, LAYERS, Layer, frozen_entries, moda_entries, product_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = product_cases(DEVICE, quick=os.environ.get("SDA_FAST_BENCH") != "full")
METHODS = (
    *("16-bit library product", "bitsandbytes", "bitsandbytes decode + library product", "torchao NF4"),
    *("MoDA, chosen here", "MoDA, fold", "MoDA, unfold", "MoDA, small product", "MoDA, bitsandbytes"),
    *("MoDA, fold by the library", "MoDA, small product by the library"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, M={case[1]}")
def entries(request: pytest.FixtureRequest) -> dict[str, Contestant | str]:
    name, rows = request.param
    N, K = LAYERS[name]
    if DEVICE.type == "cpu" and 2 * rows * N * K > CPU_OPERATIONS:
        pytest.skip("too many operations for a CPU")
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    layer = Layer(name, N, K, DEVICE)
    return {**frozen_entries(layer, x), **moda_entries(layer, x)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(
    timer=time.process_time if DEVICE.type == "cpu" else time.perf_counter, min_rounds=5, max_time=1.0, warmup=True,
    warmup_iterations=1,
)  # fmt: skip
def test_product(benchmark, entries: dict[str, Contestant | str], method: str) -> None:
    entry = entries.get(method, "not possible for this case")
    if isinstance(entry, str):
        pytest.skip(entry)
    fault, error = judge(entry, DEVICE, 60.0)
    assert not fault, "a wrong answer has no speed"

    def finished_step() -> None:
        entry.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["error"] = error
    benchmark(finished_step)
