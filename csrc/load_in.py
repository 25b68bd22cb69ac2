"""Loads a built CUDA library as the package does and prints what it registers: `python csrc/load_in.py LIBRARY.so`.

No GPU is needed. One build serves several versions of torch; this says whether the one at hand is among them. Ends with
status 1 and the reason if the library does not load, lacks an operation or takes tensors of a CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sda_fast.ops import cuda_library


def zeros_for(schema: torch.FunctionSchema) -> list[object]:
    """An argument of each kind that the schema names, tensors being zeros on the CPU."""
    of_kind = {"Tensor": torch.zeros(1), "int": 1, "float": 1.0, "bool": False}
    return [of_kind.get(str(argument.type)) for argument in schema.arguments]


def takes_cpu_tensors(operation: torch._ops.OpOverload) -> bool:
    """Whether the operation runs on CPU tensors; it should refuse them, having no kernel for them."""
    try:
        operation(*zeros_for(operation._schema))
    except NotImplementedError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    library = parser.parse_args().library.resolve()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    reason = cuda_library.load(library)
    if reason is not None:
        sys.exit(f"{library} cannot be used: {reason}")
    for name in cuda_library.OPERATIONS:
        operation = getattr(torch.ops.sda_fast_cuda, name).default
        print(operation._schema)
        if takes_cpu_tensors(operation):
            sys.exit(f"{name} takes tensors of a CPU")
    print(f"{len(cuda_library.OPERATIONS)} operations, each refuses tensors of a CPU")
    print(f"On this machine: {cuda_library.reason_of_card(torch.device('cuda')) or 'there is a device for it'}")


if __name__ == "__main__":
    main()
