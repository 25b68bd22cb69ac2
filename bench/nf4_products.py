"""One layer's product from 4-bit weights, and decoding alone: ours beside bitsandbytes, torchao and 16 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from check_layers import dense_weight, unit_in_the_last_place
from contest import Contestant, Record, contest
from sda_fast import MoDALinear
from sda_fast.ops import cuda_library
from sda_fast.ops.fold_regimes import Way, forced_evaluation, possible_ways
from sda_fast.ops.folding import folded_weight
from sda_fast.ops.moda_torch import Member
from sda_fast.ops.quantized import decode_absmax, decode_in_pytorch, describe_weight, workspaces
from sda_fast.timing import percentile, time_in_turns

# N and K of the seven linear layers of a Qwen2.5-VL-7B decoder layer; those of one shape are one line.
LAYERS = {"q, o": (3584, 3584), "k, v": (512, 3584), "gate, up": (18944, 3584), "down": (3584, 18944)}
ROWS = (1, 4, 16, 64, 256, 1024, 8192)
DTYPE, RANK, EXPERTS = torch.bfloat16, 8, 8
# Beyond this many operations one product takes a CPU's thread more than about a second.
CPU_OPERATIONS = 4e10
# Making a larger weight takes torchao longer on a CPU than measuring everything else.
TORCHAO_ELEMENTS = 2e7
SIXTEEN, BITSANDBYTES, CHOSEN = "16-bit library product", "bitsandbytes", "MoDA, chosen here"


@dataclass(frozen=True)
class Layer:
    """One frozen 4-bit layer; `copies` gives equal ones, since bitsandbytes repacks its own on a CPU."""

    name: str
    out_features: int
    in_features: int
    device: torch.device

    def copy(self) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.out_features, self.in_features, generator=generator) * self.in_features**-0.5
        layer = Linear4bit(self.in_features, self.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        layer.weight = Params4bit(weight.to(DTYPE), requires_grad=False, quant_type="nf4", compress_statistics=True)
        return layer.to(self.device).eval()


def product_cases(device: torch.device, *, quick: bool) -> list[tuple[str, int]]:
    """Layers and rows; the short table on a CPU leaves out the widest layers and many rows."""
    if device.type == "cpu" and quick:
        return [(name, M) for name in ("q, o", "k, v") for M in ROWS if M <= 256]
    return [(name, M) for name in LAYERS for M in ROWS]


def measure_product(name: str, rows: int, device: torch.device, seconds: float) -> list[Record]:
    """The records of one layer and number of rows."""
    N, K = LAYERS[name]
    case = {"part": "product", "case": f"{name} {K}->{N}, M={rows}", "layer": name, "M": rows, "N": N, "K": K}
    operations = 2 * rows * N * K
    if device.type == "cpu" and operations > CPU_OPERATIONS:
        reason = f"not measured: {operations:.0e} operations, on a CPU at most {CPU_OPERATIONS:.0e} are timed"
        return [{**case, "method": "all", "reason": reason}]
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(device, DTYPE)
    layer = Layer(name, N, K, device)
    entries = {**frozen_entries(layer, x), **moda_entries(layer, x)}
    return contest(case, entries, device, seconds=seconds, against=(BITSANDBYTES, SIXTEEN))


def frozen_entries(layer: Layer, x: Tensor) -> dict[str, Contestant | str]:
    """Products without an adapter."""
    from bitsandbytes.functional import dequantize_4bit

    mine, theirs = layer.copy(), layer.copy()
    weight = dense_weight(mine, torch.float32)
    truth, allowed = x.float() @ weight.t(), unit_in_the_last_place(DTYPE)
    narrow = weight.to(DTYPE)
    packed, state = mine.weight.data, mine.weight.quant_state

    def through_decode() -> Tensor:
        return nn.functional.linear(x, dequantize_4bit(packed, state))

    return {
        SIXTEEN: Contestant(lambda: nn.functional.linear(x, narrow), truth, allowed),
        BITSANDBYTES: Contestant(without_gradient(lambda: theirs(x)), truth, allowed),
        "bitsandbytes decode + library product": Contestant(through_decode, truth, allowed),
        "torchao NF4": torchao_entry(weight.to(DTYPE), x, allowed),
    }


def torchao_entry(weight: Tensor, x: Tensor, allowed: float) -> Contestant | str:
    """torchao rounds a weight to NF4 in its own way, so it is compared with what it decodes itself."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    try:
        from torchao.quantization import to_nf4
    except ImportError as error:
        return f"this torchao has no NF4: {error}"
    if weight.device.type == "cpu" and weight.numel() > TORCHAO_ELEMENTS:
        return f"not measured: on a CPU only weights of up to {TORCHAO_ELEMENTS:.0e} elements are made with torchao"
    packed = to_nf4(weight)
    truth = x.float() @ packed.get_original_weight().float().t()
    return Contestant(without_gradient(lambda: nn.functional.linear(x, packed)), truth, allowed)


def moda_entries(layer: Layer, x: Tensor) -> dict[str, Contestant | str]:
    """Ours, adapted, in evaluation with one modality: what is chosen here, and every way that is possible."""
    adapted = adapted_layer(layer)
    with torch.no_grad():
        truth = x.float() @ (dense_weight(adapted.base_layer, torch.float32) + update_of(adapted)).t()
    described = describe_weight(adapted.weight)[0]
    backend = "triton" if layer.device.type == "cuda" else "torch"
    ways = possible_ways(x, described, backend, cuda_library.is_available(layer.device), may_repack=True)
    allowed = unit_in_the_last_place(DTYPE)
    entries: dict[str, Contestant | str] = {CHOSEN: Contestant(without_gradient(lambda: adapted(x, 0)), truth, allowed)}
    for way in ways:
        entries[f"MoDA, {way.name}"] = Contestant(partial(forced, adapted, x, way), truth, allowed)
    return entries


def adapted_layer(layer: Layer) -> MoDALinear:
    """With an update of about a sixth of the weight: a wrong one fails the check."""
    adapted = MoDALinear(layer.copy(), r=RANK, num_experts=EXPERTS, generator=torch.Generator().manual_seed(2)).eval()
    generator = torch.Generator().manual_seed(3)
    adapted.lora_B.data.copy_(torch.randn(adapted.lora_B.shape, generator=generator) * 0.2)
    return adapted


def update_of(adapted: MoDALinear, modality: int = 0) -> Tensor:
    """scaling * B diag(g) A of one modality, float32."""
    gate = adapted.scaling * adapted.gates()[modality].float().repeat_interleave(adapted.r // adapted.num_experts)
    return (adapted.lora_B.float() * gate) @ adapted.lora_A.float()


def forced(adapted: MoDALinear, x: Tensor, way: Way) -> Tensor:
    with torch.no_grad(), forced_evaluation(way.what, by_library=way.by_library):
        return adapted(x, 0)


def without_gradient(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def stepped() -> Tensor:
        with torch.no_grad():
            return step()

    return stepped


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    source = torch.ones((1 << 28) if device.type == "cuda" else (1 << 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=20, seconds=2, warm_ups=2)
    return 2 * source.nbytes / percentile(times["copy"], 50)


def measure_decode(name: str, device: torch.device, seconds: float, bandwidth: float) -> list[Record]:
    """Decoding one layer's weight to 16 bits, without and with the update, beside the bandwidth of a copy."""
    N, K = LAYERS[name]
    layer = Layer(name, N, K, device)
    adapted = adapted_layer(layer)
    _, data, statistics = describe_weight(adapted.weight)
    moved = data.nbytes + sum(part.nbytes for part in statistics) + 2 * N * K
    case = {"part": "decode", "case": f"{name} {K}->{N}", "layer": name, "N": N, "K": K}
    entries = decode_entries(adapted, device)
    records = contest(case, entries, device, seconds=seconds, against=(BITSANDBYTES,))
    for record in records:
        if "milliseconds" in record:
            rate = (moved + 4 * RANK * (N + K) * record["method"].startswith("fold")) / record["milliseconds"][1] * 1e3
            record |= {"gigabytes_per_second": round(rate / 1e9, 3), "of_copy": round(rate / bandwidth, 4)}
    return records


def decode_entries(adapted: MoDALinear, device: torch.device) -> dict[str, Contestant | str]:
    from bitsandbytes.functional import dequantize_4bit

    base: Any = adapted.base_layer
    layout, data, statistics = describe_weight(adapted.weight)
    shape = (layout.out_features, layout.in_features)
    plain = dense_weight(base, torch.float32)
    out, allowed = torch.empty(shape, dtype=DTYPE, device=device), unit_in_the_last_place(DTYPE)
    codes = data.reshape(-1).view(torch.uint8)
    with torch.no_grad():
        gates, folded = adapted.gates()[:1], plain + update_of(adapted)
    member = Member(
        *(layout, data, statistics, None, adapted.lora_A.detach(), adapted.lora_B.detach(), gates),
        *(adapted.scaling, slice(0, RANK)),
    )

    def in_pytorch() -> Tensor:
        decode_in_pytorch(layout, codes, decode_absmax(layout, statistics), statistics[1], out.view(-1))
        return out

    def in_triton() -> Tensor:
        from sda_fast.kernels.nf4 import decode_4bit

        return decode_4bit(codes, statistics, shape, layout.blocksize, layout.nested_blocksize, out=out)

    def fold(backend: str, use_library: bool) -> Tensor:
        with torch.no_grad(), workspaces.guard(device):
            return folded_weight(member, DTYPE, backend=backend, use_library=use_library, out=out)

    on_gpu = None if device.type == "cuda" else "needs a GPU"
    library = cuda_library.reason_unavailable(device)
    return {
        BITSANDBYTES: Contestant(lambda: dequantize_4bit(base.weight.data, base.weight.quant_state), plain, allowed),
        "in PyTorch": Contestant(in_pytorch, plain, allowed),
        "in Triton": on_gpu or Contestant(in_triton, plain, allowed),
        "by the library": library or Contestant(
            lambda: cuda_library.decode(layout, data, statistics, out), plain, allowed
        ),
        "fold, in PyTorch": Contestant(partial(fold, "torch", False), folded, allowed),
        "fold, in Triton": on_gpu or Contestant(partial(fold, "triton", False), folded, allowed),
        "fold, by the library": library or Contestant(partial(fold, "torch", True), folded, allowed),
    }  # fmt: skip
