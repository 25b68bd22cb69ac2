"""The whole way in one call: a catalogue and its interactions in, item vectors and a recommendation table out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sda_fast.arguments import setting
from sda_fast.atomic import write_json_atomic
from sda_fast.data.items import read_items
from sda_fast.embed import EmbedConfig, embed
from sda_fast.jobs.train_config import CHECKPOINTED_LAYERS_HELP, COMPILE_HELP, TOWER_CACHE_GIB_HELP, TOWER_CACHE_HELP
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.lvlm.tiny import build_tiny_lvlm
from sda_fast.presets import Presets, log_differences, with_preset
from sda_fast.recommend import RecommendConfig, recommend
from sda_fast.report import ReportConfig, write_report
from sda_fast.train import FinetuneConfig, finetune

logger = logging.getLogger(__name__)

ZERO_SHOT = "zero-shot"
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    ZERO_SHOT: None,
    "LoRA + InfoNCE": {"adapter": "lora", "loss": "infonce"},
    "LoRA + CMSA": {"adapter": "lora", "loss": "cmsa"},
    "MoDA + InfoNCE": {"adapter": "moda", "loss": "infonce"},
    "SDA": {"adapter": "moda", "loss": "cmsa"},
}
PUBLISHED: Mapping[str, Any] = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "steps": 4000,
    "batch_size": 32,
    "learning_rate": 2e-4,
    "lora_dropout": 0.1,
    "max_pixels": 256 * 256,
    "gradient_checkpointing": True,
    "pca_dim": 768,
    "recommenders": ("sasrec", "bert4rec", "gru4rec", "vbpr"),
    "embedding_dim": 128,
    "adapter_hidden": 768,
}


@dataclass(frozen=True)
class PipelineConfig:
    """One run of all jobs over one catalogue.

    Raises:
        ValueError: a method is unknown.
    """

    presets: ClassVar[Presets] = {"published": PUBLISHED}

    items: Path = field(metadata={"help": "catalogue: JSON lines, .jsonl or .jsonl.gz"})
    interactions: Path = field(metadata={"help": "table with user, item and timestamp (.tsv or .csv, also .gz)"})
    output: Path = field(metadata={"help": "folder for everything the run makes; a second start continues there"})
    images: Path | None = setting(None, "folder that image paths start from; default: the catalogue's")
    preset: Literal["published"] | None = setting(
        None, "start every job from the published settings, and from Qwen2.5-VL-7B; differences are logged"
    )
    name: str = setting("", "name of the data set in the report")
    synthetic: bool = setting(False, "the data are generated; the report says so")
    truth: Path | None = setting(None, "table of the true factors of a generated catalogue, shown as 'oracle'")
    model: str | None = setting(
        None, "model folder or hub name; default: a small Qwen2.5-VL built and pre-trained on this catalogue"
    )
    pretrain_steps: int = setting(300, "captioning steps of the small model, where it is built")
    quantization: Literal["nf4", "none"] = setting("nf4", "how the language model's frozen weights are held")
    methods: tuple[str, ...] = setting(
        (ZERO_SHOT, "LoRA + InfoNCE", "SDA"), f"ways to item vectors, among: {'; '.join(METHODS)}"
    )
    steps: int = setting(4000, "fine-tuning steps of each method")
    batch_size: int = setting(32, "items per fine-tuning step")
    learning_rate: float = setting(2e-4, "of fine-tuning")
    lora_dropout: float = setting(0.1, "dropout on the adapters' input")
    fields: list[str] | None = setting(None, "attribute fields that make the text, in order; default: all")
    max_pixels: int = setting(256 * 256, "larger images are reduced to this area")
    gradient_checkpointing: bool = setting(True, "recompute activations in backward; saves memory, costs a forward")
    checkpointed_layers: int | Literal["auto"] | None = setting(None, CHECKPOINTED_LAYERS_HELP)
    compile: bool = setting(False, COMPILE_HELP)
    pca_dim: int = setting(768, "components kept per modality")
    recommenders: tuple[str, ...] = setting(
        ("sasrec", "bert4rec", "gru4rec", "vbpr"), "which of sasrec, bert4rec, gru4rec, vbpr to train"
    )
    recommend_epochs: int = setting(60, "most epochs of a sequence model")
    embedding_dim: int = setting(128, "width of the recommenders' item embeddings")
    adapter_hidden: int = setting(768, "hidden width of the recommenders' adapter over the item vectors")
    evaluate_every: int = setting(1, "epochs between evaluations on validation")
    patience: int = setting(6, "evaluations on validation without a gain after which training ends")
    seeds: tuple[int, ...] = setting((0, 1, 2), "one run of every recommender per seed")
    seed: int = setting(0, "of the small model, fine-tuning and noise images")
    tower_cache: Literal["auto", "none"] | Path = setting(
        "auto", f"{TOWER_CACHE_HELP}; all methods share it, auto is the folder tower-cache in the output"
    )
    tower_cache_gib: float = setting(20.0, TOWER_CACHE_GIB_HELP)
    device: str | None = setting(None, "cpu, cuda or cuda:1; default: a GPU where there is one")
    progress: bool = setting(True, "show progress bars")

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}, expected some of {', '.join(METHODS)}")

    def tower_cache_folder(self) -> Literal["none"] | Path:
        """Where all methods keep what the vision tower makes of the pictures."""
        if self.tower_cache == "none":
            return "none"
        return Path(self.output) / "tower-cache" if self.tower_cache == "auto" else Path(self.tower_cache)


def run_pipeline(config: PipelineConfig) -> Path:
    """Build or take a model, fine-tune by every method, embed, recommend, report; returns the report's path.

    Every job keeps what it has finished, so a run that was stopped continues where it was when it is started again.
    Seconds per stage are added up in `timings.json`.

    Raises:
        ValueError: a setting does not fit; each job names what it expected.
        sda_fast.data.errors.DataError: the inputs are faulty; file and line are named.
    """
    log_differences(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    stages = StageClock(output / "timings.json")
    model = config.model if config.model is not None else str(_small_model(config, output, stages))
    logs: dict[str, Path] = {}
    tables: dict[str, Path] = {}
    for method in config.methods:
        folder = output / method.replace(" + ", "-").lower()
        adapter = None
        if METHODS[method] is not None:
            with stages.measure(f"fine-tune {method}"):
                result = finetune(_finetune_config(config, model, method, folder))
            adapter, logs[method] = result.adapter, result.log
        with stages.measure(f"embed {method}"):
            tables[method] = embed(_embed_config(config, model, adapter, folder / "vectors.safetensors"))
    candidates = {**tables, **({"oracle": config.truth} if config.truth else {})}
    with stages.measure("recommend"):
        recommend(_recommend_config(config, candidates, output / "recommend"))
    return write_report(
        ReportConfig(
            output=output / "report",
            results=output / "recommend" / "results.json",
            vectors=tables,
            logs=logs,
            items=config.items,
            images=config.images,
            timings=output / "timings.json",
            title=config.name or Path(config.items).parent.name,
            synthetic=config.synthetic,
        )
    )


def _small_model(config: PipelineConfig, output: Path, stages: StageClock) -> Path:
    folder = output / "model"
    if not (folder / "config.json").is_file():
        with stages.measure("build and pre-train the small model"):
            build_tiny_lvlm(
                read_items(config.items, config.images),
                folder,
                seed=config.seed,
                pretrain_steps=config.pretrain_steps,
                prompts=PromptConfig(fields=config.fields),
            )
    return folder


def _finetune_config(config: PipelineConfig, model: str, method: str, folder: Path) -> FinetuneConfig:
    return with_preset(
        FinetuneConfig,
        config.preset,
        model=model,
        items=config.items,
        images=config.images,
        output=folder,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lora_dropout=config.lora_dropout,
        fields=config.fields,
        max_pixels=config.max_pixels,
        gradient_checkpointing=config.gradient_checkpointing,
        checkpointed_layers=config.checkpointed_layers,
        compile=config.compile,
        quantization=config.quantization,
        seed=config.seed,
        tower_cache=config.tower_cache_folder(),
        tower_cache_gib=config.tower_cache_gib,
        device=config.device,
        progress=config.progress,
        **(METHODS[method] or {}),
    )


def _embed_config(config: PipelineConfig, model: str, adapter: Path | None, table: Path) -> EmbedConfig:
    return with_preset(
        EmbedConfig,
        config.preset,
        model=model,
        items=config.items,
        images=config.images,
        output=table,
        adapter=adapter,
        pca_dim=config.pca_dim,
        quantization=config.quantization,
        fields=config.fields,
        max_pixels=config.max_pixels,
        seed=config.seed,
        tower_cache=config.tower_cache_folder(),
        tower_cache_gib=config.tower_cache_gib,
        device=config.device,
        progress=config.progress,
    )


def _recommend_config(config: PipelineConfig, tables: dict[str, Path], folder: Path) -> RecommendConfig:
    return with_preset(
        RecommendConfig,
        config.preset,
        interactions=config.interactions,
        items=config.items,
        output=folder,
        vectors=tables,
        recommenders=config.recommenders,
        seeds=config.seeds,
        epochs=config.recommend_epochs,
        embedding_dim=config.embedding_dim,
        adapter_hidden=config.adapter_hidden,
        evaluate_every=config.evaluate_every,
        patience=config.patience,
        device="auto" if config.device is None else config.device.split(":")[0],
        progress=config.progress,
        dataset_name=config.name,
    )


class StageClock:
    """Seconds per stage, added up over interrupted runs and kept in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def measure(self, stage: str) -> _Stage:
        """A context manager that logs the stage and adds its duration."""
        return _Stage(self, stage)


class _Stage:
    def __init__(self, clock: StageClock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        logger.info("%s ...", self.name)
        self.started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self.started
        self.clock.seconds[self.name] = round(self.clock.seconds.get(self.name, 0.0) + seconds, 1)
        write_json_atomic(self.clock.path, self.clock.seconds)
        logger.info("%s: %.0f s", self.name, seconds)
