"""Which GPU kernels a step spends its time in, and how much of it is the adapters'."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sda_fast.ops import moda_torch

DECODING, ADAPTER, OTHER = "decoding of 4-bit weights", "adapter", "other"
# Parts of kernel names; the first group that has one of a name's is its group.
GROUPS = {
    DECODING: ("dequant", "decode_kernel"),
    ADAPTER: ("project_kernel", "expand_add_kernel", "dy_kernel", "dx_kernel", "gate_kernel"),
    "loss": ("statistics_kernel", "target_sums_kernel", "gradients_kernel"),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk", "updated_product"),
    "optimiser": ("multi_tensor", "foreach"),
    "copies": ("memcpy", "memset"),
}
# Everything that an adapted layer launches runs inside operations whose names begin so.
ADAPTED_LAYER = "sda_fast::moda_group"
MOST_NAMED = 12
Record = dict[str, Any]


def kernel_times(step: Callable[[], object], device: torch.device) -> Record:
    """Run a step under the profiler.

    Returns:
        milliseconds of all kernels, by_group and the longest, with their counts; or reason where none were seen.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    def annotated(*arguments: Any) -> torch.Tensor:
        with record_function(DECODING):
            return decode(*arguments)

    decode = moda_torch.decode
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with mock.patch.object(moda_torch, "decode", annotated), profile(activities=activities) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return summary(events)


def summary(events: Sequence[Record]) -> Record:
    """The kernels of a trace in Chrome's format."""
    decoding, adapted = (set(launched_inside(events, name)) for name in (DECODING, ADAPTED_LAYER))
    of_name: defaultdict[str, float] = defaultdict(float)
    of_group: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    spans = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, milliseconds = event["name"], event["dur"] / 1e3
        group = group_of(name)
        if group == OTHER:
            launch = event.get("args", {}).get("correlation")
            group = DECODING if launch in decoding else ADAPTER if launch in adapted else OTHER
        of_name[name] += milliseconds
        of_group[group] += milliseconds
        counts[name] += 1
        spans.append((event["ts"], event["ts"] + event["dur"]))
    if not spans:
        return {"reason": "the profiler saw no kernels"}
    total = sum(of_name.values())
    longest = sorted(of_name, key=lambda name: -of_name[name])[:MOST_NAMED]
    return {
        "milliseconds": round(total, 3),
        "from_first_to_last": round((max(end for _, end in spans) - min(start for start, _ in spans)) / 1e3, 3),
        "count": len(spans),
        "adapter_share": round(of_group[ADAPTER] / total, 4),
        "by_group": {name: round(value, 3) for name, value in sorted(of_group.items(), key=lambda pair: -pair[1])},
        "longest": [
            {
                "name": name,
                "group": group_of(name),
                "milliseconds": round(of_name[name], 3),
                "count": counts[name],
            }
            for name in longest
        ],
    }


def group_of(name: str) -> str:
    lowered = name.lower()
    return next((group for group, words in GROUPS.items() if any(word in lowered for word in words)), OTHER)


def launched_inside(events: Sequence[Record], operation: str) -> Iterator[int]:
    """Correlation numbers of the launches within operations or annotations whose name begins so."""
    spans: defaultdict[Any, list[tuple[float, float]]] = defaultdict(list)
    begun = (e for e in events if e.get("cat") in ("cpu_op", "user_annotation") and e["name"].startswith(operation))
    for event in sorted(begun, key=lambda event: (event["ts"], -event["dur"])):
        own = spans[event["tid"]]
        # What lies within another of them adds nothing.
        if not own or event["ts"] >= own[-1][1]:
            own.append((event["ts"], event["ts"] + event["dur"]))
    for event in events:
        if event.get("cat") not in ("cuda_runtime", "cuda_driver") or event["tid"] not in spans:
            continue
        own = spans[event["tid"]]
        place = bisect_right(own, (event["ts"], float("inf"))) - 1
        if place >= 0 and event["ts"] <= own[place][1]:
            yield event.get("args", {}).get("correlation")
