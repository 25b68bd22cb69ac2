"""What the model is shown of an item: its picture with one instruction line, or its attributes as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sda_fast.data.items import Item, has_text


@dataclass(frozen=True)
class PromptConfig:
    """How items become chat messages (DESIGN.md section 2).

    Attributes:
        image_instruction: the line after the picture in the image sequence.
        fields: attributes to write, in this order; None: all, in the order of the item.
        field_format: one attribute, with {name} and {value}.
        separator: between attributes.
        max_text_tokens: longer attribute texts are cut there; None: never.
        generation_prompt: end both sequences with the template's opening of the assistant's turn.
        pool_template: whether the vectors average over the chat template's own tokens too, as published.
    """

    image_instruction: str = "Describe the item in this picture."
    fields: Sequence[str] | None = None
    field_format: str = "{name}: {value}"
    separator: str = "\n"
    max_text_tokens: int | None = 512
    generation_prompt: bool = True
    pool_template: bool = True

    def __post_init__(self) -> None:
        if "{value}" not in self.field_format:
            raise ValueError(f"field_format must contain {{value}}, got {self.field_format!r}")
        if self.max_text_tokens is not None and self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1 or None, got {self.max_text_tokens}")


def attribute_text(item: Item, config: PromptConfig | None = None) -> str:
    """The item's attributes in one string; attributes that hold no text are left out, so it may be empty."""
    config = config or PromptConfig()
    names = item.attributes.keys() if config.fields is None else config.fields
    parts = [(name, item.attributes[name]) for name in names if has_text(item.attributes.get(name))]
    return config.separator.join(_attribute_line(config.field_format, name, value_text(value)) for name, value in parts)


def _attribute_line(field_format: str, name: str, value: str) -> str:
    words = {"{name}": name, "{value}": value}
    return re.sub(r"\{name\}|\{value\}", lambda match: words[match.group()], field_format)


def value_text(value: object) -> str:
    """A JSON value as a person would write it: lists joined by commas, objects as "key value", empty parts left out."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(part)}" for key, part in value.items() if has_text(part))
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(part) for part in value if has_text(part))
    return " ".join(str(value).split())


def image_messages(instruction: str) -> list[dict[str, Any]]:
    """The chat of the image sequence: one user turn with the picture's place and the instruction line."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]


def text_messages(text: str) -> list[dict[str, Any]]:
    """The chat of the text sequence: one user turn with the attribute text."""
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]
