"""Training of a sequence network: all positions of a window at once, the best epoch chosen on validation."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from sda_fast.data.split import Split
from sda_fast.recommend.config import RecommendConfig
from sda_fast.recommend.embedding import ContentEmbedding
from sda_fast.recommend.networks import SequenceNetwork, build_network
from sda_fast.recommend.ranking import METRICS, Scorer, metrics_of_ranks, rank_held_out
from sda_fast.recommend.windows import pad_histories, pad_windows, training_windows, window_batches

logger = logging.getLogger(__name__)


@dataclass
class TrainingLog:
    """What happened: one training loss per epoch, one validation NDCG@10 (full ranking) per evaluation."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_validation: float = -1.0
    seconds: float = 0.0


def train_sequence_model(
    name: str,
    split: Split,
    config: RecommendConfig,
    seed: int,
    *,
    table: Tensor | None = None,
    align_to: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[SequenceNetwork, TrainingLog]:
    """Train "sasrec", "bert4rec" or "gru4rec" on the split's training items only.

    Losses, over the positions whose next (or masked) item is known: "ce" is the softmax over the target and
    `num_negatives` items drawn uniformly per batch, their scores raised by log(items / drawn) so that it estimates the
    softmax over all items (all items are used where there are no more than that); "bce" is the published binary cross
    entropy with one uniform negative per position. With `align_to`, alpha times the CMSA loss between the adapter's
    output and those ID embeddings is added (arXiv 2512.06883, second stage).

    Args:
        table: [num_items, d] float item vectors; None trains an ID embedding.
        align_to: [num_items, embedding_dim] ID embeddings of a recommender trained before; needs `table`.

    Returns:
        The network in evaluation mode with the parameters of the best epoch by NDCG@10 on validation, and the log.

    Raises:
        ValueError: `align_to` without `table`, or a training loss that is not finite.
    """
    if align_to is not None and table is None:
        raise ValueError("align_to needs a table of item vectors, got None")
    device = device or torch.device("cpu")
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = build_network(name, split.num_items, config)
        if table is not None:
            content = ContentEmbedding(
                table,
                config.embedding_dim,
                hidden=config.adapter_hidden,
                num_special=network.num_special,
                activation=config.adapter_activation,
            )
            network.replace_embedding(content)
        network.to(device)
        log = _fit(network, split, config, np.random.default_rng([seed, 2]), align_to, device)
    log.seconds = time.perf_counter() - start
    return network, log


def network_scorer(network: SequenceNetwork, split: Split, config: RecommendConfig) -> Scorer:
    """Scores of all items for batches of users; the same numbers as cornac's `score`, one product for all users."""
    device = next(network.parameters()).device
    everything = torch.arange(split.num_items, device=device)
    network.eval()
    item_vectors = network.item_vectors()
    with torch.no_grad():
        biases = network.biases(everything)

    def score(users: np.ndarray, with_validation_item: bool) -> Tensor:
        last = split.validation_items[users] if with_validation_item else None
        rows = pad_histories(split.train_items, split.train_offsets, users, config.max_length, split.num_items, last)
        with torch.no_grad():
            with _shared(network, torch.as_tensor(np.unique(rows[rows < split.num_items]), device=device)):
                states = network.last_states(torch.as_tensor(rows, device=device))
            scores = states @ item_vectors.T
        return scores if biases is None else scores + biases

    return score


def _fit(
    network: SequenceNetwork,
    split: Split,
    config: RecommendConfig,
    rng: np.random.Generator,
    align_to: Tensor | None,
    device: torch.device,
) -> TrainingLog:
    log = TrainingLog()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    validation_users = _validation_users(split, config)
    best_state: dict[str, Tensor] = {}
    evaluations_without_gain = 0
    epochs = tqdm(range(1, config.epochs + 1), leave=False, disable=not config.progress, desc="epochs", unit="epoch")
    for epoch in epochs:
        log.losses.append(_train_epoch(network, split, config, rng, optimizer, align_to, device))
        if epoch % config.evaluate_every and epoch != config.epochs:
            continue
        ranks = rank_held_out(network_scorer(network, split, config), split, validation_users, test=False)
        quality = metrics_of_ranks(ranks.full)[METRICS[1]] or 0.0
        log.validation.append(quality)
        epochs.set_postfix(loss=f"{log.losses[-1]:.3f}", validation=f"{quality:.4f}")
        if quality > log.best_validation:
            log.best_validation, log.best_epoch = quality, epoch
            best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}
            evaluations_without_gain = 0
        else:
            evaluations_without_gain += 1
            if evaluations_without_gain >= config.patience:
                break
    network.load_state_dict(best_state)
    network.eval()
    return log


def _validation_users(split: Split, config: RecommendConfig) -> np.ndarray:
    users = split.evaluated_users
    if not config.validation_users or len(users) <= config.validation_users:
        return users
    return np.sort(np.random.default_rng([split.seed, 3]).choice(users, config.validation_users, replace=False))


def _train_epoch(
    network: SequenceNetwork,
    split: Split,
    config: RecommendConfig,
    rng: np.random.Generator,
    optimizer: torch.optim.Optimizer,
    align_to: Tensor | None,
    device: torch.device,
) -> float:
    network.train()
    overlap = 0 if network.masked else 1
    windows = training_windows(split.train_offsets, config.max_length + overlap, overlap, rng)
    total, positions = 0.0, 0
    for batch in window_batches(windows, config.batch_positions, rng):
        rows = pad_windows(split.train_items, batch, split.num_items)
        inputs, targets = _mask_items(network, rows, config, rng) if network.masked else (rows[:, :-1], rows[:, 1:])
        known = targets != split.num_items
        loss = _batch_loss(network, config, rng, inputs, targets, known, align_to, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, positions = total + loss.item() * int(known.sum()), positions + int(known.sum())
    mean = total / max(1, positions)
    if not np.isfinite(mean):
        raise ValueError(f"the training loss became {mean}; try a smaller learning_rate than {config.learning_rate}")
    return mean


def _mask_items(
    network: SequenceNetwork, rows: np.ndarray, config: RecommendConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    present = rows != network.num_items
    masked = (rng.random(rows.shape) < config.mask_probability) & present
    # Prediction masks the last position alone; a tenth of the rows train on just that.
    last_only = rng.random(len(rows)) < 0.1
    masked[last_only | ~masked.any(1), -1] = True
    masked[last_only, :-1] = False
    inputs = np.where(masked, network.num_items + 1, rows)
    return inputs, np.where(masked, rows, network.num_items)


def _batch_loss(
    network: SequenceNetwork,
    config: RecommendConfig,
    rng: np.random.Generator,
    inputs: np.ndarray,
    targets: np.ndarray,
    known: np.ndarray,
    align_to: Tensor | None,
    device: torch.device,
) -> Tensor:
    num_items = network.num_items
    wanted = targets[known]
    use_all_items = config.loss == "ce" and not 0 < config.num_negatives < num_items
    if use_all_items:
        candidates = np.arange(num_items)
    else:
        candidates = rng.integers(0, num_items, len(wanted) if config.loss == "bce" else config.num_negatives)
    needed = np.unique(np.concatenate([inputs[inputs < num_items], wanted, candidates]))
    place = np.zeros(num_items, dtype=np.int64)
    place[needed] = np.arange(len(needed))
    items = torch.as_tensor(needed, device=device)
    with _shared(network, items):
        states = network.hidden_states(torch.as_tensor(np.ascontiguousarray(inputs), device=device))
        vectors, biases = network.embedding(items), network.biases(items)
    states = states[torch.as_tensor(known, device=device)]
    target_places = torch.as_tensor(place[wanted], device=device)
    candidate_places = torch.as_tensor(place[candidates], device=device)

    def pair_scores(places: Tensor) -> Tensor:
        scores = (states * vectors[places]).sum(1)
        return scores if biases is None else scores + biases[places]

    if config.loss == "bce":
        loss = functional.softplus(-pair_scores(target_places)).mean()
        loss = loss + functional.softplus(pair_scores(candidate_places)).mean()
    else:
        scores = states @ vectors[candidate_places].T
        if biases is not None:
            scores = scores + biases[candidate_places]
        if use_all_items:
            loss = functional.cross_entropy(scores, target_places)
        else:
            scores = scores + np.log(num_items / len(candidates))
            scores = scores.masked_fill(candidate_places == target_places[:, None], -torch.inf)
            own = pair_scores(target_places)
            loss = (torch.logaddexp(own, scores.logsumexp(1)) - own).mean()
    if align_to is None:
        return loss
    return loss + config.alignment_weight * _alignment(config, vectors, items, inputs, num_items, place, align_to)


def _alignment(
    config: RecommendConfig,
    vectors: Tensor,
    items: Tensor,
    inputs: np.ndarray,
    num_items: int,
    place: np.ndarray,
    align_to: Tensor,
) -> Tensor:
    """CMSA of a batch's content and ID vectors; zero where the batch has no two rows to contrast."""
    from sda_fast.ops.cmsa import cmsa_loss

    seen = inputs[inputs < num_items]
    if config.alignment_over == "items":
        seen = np.unique(seen)
    if len(seen) < 2:
        return vectors.new_zeros(())
    rows = torch.as_tensor(place[seen], device=vectors.device)
    return cmsa_loss(vectors[rows], align_to.to(vectors.device)[items[rows]], config.alignment_temperature)


def _shared(network: SequenceNetwork, items: Tensor) -> AbstractContextManager[None]:
    embedding = network.embedding
    return embedding.shared(items) if isinstance(embedding, ContentEmbedding) else nullcontext()
