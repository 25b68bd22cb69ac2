"""What `sda-fast export` writes, loaded by PEFT and transformers in a process that never imports sda_fast."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sda_fast
from sda_fast.export import ExportConfig, export
from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import load_lvlm
from sda_fast.moda.inject import named_moda_parameters

OWN_ENTRIES = ("pool_mask", "is_noise")
MODALITIES = ("image", "text")
families = pytest.mark.parametrize("model_type", ["qwen2_5_vl", "mllama", "gemma3"])

LOAD_WITHOUT_US = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "sda_fast", "the product was imported"

sys.meta_path.insert(0, Refuse())
torch.set_num_threads(1)
base, out = sys.argv[1:]

def loaded(auto_class, dtype):
    model = auto_class.from_pretrained(base, dtype=torch.bfloat16)
    return model.to(dtype)

def pooled(model, which, dtype):
    inputs = load_file(f"{out}/{which}.safetensors")
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    with torch.no_grad():
        states = model(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

found = {}
for which in ("image", "text"):
    lora = PeftModel.from_pretrained(loaded(AutoModel, torch.float32), f"{out}/plain/lora-{which}")
    found[f"lora {which}"] = pooled(lora, which, torch.float32)
    headed = loaded(AutoModelForImageTextToText, torch.float32)
    headed = PeftModel.from_pretrained(headed, f"{out}/headed/lora-{which}").get_base_model()
    found[f"headed lora {which}"] = pooled(headed.model, which, torch.float32)
    lora.merge_and_unload().save_pretrained(f"{out}/by-peft-{which}")
    by_peft = AutoModel.from_pretrained(f"{out}/by-peft-{which}", dtype=torch.bfloat16)
    found[f"merged by peft {which}"] = pooled(by_peft, which, torch.bfloat16)
    merged = AutoModel.from_pretrained(f"{out}/plain/merged-{which}", dtype="auto")
    assert merged.dtype == torch.bfloat16
    found[f"merged {which}"] = pooled(merged, which, torch.bfloat16)
assert not any(name.split(".")[0] == "sda_fast" for name in sys.modules)
save_file(found, f"{out}/found.safetensors")
"""


@pytest.fixture(scope="module")
def trained(family_folder, tmp_path_factory, items):
    """Makes, once: a random adapter of a tiny model exported in every way, its float32 vectors, and what others find.

    The folder, the vectors by modality, those of the other process by name, and what that process said.
    """
    made = {}

    def make(model_type):
        if model_type in made:
            return made[model_type]
        folder, base = tmp_path_factory.mktemp(model_type), family_folder(model_type)
        lvlm = load_lvlm(base, quantization="none", dtype=torch.float32, device="cpu")
        with torch.no_grad():
            # What a 16-bit model holds, so that only the update is rounded in it.
            for parameter in lvlm.model.parameters():
                parameter.copy_(parameter.bfloat16())
        config = sda_fast.MoDAConfig(r=4, num_experts=2, target_modules=lvlm.family.target_modules)
        sda_fast.adapt_model(lvlm.model, config)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in named_moda_parameters(lvlm.model):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        lvlm.model.eval()
        sda_fast.save_adapter(lvlm.model, folder / "adapter", base_model_name=str(base))
        truth = {}
        for which, collate in zip(MODALITIES, (collate_images, collate_texts), strict=True):
            batch = collate(lvlm, items)
            inputs = {name: one.contiguous() for name, one in batch.items() if name not in OWN_ENTRIES}
            save_file(inputs, folder / f"{which}.safetensors")
            with torch.no_grad():
                truth[which] = encode(lvlm, batch, which)
        export(ExportConfig(folder / "adapter", folder / "plain", merged=True, device="cpu"))
        export(ExportConfig(folder / "adapter", folder / "headed", lm_head=True))
        script = folder / "load.py"
        script.write_text(LOAD_WITHOUT_US)
        command = [sys.executable, script, base, folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        made[model_type] = folder, truth, load_file(folder / "found.safetensors"), done.stderr
        return made[model_type]

    return make


@families
def test_stock_loras_give_the_vectors_of_their_modality_in_unmodified_peft(trained, model_type):
    _, truth, found, messages = trained(model_type)
    assert "missing adapter keys" not in messages
    for which, expected in truth.items():
        for how in ("lora", "headed lora"):
            # Sums of float32 numbers in another order, through three layers.
            torch.testing.assert_close(found[f"{how} {which}"], expected, rtol=1e-5, atol=2e-5)


@families
def test_merged_16_bit_models_are_as_near_as_pefts_float32_merge_rounded_once(trained, model_type):
    _, truth, found, _ = trained(model_type)
    for which, expected in truth.items():
        error, reference = ((found[f"{how} {which}"] - expected).norm() for how in ("merged", "merged by peft"))
        # Sums in another order may end on the other side of a tie of bfloat16 in a weight or two.
        assert 0 < error <= 1.02 * reference, (which, float(error), float(reference))


@families
def test_names_for_a_model_with_its_head_are_other_names(trained, model_type):
    folder, *_ = trained(model_type)
    names = {}
    for kind in ("plain", "headed"):
        with safe_open(folder / kind / "lora-text" / "adapter_model.safetensors", "pt") as file:
            names[kind] = sorted(file.keys())
    assert names["plain"][0].startswith("base_model.model.language_model.")
    assert names["headed"] == [name.replace("base_model.model.", "base_model.model.model.") for name in names["plain"]]


def test_a_moda_adapter_goes_into_a_model_with_its_head_too(trained, family_folder, items):
    folder, truth, *_ = trained("qwen2_5_vl")
    lvlm = load_lvlm(family_folder("qwen2_5_vl"), quantization="none", dtype=torch.bfloat16, device="cpu", lm_head=True)
    lvlm.model.float()
    sda_fast.load_adapter(lvlm.model, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            encode(lvlm, collate_texts(lvlm, items), "text"), truth["text"], rtol=1e-5, atol=2e-5
        )
    sda_fast.save_adapter(lvlm.model, folder / "again")
    lvlm = load_lvlm(family_folder("qwen2_5_vl"), quantization="none", dtype=torch.bfloat16, device="cpu")
    lvlm.model.float()
    sda_fast.load_adapter(lvlm.model, folder / "again")
    with torch.no_grad():
        torch.testing.assert_close(
            encode(lvlm, collate_texts(lvlm, items), "text"), truth["text"], rtol=1e-5, atol=2e-5
        )


def test_every_folder_has_a_card_with_data_settings_and_versions(trained):
    folder, *_ = trained("qwen2_5_vl")
    training = {"items": 5, "item_file": "lamps.jsonl"}
    record = {"training": training, "settings": {"learning_rate": 2e-4}, "versions": {"sda-fast": "0.0.9"}}
    (folder / "adapter" / "training.json").write_text(json.dumps(record))
    export(ExportConfig(folder / "adapter", folder / "carded"))
    cards = [folder / "carded" / f"lora-{which}" / "README.md" for which in MODALITIES]
    cards += [folder / "plain" / f"merged-{which}" / "README.md" for which in MODALITIES]
    for card, which in zip(cards, (*MODALITIES, *MODALITIES), strict=True):
        text = card.read_text()
        assert f"For {which} sequences only" in text and f"torch {version('torch')}" in text
        assert "{" not in text
    assert (
        "| item_file | lamps.jsonl |" in cards[0].read_text() and "| learning_rate | 0.0002 |" in cards[0].read_text()
    )
    assert "| sda-fast | 0.0.9 |" in cards[0].read_text()
    assert "in bfloat16" in cards[2].read_text() and "| num_experts | 2 |" in cards[2].read_text()


def test_a_merged_model_needs_the_name_of_its_base(trained, tmp_path):
    folder, *_ = trained("qwen2_5_vl")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    (nameless / "adapter_model.safetensors").write_bytes(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    for wanted in ({"merged": True}, {"lm_head": True}):
        with pytest.raises(ValueError, match="names no model; give one with --model"):
            export(ExportConfig(nameless, tmp_path / "out", **wanted))
    export(ExportConfig(nameless, tmp_path / "out"))
    assert (tmp_path / "out" / "lora-image" / "adapter_model.safetensors").is_file()
