"""The table of cases: layers of Qwen2.5-VL-7B for a GPU and for a patient CPU, small ones for any."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baselines.moda_layers import Settings

LAYERS = {
    "q": (3584, 3584),
    "up": (3584, 18944),
    "down": (18944, 3584),
    "k": (3584, 512),
    "medium": (1024, 1024),
    "small": (512, 512),
}
ROWS = (1, 16, 64, 512, 2048, 8192, 32768)
DROPOUTS = (0.0, 0.1)


@dataclass(frozen=True)
class Case:
    """One layer of `LAYERS` and M rows; everything else is in `settings`."""

    layer: str
    rows: int
    settings: Settings

    def __str__(self) -> str:
        s = self.settings
        return (
            f"{self.layer} {s.in_features}->{s.out_features}, M={self.rows}, E={s.num_experts}, r={s.r}, "
            f"dropout {s.dropout:g}, {'NF4' if s.base == 'nf4' else str(s.dtype).removeprefix('torch.')}"
        )


def case(layer: str, rows: int, dropout: float = 0.0, *, experts: int = 8, r: int = 8, base: str = "float") -> Case:
    return Case(layer, rows, Settings(*LAYERS[layer], r=r, num_experts=experts, dropout=dropout, base=base))


def experts_and_ranks(layer: str, rows: int) -> list[Case]:
    """E and r one at a time around the published 8 and 8, then the largest of both."""
    pairs = ((1, 8), (4, 8), (8, 16), (8, 64), (1, 64))
    return [case(layer, rows, 0.1, experts=experts, r=r) for experts, r in pairs]


CPU_QUICK = [
    *(case("q", 1024, dropout) for dropout in DROPOUTS),
    *(case("k", 1024, dropout) for dropout in DROPOUTS),
    *(case("medium", 8192, dropout) for dropout in DROPOUTS),
    *(case("small", 2048, dropout) for dropout in DROPOUTS),
    case("small", 1, 0.0),
    case("small", 256, 0.1),
    case("small", 256, 0.1, base="nf4"),
]
CPU_FULL = [
    *CPU_QUICK,
    *experts_and_ranks("small", 256),
    *(case("q", rows, dropout) for rows in (1, 64, 4096) for dropout in DROPOUTS),
    *(case(layer, 256, dropout) for layer in ("up", "down") for dropout in DROPOUTS),
    *experts_and_ranks("q", 1024),
    case("q", 1024, 0.1, base="nf4"),
    *(case("small", rows, 0.1) for rows in (8192, 32768)),
]
GPU_QUICK = [
    case("q", 8192, 0.1),
    case("q", 8192, 0.0),
    case("up", 8192, 0.1),
    case("down", 8192, 0.1),
    case("k", 8192, 0.1),
    case("q", 512, 0.1),
    case("q", 1, 0.0),
    case("q", 16, 0.0),
    case("q", 32768, 0.1),
    case("q", 8192, 0.1, r=64),
    case("q", 8192, 0.1, experts=1),
]
GPU_FULL = [
    *GPU_QUICK,
    *(case(layer, rows, dropout) for layer in LAYERS for rows in ROWS for dropout in DROPOUTS),
    *experts_and_ranks("q", 8192),
    *experts_and_ranks("up", 2048),
]


def cases(device: str, *, quick: bool, layers: tuple[str, ...] = (), four_bit: bool = True) -> list[Case]:
    """The cases of a device, each once; on a GPU the frozen weight is NF4 where bitsandbytes is installed.

    Args:
        device: "cpu" or "cuda".
        quick: the short table.
        layers: only these layers, all if empty.
        four_bit: whether bitsandbytes is there.
    Raises:
        ValueError: a layer is not in `LAYERS`, or nothing is left.
    """
    unknown = [layer for layer in layers if layer not in LAYERS]
    if unknown:
        raise ValueError(f"layers must be among {', '.join(LAYERS)}, got {', '.join(unknown)}")
    if device == "cpu":
        table = CPU_QUICK if quick else CPU_FULL
    else:
        table = [on_gpu(entry, four_bit) for entry in (GPU_QUICK if quick else GPU_FULL)]
    chosen = [
        entry
        for entry in dict.fromkeys(table)
        if (not layers or entry.layer in layers) and (four_bit or entry.settings.base == "float")
    ]
    if not chosen:
        raise ValueError(
            f"no case on {device} for the layers {', '.join(layers)} in the {'quick' if quick else 'full'} table"
        )
    return chosen


def on_gpu(entry: Case, four_bit: bool) -> Case:
    return replace(entry, settings=replace(entry.settings, device="cuda", base="nf4" if four_bit else "float"))
