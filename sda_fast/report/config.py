"""What the job `report` needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ReportConfig:
    """Settings of `write_report`; every input is optional and its section is left out without it.

    Raises:
        ValueError: on construction, if a number is out of range.
    """

    output: Path = field(metadata={"help": "folder for report.md, report.html and the pictures"})
    title: str = field(default="", metadata={"help": "name of the data set"})
    synthetic: bool = field(default=False, metadata={"help": "the data are generated; the page then says so"})
    data_note: str = field(default="", metadata={"help": "a sentence on where the data are from"})
    results: Path | None = field(default=None, metadata={"help": "results.json of `recommend`, or its folder"})
    vectors: dict[str, Path] = field(
        default_factory=dict,
        metadata={"help": "method name = table of item vectors; the first is the one before tuning"},
    )
    logs: dict[str, Path] = field(
        default_factory=dict, metadata={"help": "method name = log.jsonl of its fine-tuning, for the loss curves"}
    )
    items: Path | None = field(default=None, metadata={"help": "items (JSON lines), for order, labels and pictures"})
    images: Path | None = field(default=None, metadata={"help": "folder of the images; default the folder of items"})
    timings: Path | None = field(default=None, metadata={"help": "JSON object: part of the work = seconds"})
    contact_sheet: bool = field(default=True, metadata={"help": "show pictures of the catalogue on the page"})
    order_by: str = field(default="", metadata={"help": "attribute that orders the heat maps; default the clearest"})
    heatmap_items: int = field(default=48, metadata={"help": "items of the heat maps"})
    retrieval_items: int = field(default=1000, metadata={"help": "most items of the retrieval test"})
    seed: int = field(default=0, metadata={"help": "of the samples of items"})

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        for name in ("results", "items", "images", "timings"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else Path(value))
        self.vectors = {name: Path(path) for name, path in self.vectors.items()}
        self.logs = {name: Path(path) for name, path in self.logs.items()}
        for name in ("heatmap_items", "retrieval_items"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
