"""bitsandbytes 4-bit weights: our decoding against bitsandbytes' own, and against the weight that was quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sda_fast import MoDALinear
from sda_fast.ops import quantized
from sda_fast.ops.quantized import decode, decode_absmax, decode_in_pytorch, describe_weight, layer_kind

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(64, 64), (33, 100), (17, 129), (96, 160), (1, 17), (40, 1024)]


def quantised(N: int, K: int, *, nested: bool = True, quant_type: str = "nf4", storage: torch.dtype = torch.uint8):
    torch.manual_seed(N * 1000 + K)
    weight = torch.randn(N, K)
    packed = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return weight, packed.to("cpu")


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decoded_weight_is_near_the_one_quantised_for_any_shape(N: int, K: int, nested: bool, quant_type: str) -> None:
    weight, packed = quantised(N, K, nested=nested, quant_type=quant_type)
    decoded = decode(*describe_weight(packed), torch.float32)
    # 16 levels of a normal distribution leave about 0.07 (nf4) to 0.1 (fp4) of mean error; a misplaced block over 0.5.
    assert (decoded - weight).abs().mean() < 0.13


@pytest.mark.parametrize(("N", "K"), [(64, 64), (17, 192), (40, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pytorch_decoding_equals_bitsandbytes_bit_for_bit(N: int, K: int, dtype: torch.dtype) -> None:
    _, packed = quantised(N, K)
    layout, data, statistics = describe_weight(packed)
    ours = torch.full((N * K,), float("nan"), dtype=dtype)
    decode_in_pytorch(layout, data.reshape(-1), decode_absmax(layout, statistics), statistics[1], ours)
    absmax = bnb.functional.dequantize_blockwise(statistics[0], packed.quant_state.state2) + packed.quant_state.offset
    theirs = torch.ops.bitsandbytes.dequantize_4bit(data, absmax, layout.blocksize, "nf4", (N, K), dtype)
    assert torch.equal(ours.view(N, K), theirs)


@pytest.mark.parametrize("nested", [True, False])
def test_large_weights_are_decoded_by_rows_into_the_workspace(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe_weight(quantised(40, 1024, nested=nested)[1])
    whole = decode(*described, torch.bfloat16).clone()
    monkeypatch.setattr(quantized, "LARGEST_REUSED_ALLOCATION", 0)
    monkeypatch.setattr(quantized, "ELEMENTS_PER_CHUNK", 7 * 1024)
    quantized.workspaces.take((40, 1024), torch.bfloat16, torch.device("cpu")).fill_(float("nan"))
    by_rows = decode(*described, torch.bfloat16)
    assert torch.equal(by_rows, whole)
    assert by_rows.data_ptr() == quantized.workspaces.take((1,), torch.bfloat16, torch.device("cpu")).data_ptr()


def test_two_layers_share_one_workspace_and_on_a_cpu_every_thread_has_its_own() -> None:
    pool, cpu = quantized.WorkspacePool(), torch.device("cpu")
    large = pool.take((40, 64), torch.float16, cpu)
    assert pool.take((16, 64), torch.float32, cpu).data_ptr() == large.data_ptr()
    with ThreadPoolExecutor(1) as executor:
        elsewhere = executor.submit(pool.take, (40, 64), torch.float16, cpu).result()
    assert elsewhere.data_ptr() != large.data_ptr()
    assert pool.take((40, 64), torch.float16, cpu).data_ptr() == large.data_ptr()


def test_layers_of_4bit_weights_decode_into_the_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = quantized.workspaces.take

    def noted(*arguments: object) -> torch.Tensor:
        taken.append(take(*arguments).data_ptr())
        return take(*arguments)

    monkeypatch.setattr(quantized.workspaces, "take", noted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 64, device=device)
    for N in (48, 32):
        layer = MoDALinear(bnb.nn.Linear4bit(64, N, quant_type="nf4"), backend="triton").to(device)
        layer(x, 0).sum().backward()
    assert len(taken) >= 2 and len(set(taken)) == 1


def test_float64_is_the_float32_decoding_widened() -> None:
    _, packed = quantised(33, 100)
    described = describe_weight(packed)
    narrow = decode(*described, torch.float32).clone()
    assert torch.equal(decode(*described, torch.float64), narrow.double())


def test_other_storage_dtypes_hold_the_same_bytes() -> None:
    _, bytes_ = quantised(32, 64)
    _, halves = quantised(32, 64, storage=torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    assert torch.equal(decode(*describe_weight(bytes_), torch.float32), decode(*describe_weight(halves), torch.float32))


@pytest.mark.parametrize("nested", [True, False])
def test_weights_repacked_for_cpu_evaluation_are_restored(nested: bool) -> None:
    weight, packed = quantised(64, 128, nested=nested)
    before = decode(*describe_weight(packed), torch.float32).clone()
    packed.data, packed.quant_state = bnb.functional._convert_weight_packed_for_cpu(packed.data, packed.quant_state)
    assert packed.quant_state.packing_format_for_cpu
    after = decode(*describe_weight(packed), torch.float32)
    assert not packed.quant_state.packing_format_for_cpu
    # Repacking rounds the block scales to bfloat16, 8 bits.
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)
    torch.testing.assert_close(
        bnb.functional.dequantize_4bit(packed.data, packed.quant_state), before, rtol=0.02, atol=1e-3
    )
    assert (after - weight).abs().mean() < 0.1


def test_what_is_restored_under_inference_mode_can_be_trained_beside() -> None:
    from sda_fast import MoDALinear

    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    layer, x = MoDALinear(base, num_experts=4), torch.randn(40, 128).bfloat16()
    with torch.inference_mode():
        base.weight.data, base.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            base.weight.data, base.weight.quant_state
        )
        # bitsandbytes casts a bias in its evaluation.
        base.bias.data = base.bias.data.bfloat16()
        assert base.weight.is_inference() and base.bias.is_inference()
        layer.eval()(x, 1)
    assert not base.weight.quant_state.packing_format_for_cpu
    assert not any(tensor.is_inference() for tensor in (base.weight, *describe_weight(base.weight)[2]))
    layer.train()(x, 1).sum().backward()
    assert layer.lora_B.grad.norm() > 0


def saved_and_loaded(layer: nn.Module, tmp_path: Path) -> nn.Module:
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    state = load_file(tmp_path / "layer.safetensors")
    other.weight = bnb.nn.Params4bit.from_prequantized(
        state.pop("weight"), {name.removeprefix("weight."): tensor for name, tensor in state.items()}, device="cpu"
    )
    return other


def moved(layer: nn.Module, tmp_path: Path) -> nn.Module:
    if torch.cuda.is_available():
        layer = layer.to("cuda")
        assert decode(*describe_weight(layer.weight), torch.float32).is_cuda
    return layer.to("cpu")


def pickled(layer: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(layer, tmp_path / "layer.pt")
    return torch.load(tmp_path / "layer.pt", weights_only=False)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("way", [saved_and_loaded, moved, pickled, lambda layer, folder: copy.deepcopy(layer)])
def test_weights_that_were_saved_moved_or_copied_decode_to_the_same(
    way: Callable, nested: bool, quant_type: str, blocksize: int, tmp_path: Path
) -> None:
    layer = bnb.nn.Linear4bit(96, 40, bias=False, quant_type=quant_type)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(40, 96), requires_grad=False, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize
    )
    layer = layer.to("cpu")
    layout, *described = describe_weight(layer.weight)
    before = decode(layout, *described, torch.float32).clone()
    again = describe_weight(way(layer, tmp_path).weight)
    assert again[0] == layout and layout.blocksize == blocksize and bool(layout.nested_blocksize) == nested
    assert torch.equal(decode(*again, torch.float32), before)


def test_a_weight_not_quantised_yet_is_an_error() -> None:
    with pytest.raises(ValueError, match="not quantised yet"):
        describe_weight(bnb.nn.Params4bit(torch.randn(4, 4), requires_grad=False))


def test_kinds_of_layers() -> None:
    assert layer_kind(nn.Linear(4, 4)) == "float"
    assert layer_kind(bnb.nn.Linear4bit(4, 4)) == "4bit"
    assert layer_kind(bnb.nn.LinearNF4(4, 4)) == "4bit"
    assert layer_kind(nn.Bilinear(4, 4, 4)) is None
    assert layer_kind(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)) is None


def test_a_workspace_made_in_inference_mode_serves_outside_of_it_too() -> None:
    pool, cpu = quantized.WorkspacePool(), torch.device("cpu")
    with torch.inference_mode():
        first = pool.take((4, 8), torch.float32, cpu)
    assert not first.is_inference()
    first.fill_(1)
    assert pool.take((4, 8), torch.float32, cpu) is first
    with torch.inference_mode():
        smaller = pool.take((2, 3), torch.bfloat16, cpu)
    smaller.zero_()
    assert smaller.data_ptr() == first.data_ptr()
    larger = pool.take((64, 8), torch.float32, cpu)
    assert larger.shape == (64, 8) and pool.take((4, 8), torch.float32, cpu).data_ptr() == larger.data_ptr()
