"""The demo: a generated catalogue whose right answer is known, a small model, every job, one report."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from sda_fast.arguments import setting
from sda_fast.atomic import write_json_atomic
from sda_fast.data.synthetic import SyntheticPaths, generate_catalogue
from sda_fast.pipeline import PipelineConfig, StageClock, run_pipeline

logger = logging.getLogger(__name__)

IMAGE_SIDE = 84
"""The small model is pre-trained on pictures of this size."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults end within ten minutes on two CPU cores."""

    output: Path = setting(Path("runs/demo"), "folder for everything; a second start continues there")
    num_items: int = setting(600, "items of the generated catalogue")
    num_users: int = setting(1500, "simulated users")
    pretrain_steps: int = setting(300, "captioning steps of the small model")
    steps: int = setting(160, "fine-tuning steps of each method")
    batch_size: int = setting(32, "items per fine-tuning step")
    learning_rate: float = setting(2e-4, "of fine-tuning")
    recommenders: tuple[str, ...] = setting(("sasrec", "vbpr"), "which of sasrec, bert4rec, gru4rec, vbpr to train")
    recommend_epochs: int = setting(30, "most epochs of a sequence model")
    seeds: tuple[int, ...] = setting((0, 1, 2), "one run of every recommender per seed")
    seed: int = setting(0, "of the catalogue, the model and fine-tuning")
    progress: bool = setting(True, "show progress bars")


def run_demo(config: DemoConfig) -> Path:
    """Generate the catalogue and run all jobs on it; returns the report's path.

    Raises:
        ValueError: the folder holds a catalogue of another size or seed.
    """
    output = Path(config.output)
    data = output / "data"
    with StageClock(output / "timings.json").measure("generate the catalogue"):
        paths = _catalogue(config, data)
    return run_pipeline(
        PipelineConfig(
            items=paths.items,
            interactions=paths.interactions,
            output=output,
            name="synthetic demo catalogue",
            synthetic=True,
            truth=paths.truth,
            pretrain_steps=config.pretrain_steps,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            max_pixels=IMAGE_SIDE * IMAGE_SIDE,
            gradient_checkpointing=False,
            pca_dim=64,
            embedding_dim=64,
            adapter_hidden=256,
            evaluate_every=2,
            patience=3,
            recommenders=config.recommenders,
            recommend_epochs=config.recommend_epochs,
            seeds=config.seeds,
            seed=config.seed,
            progress=config.progress,
        )
    )


def _catalogue(config: DemoConfig, data: Path) -> SyntheticPaths:
    wanted = {"num_items": config.num_items, "num_users": config.num_users, "seed": config.seed}
    made = data / "made_with.json"
    if made.is_file():
        found = json.loads(made.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(f"{data} was made with {found}, now {wanted} is asked for; choose another output folder")
        return SyntheticPaths.in_folder(data)
    paths = generate_catalogue(data, num_items=config.num_items, num_users=config.num_users, seed=config.seed)
    write_json_atomic(made, wanted)
    return paths
