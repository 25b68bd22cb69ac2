"""The host library: the same mask as the plain one, bit for bit, and nothing lost where it is missing or broken."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sda_fast import MoDALinear
from sda_fast.ops import host_library
from sda_fast.ops.dropout import drop, dropping, element_masks, keep_bits, keep_mask, masked, philox_words

compiler = runpy.run_path(str(Path(__file__).resolve().parents[2] / "csrc" / "host" / "compile.py"))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEEDS = st.integers(0, 2**63 - 1)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session", params=["for this processor", "plain"])
def built(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library compiled from its source: with what this processor has, and without."""
    reason = compiler["reason_not_to_build"]()
    if reason is not None:
        pytest.skip(reason)
    output = tmp_path_factory.mktemp("host") / "libsda_fast_host.so"
    flags = ["-Wall", "-Wextra", "-Werror", *(["-DSDA_FAST_PLAIN"] if request.param == "plain" else [])]
    done = subprocess.run([*compiler["command"](output), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_library, "LIBRARY_PATH", built)
    assert host_library.is_available(), host_library.reason_unavailable()
    return built


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """The packed mask as bool [M, columns]."""
    return ((bits[:, :, None] >> torch.arange(8)) & 1).flatten(1)[:, :columns].bool()


@pytest.mark.usefixtures("library")
@fuzz
@given(rows=st.integers(0, 40), columns=st.integers(1, 300), threshold=st.integers(0, 65535), seed=SEEDS)
def test_the_library_draws_the_plain_mask(rows: int, columns: int, threshold: int, seed: int) -> None:
    bits = keep_bits(rows, columns, threshold / 65536, torch.tensor([seed]))
    assert torch.equal(unpacked(bits, columns), keep_mask(rows, columns, threshold / 65536, seed))


@pytest.mark.usefixtures("library")
@fuzz
@given(
    first=st.integers(0, 2**48) | st.integers(2**32 - 200, 2**32 + 200),
    count=st.integers(0, 200),
    threshold=st.sampled_from([0, 1, 6554, 32767, 32768, 65535]) | st.integers(0, 65535),
    seed=SEEDS,
)
def test_any_counters_give_the_plain_words_and_nothing_beside_them_is_written(
    first: int, count: int, threshold: int, seed: int
) -> None:
    buffer = torch.full((count + 2,), 0x5A, dtype=torch.uint8)
    host_library.keep_bits(buffer[1:-1], threshold, seed, first)
    words = philox_words(torch.arange(first, first + count), seed)
    samples = torch.stack((words & 0xFFFF, words >> 16), dim=2).view(count, 8)
    packed = ((samples >= threshold) << torch.arange(8)).sum(1)
    assert buffer.tolist() == [0x5A, *packed.tolist(), 0x5A]


@pytest.mark.usefixtures("library")
@fuzz
@given(dtype=st.sampled_from(DTYPES), rows=st.integers(0, 20), columns=st.integers(1, 100), seed=SEEDS)
def test_the_library_keeps_values_bit_for_bit_and_zeroes_the_rest(
    dtype: torch.dtype, rows: int, columns: int, seed: int
) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(seed)
    # Any bits, not-a-numbers too, and not contiguous.
    values = torch.randint(-(2**15), 2**15, (columns, rows), dtype=integer, generator=generator).view(dtype).t()
    bits = keep_bits(rows, columns, 0.4, torch.tensor([seed]))
    dropped = drop(values, bits)
    assert torch.equal(dropped.view(integer), masked(values, element_masks(bits, columns, dtype)).view(integer))
    assert torch.equal(dropping(bits, columns, dtype)(values).view(integer), dropped.view(integer))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_more_threads_draw_and_drop_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, seed = 701, 3001, torch.tensor([2**40 + 9])
    values = torch.randn(rows, columns)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bits = keep_bits(rows, columns, 0.1, seed)
    dropped = drop(values, bits)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(keep_bits(rows, columns, 0.1, seed), bits)
    assert torch.equal(drop(values, bits), dropped)


def forward_and_backward(dtype: torch.dtype, columns: int) -> list[Tensor]:
    """y and all gradients of a layer with dropout."""
    torch.manual_seed(3)
    base = nn.Linear(columns, 24).to(dtype)
    layer = MoDALinear(base, r=8, num_experts=4, lora_dropout=0.3, generator=torch.Generator().manual_seed(1)).train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 5, columns).to(dtype).requires_grad_()
    y = layer(x, [0, 1, 1, 0, 1, 0])
    y.backward(torch.randn_like(y))
    return [y, x.grad, *(parameter.grad for parameter in layer.adapter_tensors())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [17, 64])
def test_a_layer_computes_the_same_bits_with_and_without_the_library(
    dtype: torch.dtype, columns: int, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_library, "LIBRARY_PATH", built)
    with_library = forward_and_backward(dtype, columns)
    monkeypatch.setattr(host_library, "LIBRARY_PATH", tmp_path / "absent.so")
    without = forward_and_backward(dtype, columns)
    assert all(map(torch.equal, with_library, without))


def test_a_library_that_was_not_built_is_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_library, "LIBRARY_PATH", tmp_path / "absent.so")
    assert not host_library.is_available()
    assert "was not built (no absent.so beside host_library.py" in str(host_library.reason_unavailable())
    with pytest.raises(RuntimeError, match="host library cannot be used: it was not built"):
        host_library.drop(torch.ones(1, 8), torch.ones(1, 1, dtype=torch.uint8))
    bits = keep_bits(5, 17, 0.3, torch.tensor([4]))
    assert torch.equal(unpacked(bits, 17), keep_mask(5, 17, 0.3, 4))


def test_a_broken_library_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(host_library, "LIBRARY_PATH", broken)
    bits = keep_bits(5, 17, 0.3, torch.tensor([4]))
    assert torch.equal(unpacked(bits, 17), keep_mask(5, 17, 0.3, 4))
    assert "cannot be loaded" in str(host_library.reason_unavailable())
    assert caplog.text.count("NumPy is used instead") == 1


def test_a_library_of_another_version_is_left_alone_with_a_warning(
    built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, source = tmp_path / "other.so", tmp_path / "other.cpp"
    source.write_text('extern "C" void sda_fast_keep_bits() {}\n')
    command = compiler["find_compiler"]()
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    assert "sda_fast_drop_16" in str(host_library.load(other))
    assert "NumPy is used instead" in caplog.text


def test_nothing_is_loaded_at_import() -> None:
    script = "import sda_fast, sda_fast.ops.moda_linear; from sda_fast.ops import host_library as host"
    script += "; print(host.load.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
