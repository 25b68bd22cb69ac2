"""One training step on fake tensors: the real step, its chunks run once each and counted as often as they come."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.jobs.batches import Batch, Chunk, Side
from sda_fast.jobs.features import Tower
from sda_fast.jobs.train_config import FinetuneConfig
from sda_fast.jobs.train_state import make_loss, make_optimizer, moda_config
from sda_fast.jobs.train_step import ContrastiveStep, training_mode
from sda_fast.lvlm.family import SEQUENCE_ENTRIES, ImageFeatures
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.tower import picture_groups
from sda_fast.moda.inject import adapt_model, named_moda_layers
from sda_fast.ops.quantized import is_4bit, workspaces
from sda_fast.planning.cards import Card
from sda_fast.planning.gpu import LIBRARY_WORKSPACE_BYTES, as_on_a_gpu
from sda_fast.planning.ledger import HOST, PARTS, Ledger
from sda_fast.planning.model import weight_tensors

EIGHT_BIT_BLOCK = 256
SMALLEST_EIGHT_BIT = 4096
SMALLEST_PAGED = 100_000


@dataclass(frozen=True)
class StepPlan:
    """What one step needs.

    Attributes:
        batch_size, chunk_size: the setting; chunk_size None is the whole batch at once.
        checkpointed_layers, num_layers: how many of the decoder's layers are recomputed, and how many there are.
        parts: bytes at the peak, by part (sda_fast.planning.ledger.PARTS).
        kept: most bytes that autograd kept for backward between forward and backward.
        seconds: estimated, of a step of mean lengths; None without a card.
        flops: of such a step.
        picture_bytes: that the largest picture takes in the tower cache.
    """

    batch_size: int
    chunk_size: int | None
    checkpointed_layers: int
    num_layers: int
    parts: Mapping[str, int]
    kept: int
    seconds: float | None
    flops: float
    picture_bytes: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class PlannedTower(Tower):
    """The tower on the pictures of a batch's first chunk, each shape of a group run once.

    Args:
        cached: all features are on the disk, so that the tower does not run.
        offload: its weights are on the card only while it runs.
    """

    def __init__(self, lvlm: LVLM, ledger: Ledger, *, group_size: int | None, cached: bool, offload: bool) -> None:
        super().__init__(lvlm, group_size=group_size)
        self.ledger, self.cached, self.offload = ledger, cached, offload
        self.runs: Counter[str] = Counter()
        self._made: dict[tuple[int, ...], list[ImageFeatures]] = {}
        self.place_weights(HOST if offload else "weights")

    def place_weights(self, part: str) -> None:
        for tensor in self.lvlm.family.tower_tensors(self.lvlm.model).values():
            self.ledger.retag(tensor, part)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the largest picture's features."""
        pictures = [one for group in self._made.values() for one in group]
        return max(sum(part.nbytes for part in one.values()) for one in pictures)

    def complete(self, chunks: Iterable[Chunk]) -> None:
        """Features of the first chunk; the others are like it."""
        all_chunks = list(chunks)
        first = all_chunks[0]
        if self.offload and not self.cached:
            self.place_weights("weights")
        self.ledger.section = "tower"
        rows = self.lvlm.family.picture_rows(self.lvlm.model, first.tensors)["pixel_values"]
        for group in picture_groups(self.lvlm, first.tensors, range(len(first.features)), self.group_size):
            shapes = tuple(rows[place] for place in group)
            section = f"tower {shapes}"
            self.runs[section] += len(all_chunks)
            if shapes not in self._made:
                self.ledger.section = section
                self._made[shapes] = self._run(first, group)
            for place, features in zip(group, self._made[shapes], strict=True):
                first.features[place] = features
        if self.offload:
            self.place_weights(HOST)

    def _run(self, chunk: Chunk, group: Sequence[int]) -> list[ImageFeatures]:
        with torch.no_grad():
            with self.ledger.allocating("inputs"):
                inputs = self.lvlm.family.pictures(self.lvlm.model, chunk.tensors, group)
            features = self.lvlm.family.image_features(self.lvlm.model, inputs)
        with self.ledger.allocating(HOST):
            return [{name: part.clone() for name, part in one.items()} for one in features]


@dataclass(frozen=True)
class PlannedStep(ContrastiveStep):
    """`ContrastiveStep` whose copies to and from main memory are written down, although both are the same here.

    Attributes:
        ledger: where to.
        runs: section -> how often a chunk was encoded in it; only the first is really run, the others give vectors
            without a graph.
    """

    ledger: Ledger = field(kw_only=True)
    runs: Counter[str] = field(default_factory=Counter, kw_only=True)
    kept: list[int] = field(default_factory=list, kw_only=True)

    def encode(self, chunk: Chunk, modality: str) -> Tensor:
        section = section_of(modality, torch.is_grad_enabled())
        self.runs[section] += 1
        if self.runs[section] > 1:
            return torch.empty(len(chunk.tensors["input_ids"]), self.reduce_to or self.lvlm.hidden_size)
        self.ledger.section = section
        tensors = {name: self._on_device(one) for name, one in chunk.tensors.items() if name in SEQUENCE_ENTRIES}
        known = chunk.image_features or []
        features: list[ImageFeatures | None] = [
            {name: self._on_device(part) for name, part in one.items()} for one in known
        ]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            vectors = super().encode(Chunk(tensors, features=features), modality)
        self.kept.append(self.ledger.live["activations"])
        return vectors

    def _on_device(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.ledger.retag(copy, "inputs", only="temporary")
        return copy

    def _keep(self, tensor: Tensor) -> Tensor:
        self.ledger.retag(tensor, "activations", only="temporary")
        # A result kept as such would keep its own graph alive.
        return tensor if tensor.grad_fn is None else tensor.detach()


def section_of(modality: str, with_graph: bool) -> str:
    return f"{modality} {'with' if with_graph else 'without'} graph"


def plan_step(
    lvlm: LVLM,
    config: FinetuneConfig,
    chunks: Mapping[str, Mapping[str, Tensor]],
    fake_mode: FakeTensorMode,
    *,
    card: Card | None,
    shares: Mapping[str, float] | None = None,
    tower_cached: bool = False,
) -> StepPlan:
    """Run one step of `config` on a fake model and write down its memory and work.

    Args:
        lvlm: from `fake_lvlm`; adapted here if it is not yet.
        config: batch_size, chunk_size, gradient_checkpointing, checkpointed_layers ("auto" is planned as all),
            optimizer, tower_batch, tower_offload and the adapter's and loss's settings count.
        chunks: "image" and "text" -> real tensors of one chunk, the longest that is to come.
        fake_mode: that the model was made in.
        card: the GPU to plan for; None: a step on the CPU, as it is.
        shares: "image" and "text" -> mean over longest length; the time is scaled by it.
        tower_cached: a step whose pictures are all in the tower cache.
    """
    ledger = Ledger(fake_mode, card.seconds if card is not None else None, rounding=512 if card is not None else 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_mode)
        if getattr(lvlm.model, "moda_config", None) is None:
            adapt_model(lvlm.model, moda_config(config, lvlm))
        ledger.adopt(weight_tensors(lvlm.model), "weights")
        adapters = [parameter for parameter in lvlm.model.parameters() if parameter.requires_grad]
        stack.enter_context(ledger)
        if card is not None:
            stack.enter_context(as_on_a_gpu(ledger, card))
        loss = make_loss(config)
        ledger.adopt([*adapters, *loss.parameters()], "adapters")
        parameters = [*adapters, *loss.parameters()]
        optimizer, state = fake_optimizer(config, parameters, ledger, on_gpu=card is not None)
        for parameter in parameters:
            stack.callback(
                parameter.register_post_accumulate_grad_hook(
                    lambda one: ledger.retag(one.grad, "gradients") if one.grad is not None else None
                ).remove
            )

        def marked_loss(images: Tensor, texts: Tensor) -> Tensor:
            ledger.section = "loss"
            return loss(images, texts)

        tower = PlannedTower(
            lvlm, ledger, group_size=config.tower_batch, cached=tower_cached, offload=config.tower_offload
        )
        step = PlannedStep(lvlm, marked_loss, config.loss_width(lvlm), tower, ledger=ledger)
        with ledger.allocating(HOST):
            batch = batch_of(ledger, chunks, config)
        library = torch.empty(LIBRARY_WORKSPACE_BYTES if card is not None else 0, dtype=torch.uint8)
        ledger.adopt([library], "workspaces")
        if card is not None:
            warm_workspace(lvlm)
        if tower_cached:
            tower.complete(batch.images.chunks)
            tower.runs.clear()
        ledger.reset_peak()
        ledger.seconds.clear()
        ledger.flops.clear()
        with training_mode(
            lvlm,
            gradient_checkpointing=config.gradient_checkpointing,
            checkpointed_layers=config.checkpointed_layers,
        ) as layers:
            checkpointed = layers.count
            step(batch)
        ledger.section = "optimizer"
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.grad = None
        del state, library
    return StepPlan(
        config.batch_size,
        config.chunk_size if isinstance(config.chunk_size, int) else None,
        checkpointed,
        len(layers),
        {part: ledger.peak_parts.get(part, 0) for part in PARTS},
        max(step.kept),
        summed(ledger.seconds, step.runs + tower.runs, shares) if card is not None else None,
        summed(ledger.flops, step.runs + tower.runs, shares),
        tower.picture_bytes,
    )


def warm_workspace(lvlm: LVLM) -> None:
    """Take the workspace for decoded weights, which outlives the first step."""
    packed = [layer for _, layer in named_moda_layers(lvlm.model) if is_4bit(layer.weight)]
    if packed:
        largest = max(layer.in_features * layer.out_features for layer in packed)
        workspaces.take((largest,), lvlm.model.dtype, lvlm.device)


def batch_of(ledger: Ledger, chunks: Mapping[str, Mapping[str, Tensor]], config: FinetuneConfig) -> Batch:
    """A batch that consists of the same chunk again and again, as fake tensors in main memory."""
    size = config.chunk_size if isinstance(config.chunk_size, int) else config.batch_size
    counts = [min(size, config.batch_size - first) for first in range(0, config.batch_size, size)]
    sides = []
    for modality in ("image", "text"):
        # Pixels have no values, and a fake of a real tensor would hold on to it.
        fakes = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_floating_point() else ledger.fake(tensor)
            for name, tensor in chunks[modality].items()
        }
        pieces = [
            Chunk(
                fakes if count == size else {"input_ids": fakes["input_ids"][:count]},
                features=[None] * count if modality == "image" else [],
            )
            for count in counts
        ]
        sides.append(Side(pieces, ledger.fake(torch.arange(config.batch_size))))
    return Batch(sides[0], sides[1], config.chunk_size if isinstance(config.chunk_size, int) else None)


def fake_optimizer(
    config: FinetuneConfig, parameters: list[Any], ledger: Ledger, *, on_gpu: bool
) -> tuple[torch.optim.Optimizer | None, list[Tensor]]:
    """The optimiser with its state as after a step, and that state; bitsandbytes' have their state alone."""
    if config.optimizer != "adamw":
        with ledger.allocating("optimizer"):
            states = [state for one in parameters for state in eight_bit_state(one, config.optimizer == "paged")]
        return None, states
    optimizer = make_optimizer(config, [{"params": parameters}], torch.device("cpu"))
    if on_gpu:
        for group in optimizer.param_groups:
            group["foreach"] = True
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    states = []
    for state in optimizer.state.values():
        for name, tensor in state.items():
            ledger.retag(tensor, HOST if name == "step" else "optimizer")
            states.append(tensor)
    return optimizer, states


def eight_bit_state(parameter: Tensor, paged: bool) -> list[Tensor]:
    """Both moments as bitsandbytes keeps them: bytes and a scale per block, small tensors in float32.

    Paged moments live in memory that the driver may move to the host, and are not counted.
    """
    if parameter.numel() < SMALLEST_EIGHT_BIT:
        return [torch.empty(parameter.shape) for _ in range(2)]
    scales = [torch.empty(-(-parameter.numel() // EIGHT_BIT_BLOCK)) for _ in range(2)]
    if paged and parameter.numel() >= SMALLEST_PAGED:
        return scales
    return [*scales, *(torch.empty(parameter.shape, dtype=torch.uint8) for _ in range(2))]


def summed(work: Mapping[str, float], runs: Mapping[str, int], shares: Mapping[str, float] | None) -> float:
    """The step's work: each section as often as its chunks or groups came, scaled to the mean lengths."""
    total = 0.0
    for section, amount in work.items():
        modality = section.split()[0].replace("tower", "image")
        total += amount * runs.get(section, 1) * (shares or {}).get(modality, 1.0)
    return total
