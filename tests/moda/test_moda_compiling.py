"""Under torch.compile layers that read the same x are one operation again, and nothing else changes."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from sda_fast import CMSALoss, MoDAConfig, adapt_model, modality
from sda_fast.losses.cached import cached_contrastive_step
from sda_fast.moda import compiling
from sda_fast.moda.compiling import MergingBackend, compiled_layers, merge_groups
from sda_fast.moda.inject import named_moda_layers
from sda_fast.moda.linear import MoDALinear


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(*, checkpointing=False, r=4, dropout=0.2):
    """A Llama of two layers with adapters that do something, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaModel(config)
    adapt_model(model, MoDAConfig(r=r, num_experts=2, lora_dropout=dropout, gate_dim=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model.train()


def tokens(*shape, seed=2):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    """The adapters' gradients, which the model then has no longer."""
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def passes(model):
    """Vectors and gradients of both modalities and several lengths, from the same random state."""
    torch.manual_seed(7)
    results = []
    for length, name in ((5, "image"), (5, "text"), (9, "text"), (12, "text")):
        with modality(name):
            hidden = model(tokens(3, length), use_cache=False).last_hidden_state
        hidden.square().mean().backward()
        results.append((hidden.detach(), gradients(model)))
    return results


@pytest.fixture
def spared(monkeypatch):
    """How many calls every compiled graph was spared."""
    counts = []
    merge = compiling.merge_groups

    def counting(graph_module):
        counts.append(merge(graph_module))
        return counts[-1]

    monkeypatch.setattr(compiling, "merge_groups", counting)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_q_k_v_and_gate_up_are_merged_and_give_the_same_bits_with_dropout(spared, checkpointing):
    model = llama(checkpointing=checkpointing)
    expected = passes(model)
    with compiled_layers(model, "aot_eager"):
        given = passes(model)
    # Inner graphs count themselves as well.
    assert spared and set(spared) == {3}
    for (hidden, of_adapters), (expected_hidden, expected_of_adapters) in zip(given, expected, strict=True):
        torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=0)
        assert of_adapters.keys() == expected_of_adapters.keys() and len(of_adapters) == 56
        for name, gradient in of_adapters.items():
            torch.testing.assert_close(gradient, expected_of_adapters[name])


def qwen2_5_vl():
    """The decoder of a Qwen2.5-VL of one layer, as `llama`."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLTextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters=rope,
    )  # fmt: skip
    model = Qwen2_5_VLTextModel(config)
    adapt_model(model, MoDAConfig(r=4, num_experts=2, lora_dropout=0.2, gate_dim=4))
    for _, layer in named_moda_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


@pytest.mark.parametrize("make", [llama, qwen2_5_vl])
def test_one_graph_holds_a_decoder_layer_with_checkpointing_and_dropout(make):
    model = make()
    layer, hidden = model.layers[0], torch.randn(2, 6, 32, requires_grad=True)
    positions = torch.arange(6).expand(2, 6)
    embeddings = model.rotary_emb(hidden, positions.expand(3, 2, 6) if make is qwen2_5_vl else positions)
    adapter = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def layer_of(hidden):
        y = layer(hidden, position_embeddings=embeddings, position_ids=positions, use_cache=False)
        return y[0] if isinstance(y, tuple) else y

    def results(function):
        torch.manual_seed(7)
        with modality("image"):
            y = function(hidden)
            return [y, *torch.autograd.grad(y.square().sum(), [hidden, *adapter])]

    # Layers that each draw their own mask, as they do in a graph that nothing merges.
    for module in layer.modules():
        for key in [key for key in module._forward_pre_hooks if str(key).startswith("sda_fast ")]:
            del module._forward_pre_hooks[key]
    expected = results(layer_of)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert layer.gradient_checkpointing and layer.training
    for given in (results(layer_of), results(torch.compile(layer_of, fullgraph=True, backend="aot_eager"))):
        for ours, wanted in zip(given, expected, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_inductor_draws_the_same_masks_so_that_a_cached_step_is_exact():
    images, texts = tokens(2, 8, 5)
    results = []
    for compiled in (False, True):
        model, loss = llama(checkpointing=True), CMSALoss()

        def encode(chunk, name, model=model):
            with modality("text"):
                return model(chunk, use_cache=False).last_hidden_state.mean(1)

        def step(model=model, loss=loss, encode=encode):
            torch.manual_seed(7)
            value = cached_contrastive_step(encode, images.split(4), texts.split(4), loss)
            return [value, *gradients(model).values()]

        if compiled:
            with compiled_layers(model):
                results.append(step())
        else:
            results.append(step())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_layers_are_as_before_afterwards_even_after_an_error():
    model = llama()
    with pytest.raises(KeyError), compiled_layers(model, "aot_eager"):
        assert all(layer._compiled_call_impl is not None for layer in model.layers)
        raise KeyError
    assert all(layer._compiled_call_impl is None for layer in model.layers)


def test_a_model_without_a_list_of_layers_is_refused():
    with (
        pytest.raises(ValueError, match="Sequential has no list of layers to compile"),
        compiled_layers(nn.Sequential()),
    ):
        pass


class Pair(nn.Module):
    """Two adapted layers, called in one way or another."""

    def __init__(self, call):
        super().__init__()
        self.a, self.b = (MoDALinear(nn.Linear(8, width), r=4, num_experts=2) for width in (6, 8))
        self.call = call
        for layer in (self.a, self.b):
            nn.init.normal_(layer.lora_B)

    def forward(self, x):
        return self.call(self.a, self.b, x)


def in_place(a, b, x):
    y = x * 1
    first = a(y)
    y.mul_(2)
    return first, b(y)


WAYS = {
    "the same x": (lambda a, b, x: (a(x), b(x)), 1),
    "one needs the other": (lambda a, b, x: a(b(x)), 0),
    "another x": (lambda a, b, x: (a(x), b(x + 1)), 0),
    "x changed in between": (in_place, 0),
    "other ids": (lambda a, b, x: (a(x, 0), b(x, 1)), 1),
    "ids as tensors": (lambda a, b, x: (a(x, torch.tensor([0, 1])), b(x, torch.tensor([0, 1]))), 0),
    "x in another shape": (lambda a, b, x: (a(x), b(x.flatten(0, 1))), 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_only_calls_on_the_same_x_are_merged(spared, way):
    call, expected_count = WAYS[way]
    pair = Pair(call)
    x = torch.randn(2, 3, 8)
    with modality("text"), torch.no_grad():
        expected = pair(x)
        given = torch.compile(pair, backend=MergingBackend("aot_eager"))(x)
    torch.testing.assert_close(given, expected)
    assert spared == [expected_count]


def test_a_graph_without_adapted_layers_is_left_alone():
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    code = graph_module.code
    assert merge_groups(graph_module) == 0
    assert graph_module.code == code
