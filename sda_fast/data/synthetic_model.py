"""The model behind the synthetic catalogue: hidden factors of items, tastes of users, and who takes what next.

Every item has one value of each factor. Two factors show only in the picture, two only in the text, two in both:

    image   hue (8), pattern (6)
    text    material (8), occasion (8)
    both    category (10), tone (3)

User u has a taste a_uf(v) ~ N(0, 1) for every value v of every factor f; everybody shares a fashion b_f(v) ~ N(0, 1).
At step t, with j the item taken last, item i not taken before is taken with probability proportional to exp(U), where

    U(i | u, t, j) = log popularity_i + sum_f [ taste_strength * a_uf,t(v_if) + fashion_strength * b_f(v_if) ]
                     + sequence_strength * sum over f in (hue, material, category) of s_f [v_if = successor_f(v_jf)]
    popularity_i   = (rank_i + popularity_shift) ** -popularity_exponent, ranks 1, 2, ... in random order
    a_u,t+1        = persistence * a_u,t + sqrt(1 - persistence ** 2) * N(0, 1)
    successor_f(v) = (v + 1) mod V_f,   s_hue = s_material = 0.5,   s_category = 1

so repeated liking, drift, order and fashion all have something to learn; popularity_i alone no content tells. A history
has min_length items plus a geometric number of further ones, at most max_length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTORS: dict[str, int] = {"hue": 8, "pattern": 6, "material": 8, "occasion": 8, "category": 10, "tone": 3}
SHOWN_IN: dict[str, tuple[str, str]] = {
    "image": ("hue", "pattern"),
    "text": ("material", "occasion"),
    "both": ("category", "tone"),
}
SEQUENCE_FACTORS: dict[str, float] = {"hue": 0.5, "material": 0.5, "category": 1.0}


@dataclass(frozen=True)
class TasteModel:
    """Constants of the simulation, in the notation of this module's docstring."""

    taste_strength: float = 2.0
    fashion_strength: float = 0.5
    sequence_strength: float = 4.0
    popularity_exponent: float = 1.2
    popularity_shift: float = 20.0
    persistence: float = 0.98
    min_length: int = 4
    mean_length: float = 6.0
    max_length: int = 30
    tie_share: float = 0.15


@dataclass
class SyntheticTruth:
    """What the simulation knows and a recommender does not.

    Attributes:
        factors: factor name -> int64 [items], the value of every item.
        popularity: float64 [items], popularity_i of the model (fashion not included).
        users, items: int64 [n], the interactions in time order within each user.
        timestamps: int64 [n], seconds; some of a user's are equal.
        final_utility: float32 [users, items], U for the last interaction of every user, -inf for items taken before.
    """

    factors: dict[str, np.ndarray]
    popularity: np.ndarray
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    final_utility: np.ndarray


def successor(factor: str, values: np.ndarray) -> np.ndarray:
    """The value that tends to follow each of `values` (int64, any shape) of `factor`."""
    return (values + 1) % FACTORS[factor]


def factor_vectors(factors: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """Centred one-hot codes of the named factors side by side, float32 [items, sum of their sizes]."""
    codes = [np.eye(FACTORS[name], dtype=np.float32)[factors[name]] - 1.0 / FACTORS[name] for name in names]
    return np.concatenate(codes, axis=1).astype(np.float32)


def simulate(num_items: int, num_users: int, seed: int, model: TasteModel | None = None) -> SyntheticTruth:
    """Draw items' factors and users' histories.

    Raises:
        ValueError: fewer items than twice the longest history, or no users.
    """
    model = TasteModel() if model is None else model
    if num_items < 2 * model.max_length or num_users < 1:
        raise ValueError(
            f"expected at least {2 * model.max_length} items and 1 user, got {num_items} items and {num_users} users"
        )
    rng = np.random.default_rng([seed, 10])
    factors = {name: rng.permutation(np.arange(num_items) % size) for name, size in FACTORS.items()}
    popularity = (1.0 + rng.permutation(num_items) + model.popularity_shift) ** -model.popularity_exponent
    lengths = np.minimum(
        model.min_length - 1 + rng.geometric(1 / (model.mean_length - model.min_length + 1), num_users),
        model.max_length,
    )
    users, items, final_utility = _histories(rng, model, factors, popularity, lengths)
    return SyntheticTruth(
        factors, popularity, users, items, _timestamps(rng, model, users), final_utility.astype(np.float32)
    )


def _histories(
    rng: np.random.Generator,
    model: TasteModel,
    factors: dict[str, np.ndarray],
    popularity: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_users, num_items = len(lengths), len(popularity)
    codes = np.concatenate([np.eye(size)[factors[name]] for name, size in FACTORS.items()], axis=1)
    follows = sum(
        weight * (successor(name, factors[name])[:, None] == factors[name][None, :])
        for name, weight in SEQUENCE_FACTORS.items()
    )
    fashion = model.fashion_strength * rng.standard_normal(codes.shape[1]) @ codes.T
    tastes = rng.standard_normal((num_users, codes.shape[1]))
    taken = np.full((num_users, int(lengths.max())), -1, dtype=np.int64)
    final_utility = np.empty((num_users, num_items))
    available = np.ones((num_users, num_items), dtype=bool)
    for step in range(taken.shape[1]):
        active = np.flatnonzero(lengths > step)
        utility = np.log(popularity) + fashion + model.taste_strength * tastes[active] @ codes.T
        if step:
            utility = utility + model.sequence_strength * np.asarray(follows)[taken[active, step - 1]]
        utility = np.where(available[active], utility, -np.inf)
        # The largest of U + Gumbel noise is a draw from the softmax of U.
        chosen = np.argmax(utility + rng.gumbel(size=utility.shape), axis=1)
        taken[active, step] = chosen
        available[active, chosen] = False
        ending = lengths[active] == step + 1
        final_utility[active[ending]] = utility[ending]
        tastes = model.persistence * tastes + np.sqrt(1 - model.persistence**2) * rng.standard_normal(tastes.shape)
    users, steps = np.nonzero(taken >= 0)
    return users, taken[users, steps], final_utility


def _timestamps(rng: np.random.Generator, model: TasteModel, users: np.ndarray) -> np.ndarray:
    first = np.concatenate([[True], users[1:] != users[:-1]])
    gaps = 60 + rng.exponential(5 * 86_400, len(users)).astype(np.int64)
    gaps[rng.random(len(users)) < model.tie_share] = 0
    gaps[first] = 0
    elapsed = np.cumsum(gaps)
    starts = 1_700_000_000 + rng.integers(0, 180 * 86_400, int(users.max()) + 1)
    return starts[users] + elapsed - elapsed[first][users]
