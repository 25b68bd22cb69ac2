"""Check every MoDA kernel on small odd shapes against float64, without a test framework (also run under memcheck).

    python bench/check_kernels.py

The passes of the CUDA library are checked where it is built, on shapes that they take. Prints one line per case; exit
status 1 if any error exceeds that of plain PyTorch at the same dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from unittest import mock

import torch

from sda_fast.kernels import moda_gemm_tma
from sda_fast.kernels import moda_naive as naive
from sda_fast.kernels.gates import gates_backward_of_layers, gates_of_layers
from sda_fast.kernels.moda_backward import dy_pass_of_group, fuses_dy
from sda_fast.kernels.moda_forward import expand_group
from sda_fast.kernels.moda_gemm import gated_linear, input_gradient
from sda_fast.kernels.nf4 import decode_4bit
from sda_fast.kernels.nf4_linear import small_linear_4bit
from sda_fast.kernels.philox import dropout_scale
from sda_fast.ops import cuda_library
from sda_fast.ops.dropout import keep_mask
from sda_fast.ops.passes import CUDA, TRITON, Passes

SCALING, SEED, DROPOUT = 4.0, 123456789012, 0.1
ROUNDING = 8 * torch.finfo(torch.float32).eps
# M, K, N, R, E
SHAPES = [(17, 129, 70, 24, 8), (129, 64, 33, 66, 33), (40, 129, 17, 256, 64)]
CUDA_SHAPES = [(17, 136, 72, 8, 8), (129, 1064, 520, 16, 4), (300, 264, 1032, 24, 8), (1000, 4104, 600, 64, 16)]


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def error_ratio(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> float:
    """Error over what is allowed: that of the plain version and float32 rounding. NaN counts as infinite."""
    allowed = 1.05 * torch.linalg.norm(plain.double() - truth) + ROUNDING * torch.linalg.norm(truth)
    ratio = float(torch.linalg.norm(actual.double() - truth) / allowed)
    return ratio if ratio == ratio else float("inf")


def joint_ratio(triples: Iterable[tuple[torch.Tensor, ...]]) -> float:
    """The error ratio of several results (actual, plain, truth) as if they were one."""
    return error_ratio(*(torch.cat([one.flatten() for one in ones]) for ones in zip(*triples, strict=True)))


def doubled(*inputs: object) -> list[object]:
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]


def moda_ratios(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, passes: Passes = TRITON
) -> dict[str, float]:
    """The error ratio of every MoDA kernel for one shape and dtype; the CUDA passes' names end in ", CUDA"."""
    M, K, N, R, E = shape
    x, dx = (torch.randn(M, K, device=device).to(dtype) for _ in range(2))
    y, dy = (torch.randn(M, N, device=device).to(dtype) for _ in range(2))
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.1, torch.randn(N, R, device=device) * 0.1
    h, dh = torch.randn(M, R, device=device), torch.randn(M, R, device=device)
    gates, ids = torch.rand(2, E, device=device), torch.randint(0, 2, (M,), device=device)
    keep, scale = keep_mask(M, K, DROPOUT, SEED, device), dropout_scale(DROPOUT)
    dropout = {"dropout_p": DROPOUT, "seed": torch.tensor([SEED], device=device)}
    gate = naive.naive_gate(gates, ids, SCALING, M, R)
    ratios = {}
    suffix = ", CUDA" if passes is CUDA else ""

    def compare(name: str, actual: tuple[torch.Tensor, ...], function: Function, *inputs: object) -> None:
        ratios[name + suffix] = worst_ratio(actual, function, *inputs)

    compare("project", (passes.project(x, lora_A, **dropout),), naive.naive_project, x, lora_A, keep, scale)
    split = {"parts": 3} if passes is CUDA else {"split_k": 3}
    compare("project, split", (passes.project(x, lora_A, **split),), naive.naive_project, x, lora_A)
    updated = passes.expand_add(y.clone(), h, lora_B, gates, ids, SCALING)
    compare("expand_add", (updated,), naive.naive_expand_add, y, h, lora_B, gate)
    written = passes.expand(h, lora_B, gates, ids, SCALING, bias=y[0], out=torch.full_like(y, float("nan")))
    compare("expand", (written,), naive.naive_expand_add, y[:1].expand(M, N), h, lora_B, gate)
    inputs = (dy, h, lora_B, gates, ids, SCALING)
    compare("dy_pass", passes.dy_pass(*inputs), naive.naive_dy_pass, *inputs)
    new_dx = dx.clone()
    dA = passes.dx_pass(x, dh, lora_A, new_dx, **dropout)
    compare("dx_pass", (dA, new_dx), naive.naive_dx_pass, x, dh, lora_A, dx, keep, scale)
    return ratios


def gemm_ratios(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, by_copy_engine: bool = False
) -> dict[str, float]:
    """The error ratios of the GEMMs with the update in them; those by the copy engine take 16 bits and whole rows."""
    M, K, N, R, E = shape
    x, dy = torch.randn(M, K, device=device).to(dtype), torch.randn(M, N, device=device).to(dtype)
    weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.1, torch.randn(N, R, device=device) * 0.1
    h, dh = torch.randn(M, R, device=device), torch.randn(M, R, device=device)
    gates, ids = torch.rand(2, E, device=device), torch.randint(0, 2, (M,), device=device)
    gate, bias = naive.naive_gate(gates, ids, SCALING, M, R), torch.randn(N, device=device).to(dtype)
    dropout = {"dropout_p": DROPOUT, "seed": torch.tensor([SEED], device=device)}
    suffix = ", TMA" if by_copy_engine else ""
    with mock.patch.object(moda_gemm_tma, "serves", lambda *arguments: by_copy_engine):
        y = gated_linear(x, weight, bias, h, lora_B, gates, ids, SCALING)
        dx = input_gradient(dy, weight, dh, lora_A, **dropout)
        undropped = input_gradient(dy, weight, dh, lora_A)
    masks = {"input_gradient": (undropped, None, 1.0)}
    masks["input_gradient, dropout"] = (dx, keep_mask(M, K, DROPOUT, SEED, device), dropout_scale(DROPOUT))
    ratios = {"gated_linear": worst_ratio((y,), naive.naive_gated_linear, x, weight, bias, h, lora_B, gate)}
    for name, (actual, keep, scale) in masks.items():
        ratios[name] = worst_ratio((actual,), naive.naive_input_gradient, dy, weight, dh, lora_A, keep, scale)
    return {name + suffix: ratio for name, ratio in ratios.items()}


def worst_ratio(actual: tuple[torch.Tensor, ...], function: Function, *inputs: object) -> float:
    """The worst error ratio of several results, or one, of a plain function."""
    plain, truth = function(*inputs), function(*doubled(*inputs))
    if torch.is_tensor(plain):
        plain, truth = (plain,), (truth,)
    return max(error_ratio(*triple) for triple in zip(actual, plain, truth, strict=True))


def group_ratios(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The worst error ratio of three layers that share x, in one launch each; of the gates' kernels, too.

    The errors of all layers count together: those of the narrow one alone are too few for a norm to say anything.
    """
    M, _, N, R, E = shape
    widths = (N, 2 * N + 1, 3)
    h, dh = torch.randn(M, 3 * R, device=device), torch.empty(M, 3 * R, device=device)
    lora_B = [torch.randn(width, R, device=device) * 0.1 for width in widths]
    gates, ids = [torch.rand(2, E, device=device) for _ in widths], torch.randint(0, 2, (M,), device=device)
    dys = [torch.randn(M, width, device=device).to(dtype) for width in widths]
    outs = [torch.full_like(dy, float("nan")) for dy in dys]
    expand_group(h, lora_B, gates, ids, SCALING, biases=[dy[0] for dy in dys], outs=outs)
    _, dB, dgates = dy_pass_of_group(dys, h, lora_B, gates, ids, SCALING, dh_out=dh) if fuses_dy(R) else (None,) * 3
    expanded, gradients = [], []
    for layer, (dy, out) in enumerate(zip(dys, outs, strict=True)):
        columns = slice(layer * R, (layer + 1) * R)
        gate = naive.naive_gate(gates[layer], ids, SCALING, M, R)
        given = (dy[:1].expand_as(dy), h[:, columns], lora_B[layer], gate)
        expanded.append((out, naive.naive_expand_add(*given), naive.naive_expand_add(*doubled(*given))))
        if dB is not None:
            given = (dy, h[:, columns], lora_B[layer], gates[layer], ids, SCALING)
            results = (dh[:, columns], dB[layer], dgates[layer])
            triples = zip(results, naive.naive_dy_pass(*given), naive.naive_dy_pass(*doubled(*given)), strict=True)
            gradients.append(tuple(triples))
    ratios = {"expand, group": joint_ratio(expanded)}
    if gradients:
        ratios["dy_pass, group"] = max(map(joint_ratio, zip(*gradients, strict=True)))
    return ratios | gates_ratios(E, device)


def gates_ratios(E: int, device: torch.device) -> dict[str, float]:
    """Of the gates and their gradients, three layers in one launch each way."""
    embeddings, projs = ([torch.randn(lines, 65, device=device) * 0.35 for _ in range(3)] for lines in (2, E))
    gates, directions = gates_of_layers(embeddings, projs, 0, 2), [torch.randn(2, E, device=device) for _ in range(3)]
    needed = {"needs_embedding": True, "needs_proj": True}
    of_embeddings, of_projs = gates_backward_of_layers(directions, gates, embeddings, projs, 0, **needed)
    ratios = {"gates": 0.0, "gates, backward": 0.0}
    for layer, given in enumerate(zip(embeddings, projs, directions, strict=True)):
        plain, truth = naive_gates(*given), naive_gates(*(one.double() for one in given))
        results = (gates[layer], of_embeddings[layer], of_projs[layer])
        ratio, *of_gradients = (error_ratio(*triple) for triple in zip(results, plain, truth, strict=True))
        ratios["gates"] = max(ratios["gates"], ratio)
        ratios["gates, backward"] = max(ratios["gates, backward"], *of_gradients)
    return ratios


def naive_gates(embedding: torch.Tensor, proj: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gates, and the gradients of their parameters in a direction; sums without tensor cores."""
    gates = torch.softmax((embedding[:, None] * proj).sum(-1), -1)
    dlogits = gates * (direction - (direction * gates).sum(-1, keepdim=True))
    dembedding, dproj = (dlogits[:, :, None] * proj).sum(1), (dlogits[:, :, None] * embedding[:, None]).sum(0)
    return gates, dembedding, dproj


def four_bit_ratios(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The error ratios of the 4-bit kernels, on random codes and scales."""
    M, K, N, R, E = shape
    blocksize, elements = 64, N * K
    data = torch.randint(0, 256, ((elements + 1) // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(-(-elements // blocksize), device=device) + 0.5
    code = torch.linspace(-1, 1, 16, device=device)
    codes = torch.stack((data >> 4, data & 15), dim=1).view(-1)[:elements].long()
    exact = (code[codes] * absmax[torch.arange(elements, device=device) // blocksize]).view(N, K)
    decoded = decode_4bit(data, [absmax, code], (N, K), blocksize, dtype=dtype)
    ratios = {"decode_4bit": 0.0 if torch.equal(decoded, exact.to(dtype)) else float("inf")}
    lora_A, lora_B = torch.randn(R, K, device=device) * 0.1, torch.randn(N, R, device=device) * 0.1
    gates = torch.rand(E, device=device)
    fold = {"lora_A": lora_A, "lora_B": lora_B, "gates": gates, "scaling": SCALING}
    folded = decode_4bit(data, [absmax, code], (N, K), blocksize, dtype=dtype, **fold)
    gated = SCALING * lora_B.double() * gates.double().repeat_interleave(R // E)
    truth = exact.double() + gated @ lora_A.double()
    ratios["decode_4bit, fold"] = error_ratio(folded, truth.to(dtype), truth)
    M = min(M, 64)
    x, h = torch.randn(M, K, device=device).to(dtype), torch.randn(M, R, device=device)
    gate = SCALING * gates.repeat_interleave(R // E).expand(M, R)
    options = {"h": h, "lora_B": lora_B, "gates": gates.expand(M, E), "scaling": SCALING}
    y = small_linear_4bit(x, data, [absmax, code], N, blocksize, **options)
    plain = naive.naive_gated_linear(x, exact.to(dtype), None, h, lora_B, gate)
    truth = naive.naive_gated_linear(x.double(), exact.double(), None, h.double(), lora_B.double(), gate.double())
    ratios["small_linear_4bit"] = error_ratio(y, plain, truth)
    return ratios


def print_ratios(ratios: dict[str, float], shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """A line per kernel; how many are off."""
    for name, ratio in ratios.items():
        verdict = "ok" if ratio <= 1 else "FAILED"
        print(f"{name:<28} M,K,N,R,E={shape!s:<24} {dtype!s:<15} error/allowed {ratio:8.3f} {verdict}", flush=True)
    return sum(ratio > 1 for ratio in ratios.values())


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    torch.manual_seed(0)
    failures = 0
    for shape in SHAPES:
        for dtype in (torch.float32, half):
            ratios = moda_ratios(shape, dtype, device) | gemm_ratios(shape, dtype, device)
            ratios |= four_bit_ratios(shape, dtype, device) | group_ratios(shape, dtype, device)
            failures += print_ratios(ratios, shape, dtype)
    lacking = cuda_library.reason_unavailable(device)
    for shape in CUDA_SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            ratios = {} if lacking else moda_ratios(shape, dtype, device, CUDA)
            if moda_gemm_tma.has_copy_engine(device) and shape[3] <= moda_gemm_tma.LARGEST_RANK:
                ratios |= gemm_ratios(shape, dtype, device, by_copy_engine=True)
            failures += print_ratios(ratios, shape, dtype)
    print(f"{failures} failures" + (f", without the CUDA passes: {lacking}" if lacking else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
