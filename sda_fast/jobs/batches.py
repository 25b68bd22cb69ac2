"""A batch of items made ready for the model: chunks of tokens and pixels, similar lengths together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from sda_fast.data.images import NOISE_SIDE, bounded_size
from sda_fast.data.items import Item
from sda_fast.jobs.sampler import length_buckets
from sda_fast.lvlm.collate import ImageOptions, collate_images, collate_shown, collate_texts
from sda_fast.lvlm.family import ImageFeatures
from sda_fast.lvlm.load import LVLM
from sda_fast.lvlm.prompts import PromptConfig, attribute_text
from sda_fast.lvlm.tower_cache import TowerCache


@dataclass
class Chunk:
    """A few items' sequences of one modality, and what the frozen tower makes of their pictures.

    Attributes:
        tensors: from sda_fast.lvlm.collate; without pixels where all features are known.
        packed: encode them as one row without padding.
        features: by sequence, on the CPU, None while unknown (jobs.features completes them); [] for texts.
        pictures: by sequence, the name of its picture in the tower cache; None where it is not kept.
    """

    tensors: dict[str, Tensor]
    packed: bool = False
    features: list[ImageFeatures | None] = field(default_factory=list)
    pictures: list[str | None] = field(default_factory=list)

    @property
    def image_features(self) -> list[ImageFeatures] | None:
        """`features`, all known; None for texts."""
        known = [one for one in self.features if one is not None]
        if len(known) != len(self.features):
            raise RuntimeError(f"{len(self.features) - len(known)} of {len(self.features)} pictures have no features")
        return known or None

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences, padding left out."""
        return int(self.tensors["attention_mask"].sum())

    @property
    def num_slots(self) -> int:
        """Tokens that the model sees, padding counted."""
        return self.num_tokens if self.packed else self.tensors["attention_mask"].numel()


@dataclass
class Side:
    """One modality of a batch.

    Attributes:
        chunks: the items in pieces.
        places: [B] int64; row i of the batch is row places[i] of the chunks laid end to end.
    """

    chunks: list[Chunk]
    places: Tensor

    def in_batch_order(self, vectors: Tensor) -> Tensor:
        """Rows of the chunks' vectors [B, D] in the batch's order."""
        return vectors[self.places.to(vectors.device)]


@dataclass
class Batch:
    """The image side and the text side of the same items."""

    images: Side
    texts: Side
    chunk_size: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, padding left out."""
        return sum(chunk.num_tokens for chunk in self._chunks())

    @property
    def num_slots(self) -> int:
        """Tokens of all sequences, padding counted."""
        return sum(chunk.num_slots for chunk in self._chunks())

    def _chunks(self) -> Iterator[Chunk]:
        yield from self.images.chunks
        yield from self.texts.chunks


@dataclass(frozen=True)
class BatchMaker:
    """Turns items into batches for one model.

    A picture that was replaced by noise once is taken as missing from then on, so that it is reported once.

    Attributes:
        packs: modalities whose chunks are packed.
        cache: where the tower's outputs are looked up; a chunk that is all there needs no picture decoded.
    """

    lvlm: LVLM
    prompts: PromptConfig
    image_options: ImageOptions
    length_bucketing: bool = True
    packs: tuple[str, ...] = ()
    cache: TowerCache | None = None
    without_picture: set[str] = field(default_factory=set)
    known_sequences: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def make(self, items: Sequence[Item], chunk_size: int | None) -> Batch:
        """A batch in chunks of at most `chunk_size` items; None: one chunk."""
        size = chunk_size or len(items)
        images = self._side(self.image_chunk, items, [image_area(item, self.image_options) for item in items], size)
        texts = self._side(self.text_chunk, items, [len(attribute_text(item, self.prompts)) for item in items], size)
        return Batch(images, texts, chunk_size)

    def image_chunk(self, items: Sequence[Item]) -> Chunk:
        shown = [replace(item, image=None) if item.item_id in self.without_picture else item for item in items]
        pictures = [self.cache.picture(item) if self.cache is not None else None for item in shown]
        found = [self._kept(picture) for picture in pictures]
        packed = "image" in self.packs
        sizes = [one[1] for one in found if one is not None]
        if len(sizes) == len(items):
            tensors = collate_shown(self.lvlm, sizes, self.prompts, self.image_options, self.known_sequences)
            tensors["is_noise"] = torch.tensor([item.image is None for item in shown])
            return Chunk(tensors, packed, [one[0] for one in found if one is not None], pictures)
        tensors = collate_images(self.lvlm, shown, self.prompts, self.image_options)
        for place, (item, is_noise) in enumerate(zip(shown, tensors["is_noise"].tolist(), strict=True)):
            if is_noise and item.image is not None:
                self.without_picture.add(item.item_id)
                pictures[place] = self.cache.picture(replace(item, image=None)) if self.cache is not None else None
                found[place] = self._kept(pictures[place])
        return Chunk(tensors, packed, [None if one is None else one[0] for one in found], pictures)

    def _kept(self, picture: str | None) -> tuple[ImageFeatures, tuple[int, int]] | None:
        return self.cache.get(picture) if self.cache is not None and picture is not None else None

    def text_chunk(self, items: Sequence[Item]) -> Chunk:
        return Chunk(collate_texts(self.lvlm, items, self.prompts), "text" in self.packs)

    def _side(
        self,
        collate: Callable[[Sequence[Item]], Chunk],
        items: Sequence[Item],
        lengths: list[int],
        size: int,
    ) -> Side:
        bucketed = self.length_bucketing and size < len(items)
        buckets = length_buckets(lengths if bucketed else [0] * len(items), size)
        places = torch.tensor([place for bucket in buckets for place in bucket], dtype=torch.int64).argsort()
        return Side([collate([items[place] for place in bucket]) for bucket in buckets], places)


def image_area(item: Item, options: ImageOptions) -> int:
    """Pixels of the item's picture after scaling, from the file's header: what its sequence's length grows with."""
    width = height = NOISE_SIDE
    if item.image is not None:
        try:
            with Image.open(item.image) as image:
                width, height = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            width = height = NOISE_SIDE
    width, height = bounded_size(width, height, options.min_pixels, options.max_pixels)
    return width * height


class Prefetcher:
    """Makes the batch of the next step in one background thread while the current one is being trained on."""

    def __init__(self, make: Callable[[int, int | None], Batch], *, last_step: int, enabled: bool = True) -> None:
        self._make = make
        self._last_step = last_step
        # One thread: the tokenizers of transformers change their own state while they pad.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch") if enabled else None
        self._ahead: tuple[int, int | None, Future[Batch]] | None = None

    def get(self, step: int, chunk_size: int | None) -> Batch:
        """The batch of `step`; starts on the next one."""
        ahead, self._ahead = self._ahead, None
        batch = ahead[2].result() if ahead is not None else None
        if ahead is None or batch is None or ahead[:2] != (step, chunk_size):
            batch = self._make(step, chunk_size)
        if self._executor is not None and step < self._last_step:
            self._ahead = (step + 1, chunk_size, self._executor.submit(self._make, step + 1, chunk_size))
        return batch

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
