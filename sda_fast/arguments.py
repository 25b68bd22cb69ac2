"""Command-line arguments from a configuration dataclass: one option per field, its help from the field's metadata."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sda_fast.presets import with_preset


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text of its command-line option; lists and dicts are copied."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one `--field-name` option per field of the dataclass `config_class`; fields without a default are required.

    Understood annotations: str, Path, int, float, bool (`--x` / `--no-x`), Literal, unions of these with None,
    lists and tuples of them (several words), and dict[str, T] (`NAME=VALUE` words).
    """
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.init or field.metadata.get("hidden"):
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options: dict[str, Any] = {"dest": field.name, "help": _help_text(field, required)}
        if required:
            options["required"] = True
        else:
            options["default"] = argparse.SUPPRESS
        options.update(_options_for(hints[field.name]))
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def config_from_arguments(config_class: type, arguments: argparse.Namespace) -> Any:
    """Build the dataclass from the parsed options; those not given are the preset's, if one is, or the defaults."""
    given = vars(arguments)
    values = {field.name: given[field.name] for field in dataclasses.fields(config_class) if field.name in given}
    for name, hint in get_type_hints(config_class).items():
        if name in values and get_origin(hint) is tuple:
            values[name] = tuple(values[name])
        elif name in values and isinstance(values[name], _Pairs):
            values[name] = dict(values[name])
    return with_preset(config_class, values.pop("preset", None), **values)


def _help_text(field: dataclasses.Field[Any], required: bool) -> str:
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    if required:
        return text
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"{text} (default: {default})" if default not in (None, "", (), [], {}) else text


class _Pairs(list[tuple[str, Any]]):
    """NAME=VALUE words of one option, in order."""


class _AppendPairs(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        collected = _Pairs(getattr(namespace, self.dest, None) or ())
        collected.extend(values)
        setattr(namespace, self.dest, collected)


def _options_for(hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        containers = [member for member in members if get_origin(member) in (list, tuple, dict, Sequence)]
        if containers:
            return _options_for(containers[0])
        if len(members) == 1:
            return _options_for(members[0])
        return {"type": _first_that_parses([_word_parser(member) for member in members]), "metavar": "VALUE"}
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return {"nargs": "+", "type": _word_parser(get_args(hint)[0]), "metavar": "VALUE"}
    if origin is dict:
        return {
            "nargs": "+",
            "action": _AppendPairs,
            "type": _pair_parser(_word_parser(get_args(hint)[1])),
            "metavar": "NAME=VALUE",
        }
    if origin is Literal:
        choices = get_args(hint)
        if all(isinstance(choice, str) for choice in choices):
            return {"choices": list(choices)}
        return {"type": _word_parser(hint), "metavar": "{" + ",".join(map(str, choices)) + "}"}
    return {"type": _word_parser(hint), "metavar": "PATH" if hint is Path else "VALUE"}


def _word_parser(hint: Any) -> Callable[[str], Any]:
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}

        def parse_choice(word: str) -> Any:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {word!r}")
            return choices[word]

        return parse_choice
    if hint in (str, int, float, Path):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        return _first_that_parses([_word_parser(member) for member in get_args(hint) if member is not type(None)])
    raise TypeError(f"no command-line form for a field of type {hint!r}")


def _first_that_parses(parsers: list[Callable[[str], Any]]) -> Callable[[str], Any]:
    strict_first = sorted(parsers, key=lambda parser: parser is str)

    def parse(word: str) -> Any:
        for parser in strict_first:
            try:
                return parser(word)
            except (ValueError, argparse.ArgumentTypeError):
                continue
        raise argparse.ArgumentTypeError(f"cannot read {word!r}")

    return parse


def _pair_parser(parse_value: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def parse(word: str) -> tuple[str, Any]:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {word!r}")
        return name, parse_value(value)

    return parse
