"""Tiny models of every family's real classes, built from configuration and saved as any other model folder."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

WORDS = (
    "title: Ondine vivid bottle for small rooms\nmaterial: carved wood\nprice: 11.35 user assistant Describe the item"
)
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def turns(start, image, end, bos=""):
    """A short chat template: bos, then start + role + newline, parts, end for each message."""
    return (
        f"{bos}{{% for message in messages %}}{start.format(role='{{ message.role }}')}{{{{ '\\n' }}}}"
        "{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        f"{{% endfor %}}{end}{{{{ '\\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start.format(role='assistant')}{{{{ '\\n' }}}}{{% endif %}}"
    )


QWEN_TEMPLATE = turns("<|im_start|>{role}", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>")


def tokenizer_with(special_tokens, **named):
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(extra_special_tokens=[*special_tokens, *named.values()])
    tokenizer = blank.train_new_from_iterator([WORDS] * 3, 400, show_progress=False)
    # Kept in tokenizer_config.json, so that the tokenizer has them as attributes when it is loaded again.
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    tokenizer.padding_side = "left"
    return tokenizer


def rounded_vocabulary(tokenizer):
    return 64 * math.ceil(len(tokenizer) / 64)


def llama_sizes(tokenizer, layers=2):
    return {
        "vocab_size": rounded_vocabulary(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.1,
    }  # fmt: skip


def qwen_ids(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip


def qwen_processor(processor_class, tokenizer, patch_size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from sda_fast.lvlm.processor import without_video

    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112, patch_size=patch_size)
    return without_video(processor_class)(images, tokenizer, chat_template=QWEN_TEMPLATE)


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = tokenizer_with(QWEN_TOKENS)
    text = llama_sizes(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    }
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config), qwen_processor(Qwen2VLProcessor, tokenizer, 14)


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = tokenizer_with(QWEN_TOKENS)
    text = llama_sizes(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    }
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config), qwen_processor(Qwen2_5_VLProcessor, tokenizer, 14)


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    tokenizer = tokenizer_with(QWEN_TOKENS)
    text = llama_sizes(tokenizer, layers=3) | {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config), qwen_processor(Qwen3VLProcessor, tokenizer, 16)


def mllama():
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    tokenizer = tokenizer_with([*tokens, "<|begin_of_text|>"], image_token="<|image|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    text = llama_sizes(tokenizer, layers=4) | {
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 56, "patch_size": 14, "max_num_tiles": 2, "vision_output_dim": 128,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=tokenizer.image_token_id)
    images = MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=2)
    template = turns("<|start_header_id|>{role}<|end_header_id|>", "<|image|>", "<|eot_id|>", "<|begin_of_text|>")
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        # Gates are zero at first, and would hide the image.
        if "gate" in name and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.7)
    return model, MllamaProcessor(images, tokenizer, chat_template=template)


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tokenizer_with(
        ["<start_of_turn>", "<end_of_turn>", "<bos>"],
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    tokenizer.bos_token = "<bos>"
    text = llama_sizes(tokenizer, layers=3) | {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    template = turns("<start_of_turn>{role}", "<start_of_image>", "<end_of_turn>", "<bos>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    model = Gemma3ForConditionalGeneration(config)
    # Zero at first, which would hide the image.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model, processor


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tokenizer_with(["<|user|>"], image_token="<image>")
    text = llama_sizes(tokenizer) | {"model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 64,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.image_token_id, image_seq_length=16
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    template = turns("<|user|>{role}", "<image>", "")
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


FAMILIES = {builder.__name__: builder for builder in (qwen2_vl, qwen2_5_vl, qwen3_vl, mllama, gemma3, llava)}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """Makes, once, the folder of a tiny random model of the named model type."""
    folders: dict[str, Path] = {}

    def make(model_type):
        if model_type not in folders:
            folder = tmp_path_factory.mktemp(model_type)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, processor = FAMILIES[model_type]()
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            folders[model_type] = folder
        return folders[model_type]

    return make


@pytest.fixture(scope="session")
def loaded(family_folder):
    """Loads, once, a tiny model: loaded(model_type, quantization)."""
    from sda_fast.lvlm.load import load_lvlm

    models: dict[tuple[str, str], object] = {}

    def load(model_type, quantization="none"):
        key = (model_type, quantization)
        if key not in models:
            models[key] = load_lvlm(
                family_folder(model_type), quantization=quantization, dtype=torch.float32, device="cpu"
            )
        return models[key]

    return load


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Five items with pictures of different sizes and texts of different lengths; the last has neither."""
    from sda_fast.data.items import Item

    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, size in enumerate([(60, 60), (112, 56), (56, 140), (30, 30)]):
        path = folder / f"{number}.png"
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (*size[::-1], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        made.append(Item(f"i{number}", {"title": "vivid bottle " * (number + 1), "price": number}, path))
    return [*made, Item("bare", {}, None)]


@pytest.fixture(scope="session")
def catalogue(items):
    from sda_fast.data.items import Catalogue

    return Catalogue(items)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny Qwen2.5-VL pre-trained for a few steps on a small synthetic catalogue, with that catalogue."""
    from sda_fast.data.items import read_items
    from sda_fast.data.synthetic import generate_catalogue
    from sda_fast.lvlm.tiny import build_tiny_lvlm

    folder = tmp_path_factory.mktemp("tiny")
    paths = generate_catalogue(folder / "catalogue", num_items=60, num_users=1, image_side=56)
    small = read_items(paths.items)
    small = type(small)(small.items[:16])
    model = build_tiny_lvlm(
        small, folder / "model", pretrain_steps=12, batch_size=8, hidden_size=64, num_layers=2, image_side=56,
        vocab_size=400,
    )  # fmt: skip
    return SimpleNamespace(folder=model, catalogue=small)
