"""The settings of a fine-tuning run; the defaults are the published ones (DESIGN.md section 2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from sda_fast.lvlm.packing import Packing
from sda_fast.lvlm.prompts import PromptConfig
from sda_fast.presets import Presets

if TYPE_CHECKING:
    from sda_fast.lvlm.load import LVLM

PUBLISHED_WIDTH = 768
PUBLISHED: Mapping[str, Any] = {
    "loss": "cmsa",
    "temperature": 3.0,
    "learnable_temperature": True,
    "detach_teacher": False,
    "row_normalized_targets": False,
    "normalize": False,
    "adapter": "moda",
    "r": 8,
    "num_experts": 8,
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,
    "batch_size": 32,
    "steps": 4000,
    "learning_rate": 2e-4,
    "optimizer": "adamw",
    "schedule": "constant",
    "warmup_steps": 0,
    "gradient_checkpointing": True,
    "reduce_to": "auto",
    "pool_template": True,
    "min_pixels": 20 * 20,
    "max_pixels": 256 * 256,
}

CHECKPOINTED_LAYERS_HELP = (
    "with gradient checkpointing, how many layers of the decoder, from the first on, recompute their activations; "
    "none: all, auto: as few as memory allows"
)
PACKING_HELP = (
    "sequences one after another without padding: auto where flash-attn is installed and takes the model, on also "
    "elsewhere (same result, more memory), off padded with similar lengths together"
)
COMPILE_HELP = (
    "compile the decoder's layers (torch.compile): fewer launches a step and the same result to rounding, after some "
    "minutes of compiling at the start"
)
TOWER_CACHE_HELP = (
    "folder that keeps what the frozen vision tower makes of each picture, so that it runs once per picture; a picture "
    "of 256 x 256 takes 0.58 MB for Qwen2.5-VL-7B, 52 MB for Llama-3.2-11B-Vision"
)
TOWER_CACHE_GIB_HELP = "most GiB that the tower cache may take on the disk; further pictures are not kept"
TOWER_BATCH_HELP = (
    "pictures that go through the tower at a time; default: one with a tower cache, so that what is kept depends on "
    "nothing but the picture, else as many as hold four million pixel values"
)
TOWER_OFFLOAD_HELP = "keep the tower's weights in main memory while it does not run"


def preset(name: Literal["published"], **changes: Any) -> dict[str, Any]:
    """Keyword arguments for a config: `FinetuneConfig(model=..., items=..., output=..., **preset("published"))`.

    Args:
        name: "published" (arXiv 2512.06883 with Qwen2.5-VL; its Llama run differs in `batch_size=16`).
        changes: settings that replace the preset's or are added to it.
    Raises:
        ValueError: no such preset.
    """
    if name != "published":
        raise ValueError(f"the only preset is 'published', got {name!r}")
    return {**PUBLISHED, **changes}


def _help(text: str, *, changeable: bool = False) -> dict[str, Any]:
    """A field's metadata; `changeable` ones do not alter the result and may differ when a run is resumed."""
    return {"help": text, "changeable": changeable}


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run.

    Raises:
        ValueError: a value is out of range or two settings contradict each other; the message quotes them.
    """

    # Without steps, so that epochs may be given instead; with neither it is the published number.
    presets: ClassVar[Presets] = {"published": {**PUBLISHED, "steps": None}}

    model: str = field(metadata=_help("model folder or hub name, e.g. Qwen/Qwen2.5-VL-7B-Instruct"))
    items: Path = field(metadata=_help("catalogue: JSON lines, .jsonl or .jsonl.gz", changeable=True))
    output: Path = field(metadata=_help("folder for the adapter, checkpoints and log", changeable=True))
    images: Path | None = field(
        default=None, metadata=_help("folder that image paths start from; default: the catalogue's", changeable=True)
    )
    preset: Literal["published"] | None = field(
        default=None,
        metadata=_help(
            "start from the published settings, which are also the defaults; differences are logged", changeable=True
        ),
    )

    loss: Literal["cmsa", "infonce"] = field(
        default="cmsa", metadata=_help("cmsa, or infonce for the ablation without soft targets")
    )
    temperature: float = field(default=3.0, metadata=_help("temperature at the start"))
    learnable_temperature: bool = field(default=True, metadata=_help("train the temperature"))
    detach_teacher: bool = field(default=False, metadata=_help("send no gradient through the soft targets"))
    row_normalized_targets: bool = field(
        default=False, metadata=_help("targets of the text-to-image half with rows that sum to one")
    )
    normalize: bool = field(default=False, metadata=_help("L2-normalise the vectors inside the loss"))

    adapter: Literal["moda", "lora"] = field(
        default="moda", metadata=_help("moda, or lora for the ablation with one expert and no gate")
    )
    r: int = field(default=8, metadata=_help("total rank, shared by the experts"))
    num_experts: int = field(default=8, metadata=_help("experts per layer; must divide r"))
    lora_alpha: float = field(default=32.0, metadata=_help("the update is scaled by lora_alpha / r"))
    lora_dropout: float = field(default=0.1, metadata=_help("dropout on the adapters' input"))

    batch_size: int = field(
        default=32,
        metadata=_help("items per step, over all processes; every item of a batch is a negative of the others"),
    )
    chunk_size: int | Literal["auto"] | None = field(
        default=None,
        metadata=_help("items encoded at a time; none: the whole batch at once, auto: as many as memory allows"),
    )
    steps: int | None = field(default=None, metadata=_help("steps to train; 4000 if neither steps nor epochs is given"))
    epochs: float | None = field(default=None, metadata=_help("passes over the catalogue, instead of steps"))

    learning_rate: float = field(default=2e-4, metadata=_help("learning rate after warm-up"))
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata=_help("course of the learning rate after warm-up")
    )
    warmup_steps: int = field(default=0, metadata=_help("steps over which the learning rate rises from zero"))
    weight_decay: float = field(
        default=0.01, metadata=_help("decoupled weight decay on the adapters; the temperature has none")
    )
    max_grad_norm: float | None = field(default=None, metadata=_help("clip the gradient's norm to this"))
    optimizer: Literal["adamw", "adamw8bit", "paged"] = field(
        default="adamw", metadata=_help("adamw, or bitsandbytes' 8-bit or paged 8-bit AdamW on a GPU")
    )

    quantization: Literal["nf4", "none"] = field(
        default="nf4", metadata=_help("how the language model's frozen weights are held")
    )
    double_quant: bool = field(
        default=True, metadata=_help("hold the scales of the 4-bit weights in 8 bits too (nested statistics)")
    )
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata=_help("dtype of activations: auto is bf16 on a GPU, else fp32")
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=_help("recompute activations in backward; saves memory, costs a forward")
    )
    checkpointed_layers: int | Literal["auto"] | None = field(
        default=None, metadata=_help(CHECKPOINTED_LAYERS_HELP, changeable=True)
    )
    compile: bool = field(default=False, metadata=_help(COMPILE_HELP, changeable=True))
    packing: Packing = field(default="auto", metadata=_help(PACKING_HELP))
    tower_cache: Literal["none"] | Path = field(
        default="none", metadata=_help(f"{TOWER_CACHE_HELP}; embed finds it there", changeable=True)
    )
    tower_cache_gib: float = field(default=20.0, metadata=_help(TOWER_CACHE_GIB_HELP, changeable=True))
    tower_batch: int | None = field(default=None, metadata=_help(TOWER_BATCH_HELP, changeable=True))
    tower_offload: bool = field(default=False, metadata=_help(TOWER_OFFLOAD_HELP, changeable=True))
    device: str | None = field(
        default=None, metadata=_help("cpu, cuda or cuda:1; default: a GPU where there is one", changeable=True)
    )

    reduce_to: int | Literal["auto"] | None = field(
        default="auto",
        metadata=_help("width of the vectors in the loss by bucket means; auto: 768 for Qwen models wider than that"),
    )
    image_instruction: str | None = field(
        default=None, metadata=_help("instruction after the image; default: the library's")
    )
    fields: list[str] | None = field(
        default=None, metadata=_help("attribute fields that make the text, in order; default: all")
    )
    pool_template: bool = field(
        default=True, metadata=_help("average over the chat template's own tokens too, as published")
    )
    min_pixels: int = field(default=20 * 20, metadata=_help("smaller images are enlarged to this area"))
    max_pixels: int = field(default=256 * 256, metadata=_help("larger images are reduced to this area"))

    seed: int = field(default=0, metadata=_help("for initial weights, data order, dropout and noise images"))
    checkpoint_every: int = field(
        default=100, metadata=_help("steps between checkpoints; 0: only at the end", changeable=True)
    )
    keep_checkpoints: int = field(default=2, metadata=_help("newest checkpoints to keep; 0: all", changeable=True))
    log_every: int = field(default=1, metadata=_help("steps between lines of log.jsonl", changeable=True))
    resume: Literal["auto", "never"] = field(
        default="auto",
        metadata=_help("auto continues from the newest valid checkpoint in the output folder", changeable=True),
    )
    prefetch: bool = field(
        default=True, metadata=_help("prepare the next batch (pictures, tokens) in a thread meanwhile", changeable=True)
    )
    length_bucketing: bool = field(
        default=True, metadata=_help("put items of similar length into one chunk, so that little is padded")
    )
    progress: bool = field(default=True, metadata=_help("show a progress bar", changeable=True))

    def __post_init__(self) -> None:
        for name in ("items", "output", "images", "tower_cache"):
            if getattr(self, name) not in (None, "none"):
                object.__setattr__(self, name, Path(getattr(self, name)))
        at_least = {
            "r": 1, "num_experts": 1, "batch_size": 2, "steps": 1, "warmup_steps": 0, "min_pixels": 1,
            "checkpoint_every": 0, "keep_checkpoints": 0, "log_every": 1, "weight_decay": 0, "seed": 0,
            "tower_batch": 1, "tower_cache_gib": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("temperature", "learning_rate", "lora_alpha", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, least in {"chunk_size": 1, "reduce_to": 1, "checkpointed_layers": 0}.items():
            value = getattr(self, name)
            if value not in (None, "auto") and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be at least {least}, 'auto' or None, got {value!r}")
        if self.checkpointed_layers is not None and not self.gradient_checkpointing:
            raise ValueError(f"checkpointed_layers is {self.checkpointed_layers!r} but gradient_checkpointing is off")
        if self.packing not in get_args(Packing):
            raise ValueError(f"packing must be one of {', '.join(get_args(Packing))}, got {self.packing!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.adapter == "moda" and self.r % self.num_experts:
            raise ValueError(f"num_experts must divide r, got num_experts={self.num_experts} and r={self.r}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both; got steps={self.steps} and epochs={self.epochs}")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")

    def total_steps(self, batches_per_epoch: int) -> int:
        """Steps of the whole run for a catalogue that gives so many batches an epoch."""
        if self.epochs is not None:
            return max(1, round(self.epochs * batches_per_epoch))
        return self.steps if self.steps is not None else int(PUBLISHED["steps"])

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of `step` (counted from 0): linear warm-up, then constant or down to zero at the end."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        course = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.learning_rate * (
            1 - course if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * course))
        )

    def determining(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its checkpoint, as JSON values."""
        return {
            setting.name: getattr(self, setting.name)
            for setting in dataclasses.fields(self)
            if not setting.metadata.get("changeable")
        }

    def prompts(self) -> PromptConfig:
        """What the model is shown of an item."""
        instruction = PromptConfig.image_instruction if self.image_instruction is None else self.image_instruction
        return PromptConfig(image_instruction=instruction, fields=self.fields, pool_template=self.pool_template)

    def loss_width(self, lvlm: LVLM) -> int | None:
        """Width of the vectors in the loss for a model; None: the model's own."""
        if self.reduce_to != "auto":
            return self.reduce_to
        return PUBLISHED_WIDTH if "qwen" in lvlm.family.name.lower() and lvlm.hidden_size > PUBLISHED_WIDTH else None

    def as_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    def differences_from_published(self) -> dict[str, tuple[Any, Any]]:
        """Field name -> (this run's value, the published value), for what differs."""
        own = {name: getattr(self, name) for name in PUBLISHED}
        if self.steps is None and self.epochs is None:
            own["steps"] = PUBLISHED["steps"]
        if self.adapter == "lora":
            own["num_experts"] = 1
        return {name: (own[name], value) for name, value in PUBLISHED.items() if own[name] != value}
