"""sda-fast: SDA (CMSA + MoDA, arXiv 2512.06883) for vision-language models, fast and small."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF_NAME = {
    "moda_linear": "sda_fast.ops.moda_linear",
    "MoDALinear": "sda_fast.moda.linear",
    "MoDAConfig": "sda_fast.moda.config",
    "modality": "sda_fast.moda.context",
    "adapt_model": "sda_fast.moda.inject",
    "save_adapter": "sda_fast.moda.save",
    "load_adapter": "sda_fast.moda.save",
    "cmsa_loss": "sda_fast.ops.cmsa",
    "infonce_loss": "sda_fast.ops.cmsa",
    "CMSALoss": "sda_fast.losses.modules",
    "InfoNCELoss": "sda_fast.losses.modules",
    "cached_contrastive_step": "sda_fast.losses.cached",
    "CachedContrastiveStep": "sda_fast.losses.chunking",
    "gather_embeddings": "sda_fast.losses.distributed",
    "sharded_cmsa_loss": "sda_fast.losses.distributed",
    "sum_gradients": "sda_fast.losses.distributed",
}

__all__ = [
    "CMSALoss",
    "CachedContrastiveStep",
    "InfoNCELoss",
    "MoDAConfig",
    "MoDALinear",
    "__version__",
    "adapt_model",
    "cached_contrastive_step",
    "cmsa_loss",
    "gather_embeddings",
    "infonce_loss",
    "load_adapter",
    "moda_linear",
    "modality",
    "save_adapter",
    "sharded_cmsa_loss",
    "sum_gradients",
]

if TYPE_CHECKING:
    from sda_fast.losses.cached import cached_contrastive_step
    from sda_fast.losses.chunking import CachedContrastiveStep
    from sda_fast.losses.distributed import gather_embeddings, sharded_cmsa_loss, sum_gradients
    from sda_fast.losses.modules import CMSALoss, InfoNCELoss
    from sda_fast.moda.config import MoDAConfig
    from sda_fast.moda.context import modality
    from sda_fast.moda.inject import adapt_model
    from sda_fast.moda.linear import MoDALinear
    from sda_fast.moda.save import load_adapter, save_adapter
    from sda_fast.ops.cmsa import cmsa_loss, infonce_loss
    from sda_fast.ops.moda_linear import moda_linear


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module 'sda_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
