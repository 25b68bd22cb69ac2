"""Presets: named settings that a job starts from; whatever is given beside the preset's name wins.

A configuration class that has presets has a field `preset`, None or the name of one, and a class attribute `presets`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

Presets = Mapping[str, Mapping[str, Any]]


def with_preset(config_class: type, preset: str | None, **given: Any) -> Any:
    """`config_class` from a preset's settings and the given ones, which win; None: the class's own defaults.

        with_preset(RecommendConfig, "published", interactions="log.tsv", output="out", seeds=(0,))

    Raises:
        ValueError: the class has no preset of that name.
    """
    presets: Presets = getattr(config_class, "presets", {})
    if preset is None:
        return config_class(**given)
    if preset not in presets:
        raise ValueError(f"{config_class.__name__} has no preset {preset!r}, expected one of {', '.join(presets)}")
    return config_class(**{**presets[preset], "preset": preset, **given})


def differences_from_preset(config: Any) -> dict[str, tuple[Any, Any]]:
    """Field name -> (the configuration's value, its preset's), for what differs; {} without a preset."""
    settings = {} if config.preset is None else config.presets[config.preset]
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in settings}
    return {name: (own[name], value) for name, value in settings.items() if own[name] != value}


def log_differences(config: Any) -> None:
    """One line for each setting that is not the preset's."""
    for name, (here, preset) in differences_from_preset(config).items():
        logger.info("%s is %s, the preset %r has %s", name, here, config.preset, preset)
