"""Time a folded and an unfolded evaluation of an adapted layer on a CPU: CPU_RATIOS in sda_fast/ops/fold_regimes.py.

    OMP_NUM_THREADS=1 python bench/fold_speed.py [bench/results]

With a folder, the results are written there, into the file of this processor. Both ways take turns in one process. For
every layer, dtype and weight it prints the time of folding over that of not folding by rows, and the ratio
rows * (N + K) / (N * K) from which folding was faster; results that differ by more than rounding are an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from layers import device_name, results_file, versions
from sda_fast import MoDALinear
from sda_fast.atomic import write_json_atomic
from sda_fast.ops.fold_regimes import forced_evaluation
from sda_fast.timing import percentile, ratio, time_in_turns

SHAPES = ((512, 512), (1024, 1024), (256, 1536))
ROWS_BY_RATIO = (0.25, 0.5, 1, 2, 4, 8)
CPU = torch.device("cpu")


def record(N: int, K: int, rows: int, dtype: torch.dtype, four_bit: bool) -> dict[str, object]:
    """Both times, in milliseconds, of one layer and number of rows."""
    base = Linear4bit(K, N, bias=False, quant_type="nf4").to("cpu") if four_bit else nn.Linear(K, N).to(dtype)
    layer = MoDALinear(base, num_experts=8).eval()
    nn.init.normal_(layer.lora_B, std=0.02)
    x = torch.randn(rows, K).to(dtype)

    def step(way: str) -> torch.Tensor:
        with torch.no_grad(), forced_evaluation(way):
            return layer(x, 1)

    one, other = step("fold").float(), step("unfold").float()
    if not (one - other).norm() <= K**0.5 * torch.finfo(dtype).eps * other.norm():
        raise SystemExit(f"folded and unfolded differ for N={N}, K={K}, rows={rows}, {dtype}")
    ways = {way: lambda way=way: step(way) for way in ("fold", "unfold")}
    times = time_in_turns(ways, CPU, rounds=20, seconds=0.5)
    return {
        "N": N, "K": K, "r": 8, "dtype": str(dtype).removeprefix("torch."), "weight": "nf4" if four_bit else "float",
        "rows": rows, "fold_ms": 1e3 * percentile(times["fold"], 50),
        "unfold_ms": 1e3 * percentile(times["unfold"], 50), "fold_over_unfold": ratio(times["fold"], times["unfold"]),
    }  # fmt: skip


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for four_bit in (False, True):
            for N, K in SHAPES:
                lines = [record(N, K, round(a * N * K / (N + K)), dtype, four_bit) for a in ROWS_BY_RATIO]
                shown = "  ".join(
                    f"{a}: {line['fold_over_unfold']:.2f}" for a, line in zip(ROWS_BY_RATIO, lines, strict=True)
                )
                print(f"{N}x{K} {dtype} {'nf4' if four_bit else 'float'}  {shown}", flush=True)
                records += lines
    if len(sys.argv) > 1:
        document = {"device": device_name(CPU), "versions": versions(), "command": "OMP_NUM_THREADS=1 python "
                    "bench/fold_speed.py", "timer": "processor time, 1 thread", "records": records}  # fmt: skip
        write_json_atomic(results_file(Path(sys.argv[1]), "fold", CPU), document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
