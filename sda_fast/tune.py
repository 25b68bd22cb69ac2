"""Measure every way of computing an adapted layer on the device at hand, and write the table that `measured` reads.

`sda-fast bench --tune` calls `run`. Ways of one shape take turns; one whose result is off by more than rounding has no
time, and a shape that the time ran out for is named. The file is written at the end, whole or not at all; what an
earlier run measured and this one did not stays in it.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sda_fast import MoDALinear
from sda_fast.atomic import write_json_atomic
from sda_fast.jobs.fingerprint import versions
from sda_fast.ops import cuda_library, fold_regimes, measured, regimes, splits
from sda_fast.ops.fold_regimes import LARGEST_SMALL_M, Way, forced_evaluation, possible_ways
from sda_fast.ops.quantized import decode_absmax, decode_in_pytorch, describe_weight
from sda_fast.timing import one_thread_on_a_cpu, percentile, time_in_turns

logger = logging.getLogger(__name__)

EXPERTS, RANK = 8, 8
SPLIT_DECISIONS = (splits.DECISION_IN_TRITON, splits.DECISION_BY_LIBRARY)
TIMERS = {"cpu": "processor time, 1 thread", "cuda": "device time between events, cache cleared before"}
# N x K: layers of Qwen2.5-VL-7B, then of Llama-3.2-11B-Vision.
GPU_QUICK = ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944))
GPU_FULL = (*GPU_QUICK, (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
GPU_ROWS = ((1, 16, 64, 256, 1024, 8192), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192))
CPU_QUICK = ((512, 512), (1024, 1024), (256, 1536))
CPU_FULL = (*CPU_QUICK, (1536, 256), (2048, 2048), (512, 3584), (3584, 3584))
# Rows on a CPU that bitsandbytes' own 4-bit product, which takes bfloat16, may be the fastest for.
CPU_FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
# Beyond this many operations one product takes a CPU's thread too long.
CPU_OPERATIONS = 3e10
# Rows on a CPU, in units of N K / (N + K), where folding and not folding cost about the same.
CPU_RATIOS = ((0.25, 1, 4), (0.25, 0.5, 1, 2, 4, 8))
Record = dict[str, Any]
Ways = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """One decision on one shape; `weight` is "float", "nf4" or, where it does not matter, "any"."""

    decision: str
    dtype: torch.dtype
    weight: str
    rows: int
    out_features: int
    in_features: int
    r: int = RANK

    def described(self) -> Record:
        return {
            "decision": self.decision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight": self.weight,
            **{"M": self.rows, "N": self.out_features, "K": self.in_features, "r": self.r},
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"M={self.rows} N={self.out_features} K={self.in_features} r={self.r}"
        return f"{self.decision}: {sizes} {dtype} {self.weight}"


def shapes_from(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """N and K of words like 3584x18944.

    Raises:
        ValueError: a word is no such pair.
    """
    pairs = []
    for word in words:
        parts = word.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"a shape is outputs x inputs, such as 3584x18944, got {word!r}")
        pairs.append((int(parts[0]), int(parts[1])))
    return tuple(pairs)


def cases(device: str, *, quick: bool, shapes: Sequence[tuple[int, int]] = (), four_bit: bool = True) -> list[Case]:
    """What is measured on "cpu" or "cuda", the short table or the long one, for the usual layers or those given.

    Few rows of all layers come before more rows of any: where the time runs out, it does so for all layers alike.
    """
    table: list[Case] = []
    weights = ("float", "nf4") if four_bit else ("float",)
    if device == "cpu":
        for N, K in shapes or (CPU_QUICK if quick else CPU_FULL):
            for dtype, weight in product((torch.float32, torch.bfloat16), weights):
                few = CPU_FEW_ROWS if (dtype, weight) == (torch.bfloat16, "nf4") else (1,)
                many = (max(1, round(a * N * K / (N + K))) for a in CPU_RATIOS[not quick])
                rows = [M for M in dict.fromkeys((*few, *many)) if M in few or 2 * M * N * K <= CPU_OPERATIONS]
                table += [Case(fold_regimes.DECISION, dtype, weight, M, N, K) for M in rows]
        return sorted(table, key=lambda case: case.rows)
    for N, K in shapes or (GPU_QUICK if quick else GPU_FULL):
        for M in GPU_ROWS[not quick]:
            if four_bit and M <= LARGEST_SMALL_M:
                # Before the ways of evaluation, which take the number of parts that turns out best.
                table += [Case(decision, torch.bfloat16, "nf4", M, N, K) for decision in SPLIT_DECISIONS]
            table += [Case(fold_regimes.DECISION, torch.bfloat16, weight, M, N, K) for weight in weights]
            if M >= 64:
                ranks = (RANK,) if quick else (RANK, 64)
                decisions = (regimes.DECISION, regimes.DECISION_ON_DX)
                table += [Case(decision, torch.bfloat16, "any", M, N, K, r) for decision in decisions for r in ranks]
    return sorted(table, key=lambda case: case.rows)


def run(config: Any, device: torch.device) -> str:
    """Measure the cases, write them into the table, and return what was chosen; see `BenchConfig`.

    Raises:
        ValueError: there is nowhere to write, or a shape is not one.
    """
    folder = config.output or measured.user_folder()
    if folder is None:
        raise ValueError("SDA_FAST_TUNED is empty, which means no table: unset it or give --output")
    chip = measured.chip_name(device)
    table = cases(
        device.type,
        quick=config.quick,
        shapes=shapes_from(config.shapes),
        four_bit=importlib.util.find_spec("bitsandbytes") is not None,
    )
    records: list[Record] = []
    started = time.perf_counter()
    torch.manual_seed(0)
    with one_thread_on_a_cpu(device), tqdm(table, unit="shape", desc=f"tuning for {chip}", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(str(case), refresh=False)
            late = time.perf_counter() - started > config.limit
            records.append(
                not_measured(case, "out of time") if late else measure_case(case, device, config.seconds, records)
            )
    path = measured.table_path(folder, chip)
    shown = [*map(line_of, records), ""]
    if not any(record["microseconds"] for record in records):
        logger.warning("nothing was measured; the table %s is as it was", path)
        return "\n".join([*shown, f"nothing was measured; the table {path} is as it was"])
    described = {
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": config.invocation,
        "timer": TIMERS[device.type],
    }
    write_json_atomic(path, measured.document_of(chip, merged(earlier_records(path, chip), records), **described))
    measured.forget()
    return "\n".join([*shown, where_it_counts(path, config.output)])


def earlier_records(path: Path, chip: str) -> list[Record]:
    """What the table in a file has measured, every line with its date; nothing where that is not a table of `chip`."""
    table = measured.read_table_of(chip, path)
    if table is None:
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    dated = [{"date": document.get("date", "unknown"), **record} for record in document["records"]]
    return [record for record in dated if record["microseconds"]]


def merged(earlier: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """The records, and those of earlier ones that were not measured again."""
    measured_again = {question_of(record) for record in records if not was_left_out(record)}
    kept = [record for record in earlier if question_of(record) not in measured_again]
    answered = {question_of(record) for record in kept}
    return kept + [record for record in records if question_of(record) not in answered]


def question_of(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("decision", "dtype", "weight", "M", "N", "K", "r"))


def not_measured(case: Case, reason: str) -> Record:
    return {**case.described(), "microseconds": {}, "refused": {"all": f"not measured, {reason}"}}


def was_left_out(record: Record) -> bool:
    """Whether none of its ways was tried."""
    return "all" in record.get("refused", {})


def measure_case(case: Case, device: torch.device, seconds: float, before: Sequence[Record] = ()) -> Record:
    """Medians of every way that computes the case rightly, in microseconds, and why others have none.

    Args:
        before: records that were measured already; the small product takes the number of parts that was best in them.
    """
    try:
        ways, truth = WAYS_OF[case.decision](case, device, before)
    except Unavailable as problem:
        return {**case.described(), "microseconds": {}, "refused": {"all": str(problem)}}
    except torch.OutOfMemoryError:
        return not_measured(case, "out of memory")
    # One rounding to the dtype of x, or a product in float32.
    allowed, refused = max(torch.finfo(case.dtype).eps, 2**-18), {}
    for name, step in list(ways.items()):
        try:
            error = float((step().to(truth.dtype) - truth).norm() / truth.norm())
        except Exception as problem:
            # A way that this machine cannot go must not end the others' measurement.
            fault = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
        else:
            fault = "" if error <= allowed else f"its error is {error:.1e}, allowed are {allowed:.1e}"
        if fault:
            refused[name] = fault
            del ways[name]
            logger.warning("%s: %s is not timed, %s", case, name, fault)
    times = time_in_turns(ways, device, rounds=30, seconds=seconds, warm_ups=2) if ways else {}
    medians = {name: round(1e6 * percentile(values, 50), 2) for name, values in times.items()}
    return {**case.described(), "microseconds": medians, **({"refused": refused} if refused else {})}


class Unavailable(Exception):
    """Nothing of a case can be measured here; the message says why."""


def evaluation_ways(case: Case, device: torch.device, before: Sequence[Record]) -> tuple[Ways, Tensor]:
    """The ways of one layer in evaluation with one modality, and its result in wide sums."""
    layer, x, truth = evaluated_layer(case, device)
    layout = describe_weight(layer.weight)[0]
    use_library = cuda_library.is_available(device)
    backend = "triton" if device.type == "cuda" else "torch"

    def step(way: Way, parts: int) -> Tensor:
        with torch.no_grad(), forced_evaluation(way.what, by_library=way.by_library), splits.forced_splits(parts):
            return layer(x, 1)

    ways: Ways = {}
    for way in possible_ways(x, layout, backend, use_library, may_repack=True):
        ways[way.name] = partial(step, way, best_splits(case, way.by_library, before))
    return ways, truth


def best_splits(case: Case, by_library: bool, before: Sequence[Record]) -> int:
    """The fastest number of parts of K among the records measured before for this layer and rows."""
    decision = splits.DECISION_BY_LIBRARY if by_library else splits.DECISION_IN_TRITON
    wanted = {**case.described(), "decision": decision}
    for record in before:
        times = record["microseconds"]
        if times and all(record[name] == value for name, value in wanted.items()):
            return splits.count_of(min(times, key=times.__getitem__))
    return splits.BY_RULE


def split_ways(case: Case, device: torch.device, before: Sequence[Record]) -> tuple[Ways, Tensor]:
    """The small product of one layer with K cut into one number of parts or another."""
    from sda_fast.kernels.nf4_linear import small_product_blocks

    by_library = case.decision == splits.DECISION_BY_LIBRARY
    lacking = cuda_library.reason_unavailable(device)
    if by_library and lacking:
        raise Unavailable(f"not measured, no CUDA library: {lacking}")
    layer, x, truth = evaluated_layer(case, device)
    if not by_library:
        layer.backend = "triton"

    def step(parts: int) -> Tensor:
        forced = forced_evaluation("small product", by_library=by_library)
        with torch.no_grad(), forced, splits.forced_splits(parts):
            return layer(x, 1)

    columns = small_product_blocks(case.rows, case.dtype.itemsize)[2]
    counts = splits.candidates(case.in_features, columns)
    return {splits.name_of(count): partial(step, count) for count in counts}, truth


def evaluated_layer(case: Case, device: torch.device) -> tuple[MoDALinear, Tensor, Tensor]:
    """An adapted layer in evaluation, an input, and what comes out of it for modality 1 in wide sums."""
    base = frozen_layer(case, device)
    layer = MoDALinear(base, r=case.r, num_experts=EXPERTS).eval()
    nn.init.normal_(layer.lora_B, std=0.2)  # so that a wrong update fails the check
    x = torch.randn(case.rows, case.in_features).to(device, case.dtype)
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    with torch.no_grad():
        gate = layer.scaling * layer.gates()[1].repeat_interleave(case.r // EXPERTS).to(wide)
        truth = x.to(wide) @ plain_weight(base).to(wide).t()
        truth += (x.to(wide) @ layer.lora_A.to(wide).t() * gate) @ layer.lora_B.to(wide).t()
    return layer, x, truth


def frozen_layer(case: Case, device: torch.device) -> nn.Module:
    if case.weight == "float":
        return nn.Linear(case.in_features, case.out_features, bias=False, device=device, dtype=case.dtype)
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(
        case.in_features, case.out_features, bias=False, compute_dtype=case.dtype, quant_type=case.weight
    ).to(device)


def plain_weight(base: nn.Module) -> Tensor:
    """The frozen weight, decoded by the plainest path there is."""
    layout, data, statistics = describe_weight(base.weight)  # type: ignore[arg-type]
    if layout.quant_type == 0:
        return data
    out = torch.empty(layout.out_features, layout.in_features, device=data.device)
    codes, absmax = data.reshape(-1).view(torch.uint8), decode_absmax(layout, statistics)
    return decode_in_pytorch(layout, codes, absmax, statistics[1], out.view(-1)).view(out.shape)


def update_ways(case: Case, device: torch.device, before: Sequence[Record]) -> tuple[Ways, Tensor]:
    """The ways of updating y in training; the weight is dense, as all find it after decoding."""
    from sda_fast.kernels.moda_forward import expand, expand_add
    from sda_fast.kernels.moda_gemm import gated_linear
    from sda_fast.kernels.moda_naive import naive_gate, naive_gated_linear

    M, N, K, r = case.rows, case.out_features, case.in_features, case.r
    x = torch.randn(M, K, device=device, dtype=case.dtype)
    weight = torch.randn(N, K, device=device, dtype=case.dtype) * K**-0.5
    h, lora_B = torch.randn(M, r, device=device), torch.randn(N, r, device=device) * 0.01
    gates, ids = torch.rand(2, EXPERTS, device=device), torch.randint(0, 2, (M,), device=device)
    update = (h, lora_B, gates, ids, 4.0)
    ways = {
        "before": lambda: expand(*update, out=x.new_empty(M, N)).addmm_(x, weight.t()),
        "in place": lambda: expand_add(nn.functional.linear(x, weight), *update),
        "accumulator": lambda: gated_linear(x, weight, None, *update),
    }
    gate = naive_gate(gates, ids, 4.0, M, r)
    return ways, naive_gated_linear(x.float(), weight.float(), None, h, lora_B, gate)


def update_ways_of_dx(case: Case, device: torch.device, before: Sequence[Record]) -> tuple[Ways, Tensor]:
    """The ways of updating dx [M, N] from dy [M, K], with dropout, dA included."""
    from sda_fast.kernels.moda_backward import dx_pass
    from sda_fast.kernels.moda_gemm import input_gradient
    from sda_fast.kernels.moda_naive import naive_input_gradient
    from sda_fast.ops.dropout import dropout_scale, keep_mask

    M, width, inner, r = case.rows, case.out_features, case.in_features, case.r
    x, dy = (torch.randn(M, size, device=device, dtype=case.dtype) for size in (width, inner))
    weight = torch.randn(inner, width, device=device, dtype=case.dtype) * inner**-0.5
    dh, lora_A = torch.randn(M, r, device=device), torch.randn(r, width, device=device) * 0.01
    dropping: dict[str, Any] = {"dropout_p": 0.1, "seed": torch.tensor([1], device=device)}

    def written_first() -> Tensor:
        dx = x.new_empty(M, width)
        dx_pass(x, dh, lora_A, dx, adds=False, **dropping)
        return dx.addmm_(dy, weight)

    def in_place() -> Tensor:
        dx = dy @ weight
        dx_pass(x, dh, lora_A, dx, **dropping)
        return dx

    def in_accumulator() -> Tensor:
        dx_pass(x, dh, lora_A, None, **dropping)
        return input_gradient(dy, weight, dh, lora_A, **dropping)

    keep = keep_mask(M, width, 0.1, 1, device)
    truth = naive_input_gradient(dy.float(), weight.float(), dh, lora_A, keep, dropout_scale(0.1))
    return {"before": written_first, "in place": in_place, "accumulator": in_accumulator}, truth


WAYS_OF = {
    fold_regimes.DECISION: evaluation_ways,
    **dict.fromkeys(SPLIT_DECISIONS, split_ways),
    regimes.DECISION: update_ways,
    regimes.DECISION_ON_DX: update_ways_of_dx,
}


def line_of(record: Record) -> str:
    """A shape, its times, and the fastest way."""
    shape = "  ".join(f"{name}={record[name]}" for name in ("M", "N", "K", "r"))
    times = record["microseconds"]
    if not times:
        return f"{record['decision']:<19} {shape}: {'; '.join(record['refused'].values())}"
    best = min(times, key=times.__getitem__)
    shown = ", ".join(f"{name} {time:.4g}" for name, time in sorted(times.items(), key=lambda pair: pair[1]))
    return f"{record['decision']:<19} {record['dtype']} {record['weight']}  {shape}: {best} ({shown} us)"


def where_it_counts(path: Path, output: Path | None) -> str:
    user = measured.user_folder()
    if user is not None and path.parent.resolve() == user.resolve():
        return f"table: {path}, used from now on"
    return f"table: {path}, used where SDA_FAST_TUNED={output}"
