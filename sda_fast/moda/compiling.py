"""Adapted layers under torch.compile: layers that read the same x (q, k, v; gate, up) become one operation again.

Outside of a compiled region `shared` sees to that; what Dynamo traces has one `moda_group` per layer. The backend here
merges those of equal x, modality ids and dropout before anything else looks at the graph, then hands it to the backend
that was asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

# Positions of the arguments of `sda_fast::moda_group`.
X, FROZEN, ADAPTERS, LAYOUTS, SCALINGS, MODALITY_IDS, DROPOUT, SEED, BACKEND = range(9)
JOINED = (FROZEN, ADAPTERS, LAYOUTS, SCALINGS)
# Methods that give the same for the same; what Dynamo traces repeats them for every layer.
PURE_METHODS = ("reshape", "to", "view")
LARGEST_NUMBER_OF_GRAPHS = 64
IN_PLACE_OPERATORS = {operator.setitem} | {
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}


@contextmanager
def compiled_layers(decoder: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Within this block every layer of a decoder is compiled; they share their code, so that few graphs serve them all.

    Dropout draws the same seeds as without. The first steps take longer: a graph is made for each modality, with and
    without gradients, and once more when the sequences' length first changes.

    Args:
        decoder: a model with its layers in `layers`, as transformers' decoders have them; adapted before.
        backend: as of torch.compile, for what is left once layers that share x are merged.
    Raises:
        ValueError: the decoder has no such layers.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(f"{type(decoder).__name__} has no list of layers to compile")
    merging = MergingBackend(backend)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile(backend=merging)
    try:
        # Layers of all kinds count together, each with every modality, with and without gradients, and new lengths.
        with torch._dynamo.config.patch(recompile_limit=LARGEST_NUMBER_OF_GRAPHS):
            yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled


@dataclass(frozen=True)
class MergingBackend:
    """A backend for torch.compile that merges layers with the same x, then calls another.

    Attributes:
        backend: the other, by name or as a function.
    """

    backend: str | Callable[..., Any] = "inductor"

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
        merge_groups(graph_module)
        compiler = torch._dynamo.lookup_backend(self.backend) if isinstance(self.backend, str) else self.backend
        if self.backend == "inductor":
            # Its own random numbers would differ from pass to pass, and a cached step runs every chunk twice.
            options["config_patches"] = {"fallback_random": True, **options.get("config_patches", {})}
        return compiler(graph_module, example_inputs, **options)


def merge_groups(graph_module: GraphModule) -> int:
    """Merge the `moda_group` calls of a traced graph that read the same x; returns how many calls that spares.

    What runs under activation checkpointing is a graph of its own inside.
    """
    graph = graph_module.graph
    inner = sum(merge_groups(child) for child in graph_module.children() if isinstance(child, GraphModule))
    merged = 0
    for nodes in groups_of(graph):
        for members in runs_without_mutation(graph, nodes):
            if len(members) > 1 and can_join(members):
                join(graph, members)
                merged += len(members) - 1
    if merged:
        graph.eliminate_dead_code()
        graph.lint()
        graph_module.recompile()
    return inner + merged


def is_group_call(node: Node) -> bool:
    """Whether a node calls `moda_group` and nothing but outputs of layers is taken from it."""
    operation = torch.ops.sda_fast.moda_group
    return (
        node.op == "call_function"
        and node.target in (operation, operation.default)
        and len(node.args) == BACKEND + 1
        and all(map(takes_item, node.users))
        and all(all(map(takes_item, user.users)) if user.args[1] == 0 else not user.users for user in node.users)
    )


def takes_item(node: Node) -> bool:
    """Whether a node is an element of a tuple or list, at a known place."""
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


def groups_of(graph: Graph) -> list[list[Node]]:
    """The calls that could be one, in their order."""
    by_key: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if is_group_call(node):
            key = (*(value_of(node.args[place]) for place in (X, MODALITY_IDS)), node.args[DROPOUT], node.args[BACKEND])
            by_key.setdefault(key, []).append(node)
    return list(by_key.values())


def value_of(argument: Any) -> Any:
    """Something hashable that is equal for arguments that are the same by construction."""
    if isinstance(argument, Node) and argument.op == "call_method" and argument.target in PURE_METHODS:
        keywords = sorted(argument.kwargs.items())
        return (argument.target, *map(value_of, argument.args), *((name, value_of(one)) for name, one in keywords))
    return tuple(map(value_of, argument)) if isinstance(argument, (list, tuple)) else argument


def runs_without_mutation(graph: Graph, nodes: list[Node]) -> list[list[Node]]:
    """`nodes`, cut wherever the graph changes anything in place between two of them."""
    wanted = set(nodes)
    runs: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node in wanted:
            runs[-1].append(node)
        elif mutates(node) and runs[-1]:
            runs.append([])
    return runs


def mutates(node: Node) -> bool:
    """Whether a node may change one of its arguments."""
    if "out" in node.kwargs or node.target in IN_PLACE_OPERATORS:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")


def can_join(members: Sequence[Node]) -> bool:
    """Whether no call needs what another gives."""
    return not any(set(members) & ancestors(inputs_of(member)) for member in members[1:])


def inputs_of(member: Node) -> list[Node]:
    """The nodes that a later member brings along."""
    return [one for place in JOINED for one in member.args[place] if isinstance(one, Node)]  # type: ignore[union-attr]


def ancestors(nodes: Sequence[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def join(graph: Graph, members: Sequence[Node]) -> None:
    """Put one call in the place of the first, with the first's mask, and take the others' outputs from it."""
    first = members[0]
    brought = ancestors([node for member in members[1:] for node in inputs_of(member)])
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in sorted(brought, key=order.__getitem__):
        if order[node] > order[first]:
            first.prepend(node)
    arguments = list(first.args)
    for place in JOINED:
        arguments[place] = [one for member in members for one in member.args[place]]  # type: ignore[union-attr]
    with graph.inserting_before(first):
        together = graph.call_function(first.target, tuple(arguments))  # type: ignore[arg-type]
        outputs = graph.call_function(operator.getitem, (together, 0))
    offset = 0
    for member in members:
        for outputs_of_member in list(member.users):
            for output in list(outputs_of_member.users):
                output.args = (outputs, offset + output.args[1])  # type: ignore[operator]
            graph.erase_node(outputs_of_member)
        offset += len(member.args[SCALINGS])  # type: ignore[arg-type]
        seed = member.args[SEED]
        graph.erase_node(member)
        if isinstance(seed, Node) and member is not first and not seed.users:
            graph.erase_node(seed)
