"""A batch in, one vector per item out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sda_fast.lvlm.family import SEQUENCE_ENTRIES, ImageFeatures
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.packing import pack, pool_packed
from sda_fast.lvlm.tower import tower_features
from sda_fast.moda.context import modality as modality_context


def encode(
    lvlm: LVLM,
    batch: Mapping[str, torch.Tensor],
    modality: str,
    *,
    image_features: Sequence[ImageFeatures] | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """Vectors of a batch: the mean of the last hidden state over the tokens of `pool_mask`.

    Sets the modality for adapted layers itself. Gradients reach the language model only.

    Args:
        batch: from `collate_images` or `collate_texts`, on any device.
        modality: "image" or "text".
        image_features: what `tower_features` returned for these items, to skip the tower; one entry per sequence.
        packed: run the decoder on one row without padding (sda_fast.lvlm.packing).

    Returns:
        [B, D] float32, not normalised (DESIGN.md section 2).

    Raises:
        ValueError: the batch is not of that modality, the number of image features is wrong, or the family cannot
            pack sequences of that modality.
    """
    if modality not in ("image", "text"):
        raise ValueError(f'modality must be "image" or "text", got {modality!r}')
    if (modality == "image") != ("pixel_values" in batch or image_features is not None):
        raise ValueError(f"modality {modality!r} was given a batch of {sorted(batch)}")
    if modality == "image":
        image_features = tower_features(lvlm, batch) if image_features is None else image_features
        if len(image_features) != len(batch["input_ids"]):
            raise ValueError(f"{len(image_features)} image features for {len(batch['input_ids'])} sequences")
        image_features = [{name: part.to(lvlm.device) for name, part in one.items()} for one in image_features]
    sequences = {name: tensor for name, tensor in batch.items() if name in SEQUENCE_ENTRIES}
    if packed and modality not in lvlm.family.packs:
        raise ValueError(f"the {lvlm.family.name} family cannot pack {modality} sequences")
    if packed:
        sequences = pack(sequences)
    lengths = sequences.pop("lengths", None)
    sequences = {name: tensor.to(lvlm.device) for name, tensor in sequences.items()}
    with modality_context(modality):
        hidden_states = lvlm.family.last_hidden_state(lvlm.model, sequences, image_features)
    if lengths is not None:
        return pool_packed(hidden_states, sequences["pool_mask"], lengths)
    return mean_pool(hidden_states, sequences["pool_mask"])


def mean_pool(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of a mask.

    Args:
        hidden_states: [B, T, D], any float dtype.
        mask: [B, T] bool or 0 and 1, at least one set in each row.

    Returns:
        [B, D] float32, summed in float32 without a float32 copy of hidden_states.
    """
    mask = mask.bool()
    total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=torch.float32)
    return total / mask.sum(1, keepdim=True)


def reduce_buckets(vectors: torch.Tensor, size: int = 768) -> torch.Tensor:
    """Shorten vectors by means over neighbouring dimensions.

    With D = size * q + rest, the first size - rest buckets hold q dimensions and the other `rest` hold q + 1: for
    3584 -> 768, 256 buckets of 4 and 512 of 5 (DESIGN.md section 2).

    Args:
        vectors: [..., D].
        size: number of buckets.

    Returns:
        [..., size], or `vectors` itself where D <= size.
    """
    length, rest = divmod(vectors.shape[-1], size)
    if length == 0 or (length == 1 and rest == 0):
        return vectors
    short, long = vectors.split([(size - rest) * length, rest * (length + 1)], dim=-1)
    means = [short.unflatten(-1, (size - rest, length)).mean(-1)]
    if rest:
        means.append(long.unflatten(-1, (rest, length + 1)).mean(-1))
    return torch.cat(means, dim=-1)
