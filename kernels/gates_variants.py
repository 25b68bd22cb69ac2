"""The variants of the gates' kernels that the gate compiles, with their bytes by formula (see `gate`)."""

from __future__ import annotations

from sda_fast.kernels import gates
from sda_fast.kernels.gate import KernelVariant
from sda_fast.kernels.group import LAYERS_PER_LAUNCH

EXPERTS, ENTRIES, MODALITIES = 8, 64, 2
NAMES = ("embedding", "proj")


def _pointers(names: tuple[str, ...], type_name: str, layers: int) -> tuple[dict[str, str], dict[str, object]]:
    places = [(name, place) for name in names for place in range(LAYERS_PER_LAUNCH)]
    present = {f"{name}_{place}_ptr": f"*{type_name}" for name, place in places if place < layers}
    return present, {f"{name}_{place}_ptr": None for name, place in places if place >= layers}


def _variant(name: str, kernel: object, type_name: str, layers: int, experts: int, backward: bool) -> KernelVariant:
    size = {"fp32": 4, "bf16": 2}[type_name]
    parameters, absent = _pointers(NAMES, type_name, layers)
    lines, absent_lines = _pointers(("dgates", "gates"), "fp32", layers) if backward else ({"gates_ptr": "*fp32"}, {})
    integers = ["E", "D", "first_modality", *(["modalities", "lines"] if backward else [])]
    gradients = {"dembedding_ptr": f"*{type_name}", "dproj_ptr": f"*{type_name}"} if backward else {}
    moved = layers * (experts + MODALITIES) * ENTRIES * size * (2 if backward else 1)
    return KernelVariant(
        name=f"{name} {type_name} E={experts} layers={layers}",
        kernel=kernel,
        signature={**parameters, **lines, **gradients, **dict.fromkeys(integers, "i32")},
        constexprs={
            **absent,
            **absent_lines,
            "LAYERS": layers,
            **({"NEEDS_EMBEDDING": True, "NEEDS_PROJ": True} if backward else {}),
            **gates.blocks(experts, ENTRIES),
        },
        num_warps=4,
        num_stages=1,
        problem=f"E={experts} D={ENTRIES}",
        bytes_moved=moved,
        bytes_floor=moved,
        flops=2 * layers * experts * ENTRIES * (2 * MODALITIES if backward else MODALITIES),
        aligned=("D",),
        tensor_cores=False,
    )


VARIANTS = tuple(
    _variant(name, kernel, type_name, layers, experts, backward)
    for name, kernel, backward in (
        ("gates", gates.gates_kernel, False),
        ("gates backward", gates.gates_backward_kernel, True),
    )
    for type_name, layers, experts in (("fp32", 1, 8), ("fp32", 3, 8), ("fp32", 3, 64), ("bf16", 2, 8))
)
