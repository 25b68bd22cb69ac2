"""transformers' Trainer and accelerate train the models as they are, 16-bit and 4-bit, and keep the adapters."""

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import sda_fast
from sda_fast.lvlm.collate import collate_images, collate_texts
from sda_fast.lvlm.load import load_lvlm
from sda_fast.moda.inject import moda_parameters
from sda_fast.moda.peft_tuner import MoDAPeftConfig

SIZES = {"r": 4, "num_experts": 2, "lora_dropout": 0.1}
quantizations = pytest.mark.parametrize("quantization", ["none", "nf4"])


class ItemRows(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


class Pairs:
    """A collator: a batch of items as the two sequences of each."""

    def __init__(self, lvlm):
        self.lvlm = lvlm

    def __call__(self, items):
        images, texts = collate_images(self.lvlm, items), collate_texts(self.lvlm, items)
        own = ("pool_mask", "is_noise")
        sides = {"image": images, "text": texts}
        return {side: {name: one for name, one in batch.items() if name not in own} for side, batch in sides.items()}


def pooled(model, inputs, which):
    with sda_fast.modality(which):
        states = model(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class SDATrainer(Trainer):
    """What a user of Trainer writes for a loss of two passes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sda_fast.cmsa_loss(pooled(model, inputs["image"], "image"), pooled(model, inputs["text"], "text"), 3.0)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True, "remove_unused_columns": False,
        "disable_tqdm": True, "seed": 0, "gradient_checkpointing": True,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def fresh(folder, quantization):
    return load_lvlm(folder, quantization=quantization, dtype=torch.float32, device="cpu")


def vectors(lvlm, model, items):
    model.eval()
    with torch.no_grad():
        return pooled(model, Pairs(lvlm)(items)["text"], "text")


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21), reason="PEFT before 0.21 saves only its own methods"
)
@quantizations
def test_trainer_trains_a_peft_model_keeps_adapters_only_and_continues(family_folder, items, tmp_path, quantization):
    def prepared():
        set_seed(0)
        lvlm = fresh(family_folder("qwen2_5_vl"), quantization)
        model = get_peft_model(lvlm.model, MoDAPeftConfig(**SIZES, target_modules=lvlm.family.target_modules))
        return lvlm, model, SDATrainer(model, arguments(tmp_path), Pairs(lvlm), ItemRows(items[:4] * 2))

    lvlm, model, trainer = prepared()
    untrained = vectors(lvlm, model, items)
    trainer.train()
    expected = vectors(lvlm, model, items)
    assert (expected - untrained).abs().max() > 1e-3
    kept = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= kept
    assert not {"model.safetensors", "pytorch_model.bin"} & kept

    again = fresh(family_folder("qwen2_5_vl"), quantization)
    loaded = PeftModel.from_pretrained(again.model, tmp_path / "checkpoint-2")
    assert torch.equal(vectors(again, loaded, items), expected)
    again = fresh(family_folder("qwen2_5_vl"), quantization)
    sda_fast.load_adapter(again.model, tmp_path / "checkpoint-2")
    assert torch.equal(vectors(again, again.model, items), expected)

    lvlm, model, trainer = prepared()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(vectors(lvlm, model, items), expected)


def test_trainer_trains_an_adapted_16_bit_model(family_folder, items, tmp_path):
    set_seed(0)
    lvlm = fresh(family_folder("qwen2_5_vl"), "none")
    sda_fast.adapt_model(lvlm.model, sda_fast.MoDAConfig(**SIZES, target_modules=lvlm.family.target_modules))
    untrained = vectors(lvlm, lvlm.model, items)
    trainer = SDATrainer(
        lvlm.model, arguments(tmp_path / "run", save_strategy="no"), Pairs(lvlm), ItemRows(items[:4] * 2)
    )
    trainer.train()
    expected = vectors(lvlm, lvlm.model, items)
    assert (expected - untrained).abs().max() > 1e-3
    sda_fast.save_adapter(lvlm.model, tmp_path / "adapter")
    again = fresh(family_folder("qwen2_5_vl"), "none")
    sda_fast.load_adapter(again.model, tmp_path / "adapter")
    assert torch.equal(vectors(again, again.model, items), expected)


def keep_adapters_only(models, weights, folder):
    weights.clear()
    sda_fast.save_adapter(models[0], folder)


def load_adapters_only(models, folder):
    sda_fast.load_adapter(models.pop(), folder)


@quantizations
def test_accelerate_prepares_trains_saves_and_restores_an_adapted_model(family_folder, items, tmp_path, quantization):
    def prepared():
        set_seed(0)
        lvlm = fresh(family_folder("qwen2_5_vl"), quantization)
        sda_fast.adapt_model(lvlm.model, sda_fast.MoDAConfig(**SIZES, target_modules=lvlm.family.target_modules))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if quantization == "nf4":
            # bitsandbytes' 4-bit layers write statistics that they do not read, so the whole model cannot be loaded.
            accelerator.register_save_state_pre_hook(keep_adapters_only)
            accelerator.register_load_state_pre_hook(load_adapters_only)
        optimizer = torch.optim.AdamW(moda_parameters(lvlm.model), lr=1e-2)
        loader = DataLoader(items[:4] * 4, batch_size=4, collate_fn=Pairs(lvlm))
        return lvlm, accelerator, *accelerator.prepare(lvlm.model, optimizer, loader)

    def step(accelerator, model, optimizer, batch):
        with accelerator.accumulate(model):
            vectors = (pooled(model, batch[which], which) for which in ("image", "text"))
            accelerator.backward(sda_fast.cmsa_loss(*vectors, 3.0))
            accelerator.clip_grad_norm_(moda_parameters(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    lvlm, accelerator, model, optimizer, loader = prepared()
    model.train()
    batches = list(loader)
    for place, batch in enumerate(batches):
        step(accelerator, model, optimizer, batch)
        if place == 1:
            accelerator.save_state(str(tmp_path / "state"))
    expected = vectors(lvlm, accelerator.unwrap_model(model), items)

    lvlm, accelerator, model, optimizer, loader = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    model.train()
    for batch in batches[2:]:
        step(accelerator, model, optimizer, batch)
    assert torch.equal(vectors(lvlm, accelerator.unwrap_model(model), items), expected)
