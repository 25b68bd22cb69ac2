"""Time both ways of updating y on the GPU at hand, and print lines for the table in sda_fast/ops/regimes.py.

    python bench/regime_speed.py [--quick]

The weight is dense, as both ways find it after decoding. A shape whose two results differ by more than rounding has no
line.
"""

from __future__ import annotations

import argparse
import sys

import torch

from cases import LAYERS
from measure import percentile, time_in_turns
from sda_fast.kernels.moda_forward import expand_add
from sda_fast.kernels.moda_gemm import gated_linear

ROWS, RANKS = (64, 512, 2048, 8192, 32768), (8, 64)
SCALING, EXPERTS, DTYPE = 4.0, 8, torch.bfloat16


def line_for(K: int, N: int, M: int, r: int, device: torch.device) -> str:
    """A `Measurement` as Python source, or a comment that says why there is none."""
    x = torch.randn(M, K, device=device, dtype=DTYPE)
    weight = torch.randn(N, K, device=device, dtype=DTYPE) * K**-0.5
    h, lora_B = torch.randn(M, r, device=device), torch.randn(N, r, device=device) * 0.01
    gates, ids = torch.rand(2, EXPERTS, device=device), torch.randint(0, 2, (M,), device=device)
    update = (h, lora_B, gates, ids, SCALING)

    def in_place() -> torch.Tensor:
        return expand_add(torch.nn.functional.linear(x, weight), *update)

    def accumulator() -> torch.Tensor:
        return gated_linear(x, weight, None, *update)

    one, other = in_place().float(), accumulator().float()
    difference = float((one - other).norm() / other.norm())
    shape = f"rows={M}, in_features={K}, out_features={N}, r={r}"
    if not difference <= torch.finfo(DTYPE).eps:
        return f"    # {shape}: the two ways differ by {difference:.1e}"
    times = time_in_turns({"in_place": in_place, "accumulator": accumulator}, device, rounds=20, seconds=2, warm_ups=2)
    microseconds = ", ".join(f"{name}={1e6 * percentile(values, 50):.1f}" for name, values in times.items())
    return f'    Measurement(device="{torch.cuda.get_device_name(device)}", dtype={DTYPE}, {shape}, {microseconds}),'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rank, fewer rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 0
    device = torch.device("cuda")
    torch.manual_seed(0)
    for name in ("q", "up", "down", "k"):
        for rows in (512, 8192) if arguments.quick else ROWS:
            for r in RANKS[:1] if arguments.quick else RANKS:
                print(line_for(*LAYERS[name], rows, r, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
