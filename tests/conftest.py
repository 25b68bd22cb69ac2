"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Ways are chosen by the rules, whatever was measured on this machine.
os.environ["SDA_FAST_TUNED"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from sda_fast.ops import host_library, measured

measured.PACKAGED_TABLES = Path(__file__).with_name("no-tables")


class OperationCounter(TorchDispatchMode):
    """Inside, `calls` counts how often each operation runs, by its name without sda_fast::."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().removeprefix("sda_fast::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def operation_counter():
    return OperationCounter


@pytest.fixture
def without_host_library(monkeypatch, tmp_path):
    """NumPy draws the masks on a CPU, whatever was built."""
    monkeypatch.setattr(host_library, "LIBRARY_PATH", tmp_path / "absent.so")
