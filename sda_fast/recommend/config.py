"""What the job `recommend` needs to know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECOMMENDERS = ("sasrec", "bert4rec", "gru4rec", "vbpr")
BASELINES = ("random", "popularity", "transition")
ID_ONLY = "ID only"
BASELINE = "baseline"


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RecommendConfig:
    """Settings of `recommend`.

    Raises:
        ValueError: on construction, if a field has a value that no path supports.
    """

    interactions: Path = field(metadata={"help": "table with user, item and timestamp (.tsv or .csv, also .gz)"})
    output: Path = field(metadata={"help": "folder for results.json and the single runs"})
    items: Path | None = _option(None, "items (JSON lines); interactions with other items are then left out")
    vectors: dict[str, Path] = _option({}, "method name = table of item vectors written by `embed`; any number")
    vector_part: str = _option("vectors", "which tensor of the tables to use: vectors, image or text")
    recommenders: tuple[str, ...] = _option(("sasrec",), f"which of {', '.join(RECOMMENDERS)} to train")
    baselines: tuple[str, ...] = _option(BASELINES, f"which of {', '.join(BASELINES)} to add")
    id_only: bool = _option(True, "also train every recommender without item vectors")
    seeds: tuple[int, ...] = _option((0, 1, 2), "one run of every recommender per seed")
    split_seed: int = _option(0, "seed for timestamp ties and sampled negatives; the same for all runs")
    sampled_negatives: int = _option(100, "fixed negatives per user of the sampled protocol")
    embedding_dim: int = _option(128, "width of item embeddings and hidden states")
    adapter_hidden: int = _option(768, "hidden width of the adapter between table and item embedding")
    adapter_activation: str = _option("gelu", "between the adapter's two layers: gelu, relu or none")
    max_length: int = _option(50, "most recent items of a user that a sequence model sees")
    num_blocks: int = _option(2, "blocks of SASRec and BERT4Rec, layers of GRU4Rec")
    num_heads: int = _option(2, "attention heads of SASRec and BERT4Rec")
    dropout: float = _option(0.2, "dropout inside the sequence models")
    mask_probability: float = _option(0.2, "share of items that BERT4Rec masks in training")
    loss: str = _option("ce", "ce (softmax over sampled items) or bce (one negative per position, as published)")
    num_negatives: int = _option(1024, "items sampled per batch for the loss ce; 0 for all items")
    epochs: int = _option(60, "most epochs of a sequence model; the best one on validation is kept")
    patience: int = _option(6, "evaluations on validation without a gain after which training ends")
    evaluate_every: int = _option(1, "epochs between evaluations on validation")
    validation_users: int = _option(5000, "users (drawn once, by split_seed) of those evaluations; 0 for all")
    batch_positions: int = _option(2048, "sequence positions of a training batch")
    learning_rate: float = _option(1e-3, "of Adam")
    weight_decay: float = _option(0.0, "of Adam, decoupled")
    alignment_weight: float = _option(0.0, "weight of the CMSA loss between adapter output and ID embeddings; 0 is off")
    alignment_temperature: float = _option(2.0, "temperature of that loss")
    alignment_over: str = _option("items", "items: the batch's distinct items; positions: all non-padding positions")
    factor_dim: int = _option(64, "factors of VBPR and of BPR, its version without item vectors")
    factor_epochs: int = _option(30, "epochs of VBPR and BPR")
    factor_learning_rate: float = _option(0.005, "learning rate of VBPR and, ten times as large, of BPR")
    device: str = _option("auto", "cpu, cuda or auto")
    progress: bool = _option(True, "show a progress bar")
    dataset_name: str = _option("", "name of the data set in results and report")

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
