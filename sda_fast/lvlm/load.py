"""Loading a vision-language model: decoder in 4-bit NF4, vision tower and projector in 16-bit, no language head."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sda_fast.lvlm.family import Family, family_of, known_model_types
from sda_fast.lvlm.processor import load_processor

logger = logging.getLogger(__name__)


@dataclass
class LVLM:
    """A loaded model with its processor and what is known of its family.

    Attributes:
        model: the transformers model, frozen and in evaluation mode.
        processor: its image processor and tokenizer, padding on the left.
        family: how to call it.
        name: the hub id or path it was loaded from.
    """

    model: Any
    processor: Any
    family: Family
    name: str

    @property
    def language_model(self) -> Any:
        """The decoder, a submodule of `model`."""
        return self.family.decoder(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def hidden_size(self) -> int:
        """D, the length of an item's vectors."""
        return self.language_model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the decoder is; the tower may wait in main memory (sda_fast.lvlm.tower)."""
        return next(self.language_model.parameters()).device


def load_lvlm(
    name_or_path: str | Path,
    *,
    quantization: str = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    lm_head: bool = False,
    attention: str | None = None,
    progress: bool = True,
) -> LVLM:
    """Load a model from a folder or the Hugging Face hub.

    Args:
        name_or_path: e.g. "Qwen/Qwen2.5-VL-7B-Instruct", or a folder written by `save_pretrained`.
        quantization: "nf4" puts the decoder's linears into 4 bits (bitsandbytes, blocks of 64); "none" none.
        double_quant: store the NF4 block scales in 8 bits too.
        dtype: of everything that is not quantised, and of the 4-bit products.
        device: default: the first GPU if there is one, else the CPU.
        lm_head: load the language head as well; item vectors do not need it.
        attention: transformers' `attn_implementation` ("sdpa", "eager", "flash_attention_2"); None: its default.
        progress: show transformers' bar while weights are read.

    Raises:
        FileNotFoundError: no such folder or hub model, or a file of it is missing.
        ValueError: unknown model type (the message lists the known ones) or quantization.
        RuntimeError: weights are missing; something outside the decoder was quantised, or nothing inside it.
    """
    from transformers import AutoModel, AutoModelForImageTextToText

    if quantization not in ("nf4", "none"):
        raise ValueError(f'quantization must be "nf4" or "none", got {quantization!r}')
    config = read_config(name_or_path)
    family = family_of(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(device)}}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantization == "nf4":
        options["quantization_config"] = nf4_config(family, dtype=dtype, double_quant=double_quant)
    auto_class = AutoModelForImageTextToText if lm_head else AutoModel
    try:
        model = _load_model(auto_class, name_or_path, options, progress)
        processor = load_processor(name_or_path, config)
    except OSError as error:
        raise FileNotFoundError(f"{name_or_path} lacks a file of the model: {error}") from error
    if not processor.tokenizer("a", add_special_tokens=False)["input_ids"]:
        # transformers makes a tokenizer of special tokens only where the vocabulary is missing.
        raise FileNotFoundError(f"{name_or_path} lacks a file of the model: its tokenizer has no vocabulary")
    model.eval().requires_grad_(False)
    if quantization == "nf4":
        check_quantized(model, family)
        if dtype == torch.float32:
            keep_float32(model)
    return LVLM(model, processor, family, str(name_or_path))


@contextlib.contextmanager
def transformers_bars(shown: bool) -> Iterator[None]:
    """Inside, transformers draws its progress bars only if `shown`."""
    from transformers.utils import logging as transformers_logging

    drawn = transformers_logging.is_progress_bar_enabled()
    if drawn and not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def _load_model(auto_class: Any, name_or_path: str | Path, options: dict[str, Any], progress: bool) -> Any:
    """`from_pretrained`, with weights that are missing an error and with silence about the language head."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with transformers_bars(progress):
            model, report = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise RuntimeError(f"{name_or_path} lacks the weights {_some(report['missing_keys'])}")
    unexpected = [name for name in report["unexpected_keys"] if "lm_head." not in name]
    if unexpected:
        logger.warning("%s holds weights that the model has no place for: %s", name_or_path, _some(unexpected))
    return model


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def read_config(name_or_path: str | Path) -> Any:
    """The transformers configuration of a model.

    Raises:
        FileNotFoundError: no such folder or hub model.
        ValueError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
        raise FileNotFoundError(f"the folder {name_or_path} holds no model: config.json is missing")
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        raise FileNotFoundError(
            f"{name_or_path!s} is neither a folder with a model nor a hub model that can be reached: {error}"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"transformers does not know the model type of {name_or_path!s}; sda-fast knows "
            f"{', '.join(known_model_types())}"
        ) from error


def nf4_config(family: Family, *, dtype: torch.dtype, double_quant: bool = True) -> Any:
    """The BitsAndBytesConfig that quantises the family's decoder and leaves the rest in `dtype`.

    transformers matches a skipped name from the start of a module's full name ("visual" does not match
    "model.visual.blocks.0") and drops its own default, the language head, as soon as names are given.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(family.not_quantized),
    )


def quantized_linears(model: nn.Module) -> list[str]:
    """Names of the linears whose weight is really in 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def is_packed(module: nn.Module) -> bool:
        return isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit) and module.weight.bnb_quantized

    return [name for name, module in model.named_modules() if is_packed(module)]


def keep_float32(model: nn.Module) -> None:
    """Let float32 rows be multiplied in float32.

    On CPUs with bfloat16 instructions bitsandbytes' own layers would round them to bfloat16 in evaluation, and repack
    the weight in place, which loses nested statistics.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantized(model: nn.Module, family: Family) -> None:
    """Raise RuntimeError unless the 4-bit linears are the decoder's linears, all of them and no others."""
    decoder_modules = {id(module) for module in family.decoder(model).modules()}
    quantized = set(quantized_linears(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name in quantized) != (id(module) in decoder_modules):
            state = "was" if name in quantized else "was not"
            raise RuntimeError(f"{name} {state} put into 4 bits; the {family.name} family quantises only its decoder")
