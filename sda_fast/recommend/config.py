"""What the job `recommend` needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sda_fast.presets import Presets

RECOMMENDERS = ("sasrec", "bert4rec", "gru4rec", "vbpr")
BASELINES = ("random", "popularity", "transition")
PUBLISHED: Mapping[str, Any] = {
    "vector_part": "vectors",
    "recommenders": RECOMMENDERS,
    "id_only": True,
    "embedding_dim": 128,
    "adapter_hidden": 768,
    "loss": "bce",
    "alignment_weight": 1.0,
    "alignment_temperature": 2.0,
    "alignment_over": "positions",
    "sampled_negatives": 100,
}
ID_ONLY = "ID only"
BASELINE = "baseline"


@dataclass
class RecommendConfig:
    """Settings of `recommend`.

    Raises:
        ValueError: on construction, if a field has a value that no path supports.
    """

    presets: ClassVar[Presets] = {"published": PUBLISHED}

    interactions: Path = field(metadata={"help": "table with user, item and timestamp (.tsv or .csv, also .gz)"})
    output: Path = field(metadata={"help": "folder for results.json and the single runs"})
    items: Path | None = field(
        default=None, metadata={"help": "items (JSON lines); interactions with other items are then left out"}
    )
    preset: Literal["published"] | None = field(
        default=None, metadata={"help": "start from the published settings; differences are logged"}
    )
    vectors: dict[str, Path] = field(
        default_factory=dict, metadata={"help": "method name = table of item vectors written by `embed`; any number"}
    )
    vector_part: str = field(
        default="vectors", metadata={"help": "which tensor of the tables to use: vectors, image or text"}
    )
    recommenders: tuple[str, ...] = field(
        default=("sasrec",), metadata={"help": f"which of {', '.join(RECOMMENDERS)} to train"}
    )
    baselines: tuple[str, ...] = field(default=BASELINES, metadata={"help": f"which of {', '.join(BASELINES)} to add"})
    id_only: bool = field(default=True, metadata={"help": "also train every recommender without item vectors"})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "one run of every recommender per seed"})
    split_seed: int = field(
        default=0, metadata={"help": "seed for timestamp ties and sampled negatives; the same for all runs"}
    )
    sampled_negatives: int = field(default=100, metadata={"help": "fixed negatives per user of the sampled protocol"})
    embedding_dim: int = field(default=128, metadata={"help": "width of item embeddings and hidden states"})
    adapter_hidden: int = field(
        default=768, metadata={"help": "hidden width of the adapter between table and item embedding"}
    )
    adapter_activation: str = field(
        default="gelu", metadata={"help": "between the adapter's two layers: gelu, relu or none"}
    )
    max_length: int = field(default=50, metadata={"help": "most recent items of a user that a sequence model sees"})
    num_blocks: int = field(default=2, metadata={"help": "blocks of SASRec and BERT4Rec, layers of GRU4Rec"})
    num_heads: int = field(default=2, metadata={"help": "attention heads of SASRec and BERT4Rec"})
    dropout: float = field(default=0.2, metadata={"help": "dropout inside the sequence models"})
    mask_probability: float = field(default=0.2, metadata={"help": "share of items that BERT4Rec masks in training"})
    loss: str = field(
        default="ce",
        metadata={"help": "ce (softmax over sampled items) or bce (one negative per position, as published)"},
    )
    num_negatives: int = field(
        default=1024, metadata={"help": "items sampled per batch for the loss ce; 0 for all items"}
    )
    epochs: int = field(
        default=60, metadata={"help": "most epochs of a sequence model; the best one on validation is kept"}
    )
    patience: int = field(
        default=6, metadata={"help": "evaluations on validation without a gain after which training ends"}
    )
    evaluate_every: int = field(default=1, metadata={"help": "epochs between evaluations on validation"})
    validation_users: int = field(
        default=5000, metadata={"help": "users (drawn once, by split_seed) of those evaluations; 0 for all"}
    )
    batch_positions: int = field(default=2048, metadata={"help": "sequence positions of a training batch"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of Adam"})
    weight_decay: float = field(default=0.0, metadata={"help": "of Adam, decoupled"})
    alignment_weight: float = field(
        default=0.0, metadata={"help": "weight of the CMSA loss between adapter output and ID embeddings; 0 is off"}
    )
    alignment_temperature: float = field(default=2.0, metadata={"help": "temperature of that loss"})
    alignment_over: str = field(
        default="items", metadata={"help": "items: the batch's distinct items; positions: all non-padding positions"}
    )
    factor_dim: int = field(
        default=64, metadata={"help": "factors of VBPR and of BPR, its version without item vectors"}
    )
    factor_epochs: int = field(default=30, metadata={"help": "epochs of VBPR and BPR"})
    factor_learning_rate: float = field(
        default=0.005, metadata={"help": "learning rate of VBPR and, ten times as large, of BPR"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    progress: bool = field(default=True, metadata={"help": "show a progress bar"})
    dataset_name: str = field(default="", metadata={"help": "name of the data set in results and report"})

    def __post_init__(self) -> None:
        self.interactions, self.output = Path(self.interactions), Path(self.output)
        self.items = None if self.items is None else Path(self.items)
        self.vectors = {name: Path(path) for name, path in self.vectors.items()}
        for name in ("recommenders", "baselines", "seeds"):
            setattr(self, name, tuple(getattr(self, name)))
        _require_subset("recommenders", self.recommenders, RECOMMENDERS)
        _require_subset("baselines", self.baselines, BASELINES)
        _require_subset("loss", (self.loss,), ("ce", "bce"))
        _require_subset("alignment_over", (self.alignment_over,), ("items", "positions"))
        _require_subset("adapter_activation", (self.adapter_activation,), ("gelu", "relu", "none"))
        _require_subset("vector_part", (self.vector_part,), ("vectors", "image", "text"))
        _require_subset("device", (self.device,), ("auto", "cpu", "cuda"))
        for name in ("embedding_dim", "adapter_hidden", "max_length", "epochs", "batch_positions", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"embedding_dim {self.embedding_dim} is not a multiple of num_heads {self.num_heads}")
        if not self.seeds:
            raise ValueError("seeds is empty, expected at least one seed")
        if not (self.baselines or (self.recommenders and (self.id_only or self.vectors))):
            raise ValueError("nothing to do: no baselines, and no recommenders with or without vectors")
        for name in self.vectors:
            if name in (ID_ONLY, BASELINE):
                raise ValueError(f"the name {name!r} is taken, call the vectors otherwise")
        if self.alignment_weight and not self.id_only:
            raise ValueError("alignment_weight needs id_only=True: it aligns to the recommender without item vectors")

    def as_json(self) -> dict[str, Any]:
        """The settings with paths as strings."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _require_subset(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: unknown {value!r}, expected one of {', '.join(known)}")
