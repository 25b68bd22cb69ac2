"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Ways are chosen by the rules, whatever was measured on this machine.
os.environ["SDA_FAST_TUNED"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from sda_fast.ops import measured

measured.PACKAGED_TABLES = Path(__file__).with_name("no-tables")
