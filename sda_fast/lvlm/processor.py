"""A model's processor, also where torchvision (which transformers' video processors need) is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_processor(name_or_path: str | Path, config: Any) -> Any:
    """The processor of a model, its tokenizer padding on the left.

    Without torchvision the video half of the processor is left out; pictures and text go through the same class.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    processor_class: Any = PROCESSOR_MAPPING.get(type(config), AutoProcessor)
    if processor_class is not AutoProcessor and not is_torchvision_available():
        processor_class = without_video(processor_class)
    processor = processor_class.from_pretrained(name_or_path)
    prepare_tokenizer(processor.tokenizer)
    return processor


def prepare_tokenizer(tokenizer: Any) -> None:
    """Pad on the left, with the end token where the tokenizer names no padding token."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def without_video(processor_class: type) -> type:
    """`processor_class` if it takes no video processor, else a subclass of the same name that takes only the others."""
    if "video_processor" not in processor_class.get_attributes():  # type: ignore[attr-defined]
        return processor_class

    class ImageTextProcessor(processor_class):  # type: ignore[misc, valid-type]
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
        ) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    # save_pretrained writes the class name, which every other installation must find in transformers.
    ImageTextProcessor.__name__ = ImageTextProcessor.__qualname__ = processor_class.__name__
    return ImageTextProcessor
