"""The cached contrastive step under pytest-benchmark: `python -m pytest bench/test_bench_cached.py`.

The short table of `cached_bench`, each step timed in a process of its own; for the tables of docs/cmsa.md:
`sda-fast bench --what cached`.
"""

from __future__ import annotations

import pytest
import torch

from cached_bench import CASES, in_a_process

BATCHES, CHUNKS = CASES["cpu", True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: sda-fast bench --what cached")
@pytest.mark.parametrize(("items", "chunk"), [(B, chunk) for B in BATCHES for chunk in CHUNKS if chunk < B])
def test_step(benchmark, items: int, chunk: int) -> None:
    found = benchmark.pedantic(in_a_process, (items, chunk, 0.1), rounds=1)
    assert "reason" not in found, "a wrong answer has no speed"
    benchmark.extra_info.update(found)
