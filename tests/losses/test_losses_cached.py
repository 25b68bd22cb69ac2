"""The cached step equals the direct step, dropout, checkpointing and autocast included, and survives lack of memory."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sda_fast import CMSALoss, InfoNCELoss, cached_contrastive_step, modality
from sda_fast.losses import chunking
from sda_fast.losses.chunking import CachedContrastiveStep, choose_chunk_size, split_batch
from sda_fast.moda.config import MoDAConfig
from sda_fast.moda.inject import adapt_model


class Encoder(nn.Module):
    """Two towers' worth of modality-dependent layers with dropout."""

    def __init__(self, checkpointing=None, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.shared = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh()).to(dtype)
        self.heads = nn.ModuleDict({"image": nn.Linear(16, 8), "text": nn.Linear(16, 8)}).to(dtype)
        self.checkpointing = checkpointing
        self.calls = []

    def forward(self, chunk, modality):
        self.calls.append((modality, len(chunk), torch.is_grad_enabled()))
        if self.checkpointing is None:
            hidden = self.shared(chunk)
        else:
            hidden = checkpoint(self.shared, chunk.requires_grad_(), use_reentrant=self.checkpointing == "reentrant")
        return self.heads[modality](torch.nn.functional.dropout(hidden, 0.2, self.training))


def batch(items=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(items, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def gradients(*modules):
    return [p.grad.clone() for m in modules for p in m.parameters()]


def direct_step(encoder, loss, images, texts, chunk_size):
    vectors = [
        torch.cat([encoder(chunk, modality) for chunk in side.split(chunk_size)])
        for modality, side in (("image", images), ("text", texts))
    ]
    return loss(*vectors)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("loss_type", [CMSALoss, InfoNCELoss])
@pytest.mark.parametrize("chunk_size", [1, 4, 11])
def test_cached_step_equals_direct_step_with_dropout_on(checkpointing, loss_type, chunk_size):
    images, texts = batch()
    results = []
    for cached in (True, False):
        encoder, loss = Encoder(checkpointing), loss_type()
        torch.manual_seed(7)
        if cached:
            value = cached_contrastive_step(encoder, images.split(chunk_size), texts.split(chunk_size), loss)
            assert not value.requires_grad
        else:
            value = direct_step(encoder, loss, images, texts, chunk_size)
            value.backward()
        results.append([value.detach(), *gradients(encoder, loss), torch.rand(3)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def tiny_llama(tuning):
    """A float64 Llama in training mode, tuned by MoDA, by LoRA (one expert), or whole; dropout in every case."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config.attention_dropout = 0.2
    config._attn_implementation = "eager"
    model = transformers.LlamaModel(config)
    if tuning != "full":
        adapt_model(model, MoDAConfig(r=4, num_experts=2 if tuning == "MoDA" else 1, lora_dropout=0.3, gate_dim=4))
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("tuning", ["MoDA", "LoRA", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_step_equals_direct_step_of_an_adapted_language_model(tuning, checkpointing):
    images, texts = torch.randint(40, (2, 7, 5), generator=torch.Generator().manual_seed(2))
    results = []
    for cached in (True, False):
        model, loss = tiny_llama(tuning), CMSALoss()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def encode(chunk, name, model=model):
            with modality(name):
                return model(chunk, use_cache=False).last_hidden_state.mean(1)

        torch.manual_seed(7)
        if cached:
            value = cached_contrastive_step(encode, images.split(3), texts.split(3), loss)
        else:
            value = direct_step(encode, loss, images, texts, 3)
            value.backward()
        trained = [p.grad.clone() for p in [*model.parameters(), *loss.parameters()] if p.requires_grad]
        assert any(gradient.abs().max() > 1e-4 for gradient in trained[:-1])
        results.append([value.detach(), *trained, torch.rand(3)])
    for a, b in zip(*results, strict=True):
        # adapters may compute in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_cached_step_under_autocast_equals_direct_step():
    images, texts = batch(dtype=torch.float32)
    results = []
    for cached in (True, False):
        encoder, loss = Encoder(dtype=torch.float32), CMSALoss()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if cached:
                value = cached_contrastive_step(encoder, images.split(4), texts.split(4), loss)
            else:
                value = direct_step(encoder, loss, images, texts, 4)
        if not cached:
            value.backward()
        results.append([value.detach(), *gradients(encoder, loss)])
    for a, b in zip(*results, strict=True):
        # the direct step rounds its sum over chunks to bfloat16 in another order
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-8 * float(b.abs().max()))


def test_one_chunk_at_a_time_has_a_graph():
    images, texts = batch()
    encoder = Encoder()
    cached_contrastive_step(encoder, images.split(4), texts.split(3), CMSALoss())
    with_graph = [call for call in encoder.calls if call[2]]
    assert [(m, n) for m, n, _ in with_graph] == [("image", n) for n in (4, 4, 3)] + [("text", n) for n in (3, 3, 3, 2)]
    assert len(encoder.calls) == 2 * len(with_graph)


def test_gradients_add_up_and_backward_scales_them():
    images, texts = batch()
    encoder, loss = Encoder().eval(), CMSALoss()
    chunks = images.split(4), texts.split(4)
    cached_contrastive_step(encoder, *chunks, loss)
    once = gradients(encoder, loss)
    cached_contrastive_step(encoder, *chunks, loss, backward=lambda value: (2 * value).backward())
    for a, b in zip(once, gradients(encoder, loss), strict=True):
        torch.testing.assert_close(3 * a, b)


def test_wrong_chunks_are_named():
    images, texts = batch()
    with pytest.raises(ValueError, match="no text chunks"):
        cached_contrastive_step(Encoder(), images.split(4), [], CMSALoss())
    with pytest.raises(ValueError, match="11 items but the text chunks 10"):
        cached_contrastive_step(Encoder(), images.split(4), texts[:10].split(4), CMSALoss())


@pytest.mark.parametrize("fails_with_graph", [False, True])
def test_running_out_of_memory_halves_the_chunk_and_loses_nothing(caplog, fails_with_graph):
    images, texts = batch()
    encoder, loss = Encoder(), CMSALoss()
    parameters = [*encoder.parameters(), *loss.parameters()]

    def encode(chunk, modality):
        if len(chunk) > 2 and torch.is_grad_enabled() == fails_with_graph and modality == "text":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")
        return encoder(chunk, modality)

    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step = CachedContrastiveStep(encode, loss, parameters, chunk_size=8)
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        value = step(images, texts)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2 and "7 TiB" in caplog.text
    assert step.chunk_size == 2
    survived = [gradient - 1 for gradient in gradients(encoder, loss)]
    encoder.zero_grad()
    loss.zero_grad()
    torch.manual_seed(7)
    expected = cached_contrastive_step(encoder, images.split(2), texts.split(2), loss)
    torch.testing.assert_close(value, expected)
    for a, b in zip(survived, gradients(encoder, loss), strict=True):
        torch.testing.assert_close(a, b)


def test_a_single_item_that_does_not_fit_and_other_errors_are_raised():
    images, texts = batch(4)

    def out_of_memory(chunk, modality):
        raise MemoryError("no")

    def broken(chunk, modality):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(MemoryError):
        CachedContrastiveStep(out_of_memory, CMSALoss(), [], chunk_size=4)(images, texts)
    with pytest.raises(RuntimeError, match="shapes"):
        CachedContrastiveStep(broken, CMSALoss(), [], chunk_size=4)(images, texts)


def test_auto_chooses_from_free_memory_and_leaves_no_trace():
    images, texts = batch()
    encoder, loss = Encoder(), CMSALoss()
    tiny = choose_chunk_size(encoder, images, texts, free_bytes=1)
    some = choose_chunk_size(encoder, images, texts, free_bytes=4000)
    ample = choose_chunk_size(encoder, images, texts, free_bytes=2**40)
    assert tiny == 1 and 1 < some < 11 and ample == 11
    encoder.zero_grad()
    step = CachedContrastiveStep(encoder, loss, [*encoder.parameters(), *loss.parameters()])
    torch.manual_seed(7)
    step(images, texts)
    assert step.chunk_size == 11
    automatic = gradients(encoder, loss)
    encoder.zero_grad()
    loss.zero_grad()
    torch.manual_seed(7)
    cached_contrastive_step(encoder, [images], [texts], loss)
    for a, b in zip(automatic, gradients(encoder, loss), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_the_first_pass_allocates_do_not_count_as_an_items_memory(monkeypatch):
    there = set()

    def measured(encode):
        chunk, modality = encode.args
        new = 0 if modality in there else 1000
        there.add(modality)
        return 100 * len(chunk) + new, torch.device("cpu")

    monkeypatch.setattr(chunking, "bytes_of_pass", measured)
    assert choose_chunk_size(Encoder(), *batch(), free_bytes=1000) == 6


@pytest.mark.parametrize(("fitting", "chosen"), [(1, 1), (0, None)])
def test_running_out_of_memory_while_measuring_loses_no_gradient(fitting, chosen):
    images, texts = batch()
    encoder, loss = Encoder(), CMSALoss()
    parameters = [*encoder.parameters(), *loss.parameters()]

    def encode(chunk, modality):
        if len(chunk) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")
        return encoder(chunk, modality)

    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step = CachedContrastiveStep(encode, loss, parameters)
    torch.manual_seed(7)
    if chosen is None:
        with pytest.raises(torch.OutOfMemoryError):
            step(images, texts)
        assert all((parameter.grad == 1).all() for parameter in parameters)
        torch.testing.assert_close(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())
        return
    step(images, texts)
    assert step.chunk_size == chosen
    measured = [gradient - 1 for gradient in gradients(encoder, loss)]
    encoder.zero_grad()
    loss.zero_grad()
    torch.manual_seed(7)
    cached_contrastive_step(encoder, images.split(1), texts.split(1), loss)
    for a, b in zip(measured, gradients(encoder, loss), strict=True):
        torch.testing.assert_close(a, b)


def test_a_first_batch_of_one_item_does_not_settle_the_chunk_size():
    images, texts = batch()
    step = CachedContrastiveStep(Encoder(), lambda x, y: (x * y).sum(), [])
    step(images[:1], texts[:1])
    assert step.chunk_size == "auto"
    step(images, texts)
    assert step.chunk_size == 11


def test_running_out_of_memory_in_the_loss_is_said_at_once(caplog):
    images, texts = batch()
    encoder = Encoder()

    def loss(image_vectors, text_vectors):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")

    step = CachedContrastiveStep(encoder, loss, encoder.parameters(), chunk_size=4)
    with pytest.raises(RuntimeError, match="in the loss, not in a chunk") as raised:
        step(images, texts)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert len(encoder.calls) == 6 and step.chunk_size == 4 and not caplog.records


def test_an_error_of_the_step_keeps_the_gradients_from_before():
    images, texts = batch()
    encoder = Encoder()
    parameters = list(encoder.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step = CachedContrastiveStep(encoder, CMSALoss(), parameters, chunk_size=4)
    with pytest.raises(ValueError, match="11 items but the text chunks 10"):
        step(images, texts[:10])
    assert all((parameter.grad == 1).all() for parameter in parameters)


@pytest.mark.parametrize("chunk_size", ["big", None, 2.0, 0])
def test_a_chunk_size_that_is_no_positive_integer_is_named(chunk_size):
    with pytest.raises(ValueError, match=f"'auto' or a positive integer, got {chunk_size!r}"):
        CachedContrastiveStep(Encoder(), CMSALoss(), [], chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ({}, ValueError, "at least one column, got an empty mapping"),
        ({"ids": torch.zeros(9), "names": ["a"] * 3}, ValueError, "same length, got ids: 9, names: 3"),
        ({"ids": torch.zeros(9), "use_cache": False}, TypeError, "column 'use_cache': .* got bool"),
        ({"ids": torch.zeros(9), "scale": torch.tensor(2.0)}, TypeError, "column 'scale': .* without dimensions"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_explained(images, error, words):
    step = CachedContrastiveStep(Encoder(), CMSALoss(), [], chunk_size=2)
    with pytest.raises(error, match=words):
        step(images, images)


def test_a_batch_without_items_is_one_chunk_without_items():
    assert split_batch([], 2) == [[]]
    assert split_batch({"names": []}, 2) == [{"names": []}]
    assert [len(chunk) for chunk in split_batch(torch.zeros(0, 3), 2)] == [0]


def test_batches_of_tensors_mappings_and_sequences_are_split():
    tensor = torch.arange(5)
    assert [len(chunk) for chunk in split_batch(tensor, 2)] == [2, 2, 1]
    assert split_batch(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    chunks = split_batch({"ids": tensor, "names": list("abcde")}, 3)
    assert chunks[1]["names"] == ["d", "e"] and chunks[1]["ids"].tolist() == [3, 4]
    with pytest.raises(TypeError, match="int"):
        split_batch(7, 2)
