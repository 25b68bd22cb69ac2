"""Item texts and chat sequences."""

from collections import Counter

import pytest
import torch

from sda_fast.data.items import Item
from sda_fast.lvlm.collate import ImageOptions, collate_images, collate_texts, plain_text
from sda_fast.lvlm.prompts import PromptConfig, attribute_text

RICH = Item(
    "x",
    {"title": " A\n lamp ", "tags": ["red", None, "oak"], "size": {"w": 3, "d": ""}, "new": True, "note": "", "n": 0},
)


def test_attribute_text_writes_every_kind_of_value_and_leaves_empty_ones_out():
    assert attribute_text(RICH) == "title: A lamp\ntags: red, oak\nsize: w 3\nnew: yes\nn: 0"


def test_attribute_text_follows_the_configuration():
    config = PromptConfig(fields=["n", "title", "absent"], field_format="{value} ({name})", separator="; ")
    assert attribute_text(RICH, config) == "0 (n); A lamp (title)"


def test_attribute_text_of_braces_is_taken_literally():
    assert attribute_text(Item("x", {"{value}": "{name} {0}"})) == "{value}: {name} {0}"


@pytest.mark.parametrize("wrong", [{"field_format": "{name}"}, {"max_text_tokens": 0}])
def test_impossible_prompts_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).replace("{", r"\{")):
        PromptConfig(**wrong)


def test_sequences_are_in_the_models_chat_format(loaded, items):
    lvlm = loaded("qwen2_5_vl")
    image_ids = collate_images(lvlm, items[3:4], PromptConfig(image_instruction="Look."))["input_ids"][0]
    text_ids = collate_texts(lvlm, items[:1])["input_ids"][0]
    image = lvlm.tokenizer.decode(image_ids).replace("<|image_pad|>", "")
    assert image == "<|im_start|>user\n<|vision_start|><|vision_end|>Look.<|im_end|>\n<|im_start|>assistant\n"
    assert (
        lvlm.tokenizer.decode(text_ids)
        == "<|im_start|>user\ntitle: vivid bottle\nprice: 0<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_attribute_that_spells_special_tokens_stays_plain_text(loaded):
    lvlm = loaded("qwen2_5_vl")
    batch = collate_texts(lvlm, [Item("x", {"t": "a<|image_pad|>b<|im_end|>"})])
    ids = batch["input_ids"][0].tolist()
    assert lvlm.model.config.image_token_id not in ids
    assert ids.count(lvlm.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_long_texts_are_cut_after_so_many_tokens(loaded):
    lvlm = loaded("qwen2_5_vl")
    text = "vivid wood Ω " * 40
    cut = plain_text(lvlm, text, 17)
    assert text.startswith(cut)
    assert len(lvlm.tokenizer(cut)["input_ids"]) <= 17
    assert plain_text(lvlm, "vivid", 17) == "vivid" and plain_text(lvlm, text, None) == text


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "mllama", "gemma3", "llava"])
def test_pooling_can_leave_the_template_out(loaded, items, model_type):
    lvlm = loaded(model_type)
    prompts = PromptConfig(pool_template=False, image_instruction="Look here.")
    batch = collate_texts(lvlm, items[:2], prompts)
    for row, item in enumerate(items[:2]):
        kept = lvlm.tokenizer.decode(batch["input_ids"][row][batch["pool_mask"][row]])
        assert kept.strip() == attribute_text(item, prompts).strip()
    batch = collate_images(lvlm, items[:2], prompts)
    for row in range(2):
        kept = batch["input_ids"][row][batch["pool_mask"][row]]
        image_token = lvlm.tokenizer.convert_tokens_to_ids(_image_token(model_type))
        assert (kept == image_token).any()
        assert lvlm.tokenizer.decode(kept[kept != image_token]).strip() == "Look here."


def _image_token(model_type):
    tokens = {"qwen2_5_vl": "<|image_pad|>", "mllama": "<|image|>", "gemma3": "<image_soft_token>", "llava": "<image>"}
    return tokens[model_type]


def test_an_empty_text_is_pooled_over_the_template_in_any_case(loaded):
    batch = collate_texts(loaded("qwen2_5_vl"), [Item("x", {})], PromptConfig(pool_template=False))
    assert batch["pool_mask"].all()


@pytest.mark.parametrize("model_type", ["mllama", "gemma3"])
def test_the_start_token_comes_once(loaded, items, model_type):
    lvlm = loaded(model_type)
    for batch in (collate_images(lvlm, items), collate_texts(lvlm, items)):
        count = (batch["input_ids"] == lvlm.tokenizer.bos_token_id).sum(-1)
        assert torch.equal(count, torch.ones_like(count))


def test_missing_pictures_become_counted_noise(loaded, items):
    counts = Counter()
    batch = collate_images(loaded("qwen2_5_vl"), items, warnings=counts)
    assert batch["is_noise"].tolist() == [False] * 4 + [True]
    assert counts == Counter(missing_image=1)


def test_pictures_stay_within_the_pixel_bounds(loaded, items):
    lvlm = loaded("qwen2_5_vl")
    for bound in (28 * 28, 56 * 56, 10**6):
        grid = collate_images(lvlm, items, image_options=ImageOptions(max_pixels=bound))["image_grid_thw"]
        # The tiny processor's own bound is 112 x 112.
        assert (grid.prod(-1) * 14 * 14).max() <= min(bound, 112 * 112)


@pytest.mark.parametrize("collate", [collate_images, collate_texts])
def test_an_empty_batch_is_refused(loaded, collate):
    with pytest.raises(ValueError, match="at least one item"):
        collate(loaded("qwen2_5_vl"), [])
