"""Scorers without a sequence model: random, popularity, item-to-item transitions, and cornac's BPR and VBPR."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict

import numpy as np
import torch
from cornac.data import Dataset, ImageModality
from cornac.models import BPR, VBPR, MostPop
from scipy.sparse import csr_matrix
from torch import Tensor

from sda_fast.data.split import Split
from sda_fast.recommend.config import RecommendConfig
from sda_fast.recommend.ranking import Scorer


def baseline_scorer(name: str, split: Split, seed: int) -> Scorer:
    """The scorer of "random", "popularity" or "transition"."""
    if name == "random":
        return _random_scorer(split, seed)
    return _popularity_scorer(split) if name == "popularity" else _transition_scorer(split)


def factor_scorer(split: Split, config: RecommendConfig, seed: int, table: Tensor | None) -> Scorer:
    """cornac's VBPR with `table` ([num_items, d] item vectors) as its image features, or BPR where it is None.

    Both learn from pairs and ignore the order of a history; the number of epochs is fixed, so that nothing is chosen
    on validation. VBPR's features are centred and scaled to rows of about unit length, BPR has as many factors in all.
    """
    data = cornac_dataset(split, seed)
    if table is None:
        bpr = BPR(
            k=2 * config.factor_dim,
            max_iter=config.factor_epochs,
            learning_rate=10 * config.factor_learning_rate,
            seed=seed,
        )
        bpr.fit(data)
        return _product_scorer(bpr.u_factors, bpr.i_factors, bpr.i_biases)
    centred = table - table.mean(0)
    features = (centred / centred.square().sum(1).mean().sqrt().clamp_min(1e-12)).numpy()
    data.add_modalities(item_image=ImageModality(features=features))
    vbpr = VBPR(
        k=config.factor_dim,
        k2=config.factor_dim,
        n_epochs=config.factor_epochs,
        batch_size=256,
        learning_rate=config.factor_learning_rate,
        verbose=False,
        seed=seed,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        vbpr.fit(data)
    return _product_scorer(
        np.concatenate([vbpr.gamma_user, vbpr.theta_user], axis=1),
        np.concatenate([vbpr.gamma_item, vbpr.theta_item], axis=1),
        vbpr.beta_item + vbpr.visual_bias,
    )


def cornac_dataset(split: Split, seed: int) -> Dataset:
    """The split's training items as cornac reads them, with the split's numbering of users and items."""
    users = np.repeat(np.arange(split.num_users), np.diff(split.train_offsets))
    return Dataset.build(
        [(user, item, 1.0) for user, item in zip(users.tolist(), split.train_items.tolist(), strict=True)],
        global_uid_map=OrderedDict((user, user) for user in range(split.num_users)),
        global_iid_map=OrderedDict((item, item) for item in range(split.num_items)),
        seed=seed,
    )


def _random_scorer(split: Split, seed: int) -> Scorer:
    def score(users: np.ndarray, with_validation_item: bool) -> Tensor:
        rng = np.random.default_rng([seed, int(users[0]), int(with_validation_item)])
        return torch.as_tensor(rng.random((len(users), split.num_items), dtype=np.float32))

    return score


def _popularity_scorer(split: Split) -> Scorer:
    model = MostPop().fit(cornac_dataset(split, 0))
    counts = torch.as_tensor(model.item_pop, dtype=torch.float32)
    return lambda users, with_validation_item: counts.expand(len(users), -1)


def _transition_scorer(split: Split) -> Scorer:
    """How often an item directly followed the user's last one in training; popularity settles ties."""
    items = split.train_items.astype(np.int64)
    follows = np.ones(max(0, len(items) - 1), dtype=bool)
    boundaries = split.train_offsets[1:-1]
    follows[boundaries[(boundaries > 0) & (boundaries < len(items))] - 1] = False
    before, after = items[:-1][follows], items[1:][follows]
    shape = (split.num_items, split.num_items)
    counts = csr_matrix((np.ones(len(before), dtype=np.float32), (before, after)), shape=shape)
    popularity = (split.item_train_counts / (len(items) + 1)).astype(np.float32)

    def score(users: np.ndarray, with_validation_item: bool) -> Tensor:
        rows = np.tile(popularity, (len(users), 1))
        last = np.array([_last_item(split, user, with_validation_item) for user in users])
        known = last >= 0
        rows[known] += counts[last[known]].toarray()
        return torch.as_tensor(rows)

    return score


def _last_item(split: Split, user: int, with_validation_item: bool) -> int:
    history = split.test_history(user) if with_validation_item else split.train_sequence(user)
    return int(history[-1]) if len(history) else -1


def _product_scorer(user_factors: np.ndarray, item_factors: np.ndarray, item_biases: np.ndarray) -> Scorer:
    users_of, items_of = torch.as_tensor(user_factors), torch.as_tensor(item_factors)
    biases = torch.as_tensor(item_biases)

    def score(users: np.ndarray, with_validation_item: bool) -> Tensor:
        return (users_of[torch.as_tensor(users)] @ items_of.T + biases).float()

    return score
