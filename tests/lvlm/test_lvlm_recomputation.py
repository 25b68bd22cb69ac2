"""Real decoders under gradient checkpointing repeat no down_proj, unless a norm reads its result."""

import pytest
import torch

from sda_fast import MoDAConfig, adapt_model
from sda_fast.jobs.train_step import training_mode
from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import load_lvlm
from sda_fast.moda.inject import named_moda_parameters

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "llava"]


def adapted(folder, family_quantization):
    lvlm = load_lvlm(folder, quantization=family_quantization, dtype=torch.float32, device="cpu")
    config = MoDAConfig(r=4, num_experts=2, lora_dropout=0.2, target_modules=lvlm.family.target_modules)
    names = adapt_model(lvlm.model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in named_moda_parameters(lvlm.model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return lvlm, sum(name.endswith("down_proj") for name in names)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_down_proj_is_not_repeated(
    family_folder, items, operation_counter, family, quantization
):
    lvlm, layers = adapted(family_folder(family), quantization)
    batches = {"image": collate_images(lvlm, items), "text": collate_texts(lvlm, items)}
    results, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        with training_mode(lvlm, gradient_checkpointing=checkpointing), operation_counter() as operations:
            for which, batch in batches.items():
                encode(lvlm, batch, which).square().mean().backward()
        named = dict(named_moda_parameters(lvlm.model))
        results.append({name: parameter.grad for name, parameter in named.items()})
        calls.append(operations.calls)
        for parameter in named.values():
            parameter.grad = None
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)
    assert calls[0]["moda_group_hidden"] == 0 and layers > 0
    assert calls[1]["moda_group"] == calls[1]["moda_group_hidden"] == calls[0]["moda_group"]
    spared = calls[1]["moda_group_hidden"] - calls[1]["moda_group_outputs"]
    # Gemma normalises what down_proj gives before it is added.
    assert spared == (0 if family == "gemma3" else 2 * layers)
