"""The modality set around a model reaches its layers, also when checkpointing runs them again in backward."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_fast import MoDALinear, modality
from sda_fast.moda.context import NoModalityError, current_modality, state

KINDS = [None, "reentrant", "non-reentrant"]


def layer(dropout: float = 0.0) -> MoDALinear:
    torch.manual_seed(0)
    made = MoDALinear(nn.Linear(8, 8), num_experts=4, lora_alpha=8, lora_dropout=dropout, adapter_dtype=torch.float64)
    made.base_layer.double()
    nn.init.normal_(made.lora_B)
    nn.init.normal_(made.lora_A)
    return made


class Stack(nn.Module):
    """Layers, each checkpointed; with `outer`, all of them once more."""

    def __init__(self, kind: str | None, outer: str | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(dropout) for _ in range(3)])
        self.kind, self.outer = kind, outer

    def inner(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = torch.tanh(checkpointed(self.kind, one, x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.outer, self.inner, x)


def checkpointed(kind: str | None, function: Any, x: Tensor) -> Tensor:
    return function(x) if kind is None else checkpoint(function, x, use_reentrant=kind == "reentrant")


def gradients(stack: Stack, backward: Any = Tensor.backward) -> list[Tensor]:
    """An image pass, a text pass and a mixed one, then one backward over all."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with modality("image"):
        image = stack(x)
    with modality(1):
        text = stack(x)
    with modality(torch.tensor([1, 0])):
        mixed = stack(x)
    backward((image * text).sum() + mixed.square().sum())
    return [x.grad, *(parameter.grad for parameter in stack.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_sees_the_modality_of_its_own_pass(kind: str | None, outer: str | None, dropout: float) -> None:
    expected = gradients(Stack(None, None, dropout))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for ours, wanted in zip(gradients(Stack(kind, outer, dropout)), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert state.modality.active is None
    assert not state.modality.borrowed


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_another_block_and_in_another_thread(kind: str | None) -> None:
    expected = gradients(Stack(None))

    def inside_text(loss: Tensor) -> None:
        with modality("text"):
            loss.backward()
            assert current_modality().value == "text"

    def in_thread(loss: Tensor) -> None:
        failure: list[BaseException] = []

        def run() -> None:
            try:
                loss.backward()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not failure, failure

    for backward in (inside_text, in_thread):
        for ours, wanted in zip(gradients(Stack(kind), backward), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_block_inside_the_checkpointed_function_wins_in_recomputation(kind: str) -> None:
    one, x = layer(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        with modality("text"):
            text = one(x)
        return text * 2 + one(x)

    results = []
    for used in (None, kind):
        one.zero_grad()
        with modality("image"):
            y = checkpointed(used, both, x)
        y.sum().backward()
        results.append([one.lora_B.grad, one.gate_embedding.grad])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_checkpointing_still_saves_memory_when_the_block_is_inside() -> None:
    one, x = layer(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        with modality("image"):
            return torch.sin(torch.sin(torch.sin(one(x))))

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        checkpoint(function, x, use_reentrant=False).sum().backward()
    assert sum(tensor.numel() == x.numel() for tensor in saved) <= 2


def test_blocks_nest_and_restore() -> None:
    with modality("image"):
        with modality("text"):
            assert current_modality().value == "text"
            with modality([0, 1]):
                assert current_modality().value.tolist() == [0, 1]
            assert current_modality().value == "text"
        assert current_modality().value == "image"
    with pytest.raises(NoModalityError):
        current_modality()


def test_a_block_that_raises_restores_too() -> None:
    with pytest.raises(KeyError), modality("image"):
        raise KeyError
    assert state.modality.active is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_block_object_can_be_used_again_and_within_itself() -> None:
    block = modality("image")
    with block, block:
        assert current_modality().value == "image"
    with block:
        assert current_modality().value == "image"
    assert state.modality.active is None


def test_no_modality_is_a_clear_error_and_threads_have_their_own() -> None:
    one, x = layer(), torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(NoModalityError, match="no modality is set"):
        one(x)
    errors: list[type] = []

    def other_thread() -> None:
        try:
            one(x)
        except NoModalityError as error:
            errors.append(type(error))

    with modality("image"):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        one(x)
    assert errors == [NoModalityError]


def test_a_failed_backward_leaves_no_modality_behind() -> None:
    one, x = layer(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    with modality("image"):
        y = one(torch.sin(x))

    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    with pytest.raises(NoModalityError):
        one(x)


def test_outer_hooks_for_saved_tensors_stay_in_force() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    packed, unpacked = [], []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.shape) or t.detach(), lambda t: unpacked.append(t.shape) or t
        ),
        modality("image"),
        modality("text"),
    ):
        y = torch.sin(x)
    y.sum().backward()
    assert len(packed) == len(unpacked) == 1
    torch.testing.assert_close(x.grad, x.detach().cos())


def test_saving_results_makes_no_reference_cycle() -> None:
    x = torch.randn(4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with modality("image"):
            y = torch.exp(torch.sin(x) * 1)
        saved_beside_the_result = weakref.ref(y.grad_fn.next_functions[0][0].metadata.setdefault("key", _Marker()))
        del y
        assert saved_beside_the_result() is None
    finally:
        gc.enable()


class _Marker:
    """Something in a graph that can be watched."""


@pytest.mark.parametrize("result", [False, True])
def test_changing_a_saved_tensor_in_place_is_still_an_error(result: bool) -> None:
    x = torch.randn(4, requires_grad=True)
    with modality("image"):
        inner = x * 1
        y = torch.exp(inner) if result else torch.sin(inner)
    (y if result else inner).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_names_ids_and_tensors_mean_the_same() -> None:
    one, x = layer(), torch.randn(3, 2, 8, dtype=torch.float64)
    outputs = []
    for which in ("text", 1, [1, 1, 1], torch.ones(3, 2, dtype=torch.int32), torch.tensor(1), np.int64(1)):
        with modality(which):
            outputs.append(one(x))
    with modality("image"):
        outputs.append(one(x, 1))
        other = one(x)
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other, outputs[0])


@pytest.mark.parametrize(
    ("which", "error"),
    [
        *((which, ValueError) for which in (-1, [0, -1], np.int64(-1), torch.tensor(-1))),
        *((which, TypeError) for which in (1.5, torch.ones(2), np.float64(1), torch.tensor(True))),
    ],
)
def test_wrong_ids_are_errors(which: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        modality(which)


def test_an_unknown_name_and_an_id_too_large_are_errors_at_the_layer() -> None:
    one, x = layer(), torch.randn(2, 8, dtype=torch.float64)
    with modality("audio"), pytest.raises(ValueError, match="'audio' is not among"):
        one(x)
    with modality([0, 2]), pytest.raises(ValueError, match="2 modalities"):
        one(x)


def test_ids_on_a_cpu_are_checked_before_they_are_moved_to_another_device() -> None:
    elsewhere = torch.empty(2, 8, device="meta")
    with modality([0, 2]), pytest.raises(ValueError, match="go up to 2 but there are 2 modalities"):
        layer()(elsewhere)
    active = modality([0, 2]).modality
    assert active.resolve((), 3, elsewhere.device).device.type == "meta"
    with pytest.raises(ValueError, match="go up to 2"):
        active.resolve((), 2, elsewhere.device)
