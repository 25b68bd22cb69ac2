"""The loader of the CUDA library, without the library."""

import pytest
import torch

from sda_fast.ops import cuda_library
from sda_fast.ops.quantized import WeightLayout


def test_cpu_tensors_are_never_sent_to_the_library():
    assert not cuda_library.is_available("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_the_library_says_so():
    assert not cuda_library.is_available()
    assert "no CUDA device" in cuda_library.reason_unavailable()


def test_a_library_that_was_not_built_or_is_broken_says_so(tmp_path, caplog):
    assert "was not built" in cuda_library.load(tmp_path / "absent.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    reason = cuda_library.load(broken)
    assert "cannot be loaded" in reason and "file too short" in reason
    assert "Triton is used instead" in caplog.text


def test_plain_weights_are_refused():
    with pytest.raises(ValueError, match="4-bit"):
        cuda_library.weight_arguments(WeightLayout(2, 2), torch.zeros(2, 2), [])


@pytest.mark.parametrize("nested", [False, True])
def test_weight_arguments_follow_the_operations_schema(nested):
    layout = WeightLayout(4, 16, 1, 64, 256 if nested else 0)
    absmax, code, table = torch.zeros(1, dtype=torch.uint8), torch.zeros(16), torch.zeros(256)
    statistics = [absmax, code, torch.ones(1), table, torch.tensor(0.5)] if nested else [torch.ones(1), code]
    arguments = cuda_library.weight_arguments(layout, torch.zeros(32, 1, dtype=torch.uint8), statistics)
    assert len(arguments) == 8
    assert arguments[1].numel() == 16
    assert arguments[2].dtype == (torch.uint8 if nested else torch.float32)
    if nested:
        assert [tensor.numel() for tensor in arguments[3:6]] == [256, 1, 1]
    else:
        assert arguments[3:6] == (None, None, None)
    assert arguments[6:] == (64, 256 if nested else 0)
