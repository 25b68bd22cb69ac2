"""A whole catalogue to one table of item vectors: both modalities, reduced by PCA, resumable."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sda_fast.data.items import Catalogue, Item, read_items
from sda_fast.data.vectors import ItemVectors, read_item_vectors, write_item_vectors
from sda_fast.jobs.batches import BatchMaker, Chunk, image_area
from sda_fast.jobs.checkpoint import file_sha256
from sda_fast.jobs.embed_shards import EmbeddingShards, Shard
from sda_fast.jobs.features import Tower
from sda_fast.jobs.fingerprint import catalogue_fingerprint, digest, folder_fingerprint, versions
from sda_fast.jobs.pca import fit_pca, read_pca, write_pca
from sda_fast.jobs.sampler import length_buckets
from sda_fast.jobs.train_config import (
    PACKING_HELP,
    TOWER_BATCH_HELP,
    TOWER_CACHE_GIB_HELP,
    TOWER_CACHE_HELP,
    TOWER_OFFLOAD_HELP,
)
from sda_fast.jobs.train_state import activation_dtype, chosen_device
from sda_fast.losses.cached import is_out_of_memory
from sda_fast.lvlm.collate import ImageOptions
from sda_fast.lvlm.encode import encode
from sda_fast.lvlm.load import LVLM, load_lvlm, read_config
from sda_fast.lvlm.packing import Packing, attention_for, packed_modalities
from sda_fast.lvlm.prompts import PromptConfig, attribute_text
from sda_fast.lvlm.tower_cache import TowerCache
from sda_fast.moda.fold import fold_model
from sda_fast.moda.folder import TRAINING_FILE, adapter_folder
from sda_fast.moda.save import load_adapter
from sda_fast.presets import Presets, log_differences

logger = logging.getLogger(__name__)

MODALITIES = ("image", "text")
PUBLISHED: Mapping[str, Any] = {
    "pca": "per-modality",
    "pca_dim": 768,
    "pool_template": True,
    "min_pixels": 20 * 20,
    "max_pixels": 256 * 256,
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class EmbedConfig:
    """One table of item vectors.

    Settings that are None take the value with which the adapter was trained (its training.json), else the library's.

    Raises:
        ValueError: a value is out of range; the message quotes it.
    """

    presets: ClassVar[Presets] = {"published": PUBLISHED}

    model: str = field(metadata=_help("model folder or hub name, e.g. Qwen/Qwen2.5-VL-7B-Instruct"))
    items: Path = field(metadata=_help("catalogue: JSON lines, .jsonl or .jsonl.gz"))
    output: Path = field(metadata=_help("the table to write, e.g. vectors.safetensors"))
    images: Path | None = field(
        default=None, metadata=_help("folder that image paths start from; default: the catalogue's")
    )
    adapter: Path | None = field(
        default=None, metadata=_help("adapter folder or hub id; default: none, zero-shot vectors")
    )
    preset: Literal["published"] | None = field(
        default=None, metadata=_help("start from the published settings; differences are logged")
    )

    pca: Literal["per-modality", "joint", "none"] = field(
        default="per-modality",
        metadata=_help("fit the reduction to each modality, or one to both; none: the vectors as they are"),
    )
    pca_from: Path | None = field(
        default=None,
        metadata=_help("reduction of an earlier table (its .pca.safetensors) to use again, instead of fitting one"),
    )
    pca_dim: int = field(
        default=768, metadata=_help("components kept per modality; fewer if the vectors or the items are fewer")
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
    packing: Packing = field(default="auto", metadata=_help(PACKING_HELP))
    tower_cache: Literal["auto", "none"] | Path = field(
        default="auto", metadata=_help(f"{TOWER_CACHE_HELP}; auto: where the adapter's training kept them, else none")
    )
    tower_cache_gib: float = field(default=20.0, metadata=_help(TOWER_CACHE_GIB_HELP))
    tower_batch: int | None = field(default=None, metadata=_help(TOWER_BATCH_HELP))
    tower_offload: bool = field(default=False, metadata=_help(TOWER_OFFLOAD_HELP))
    device: str | None = field(default=None, metadata=_help("cpu, cuda or cuda:1; default: a GPU where there is one"))
    batch_size: int = field(
        default=16, metadata=_help("items per forward pass; does not change the result beyond rounding")
    )

    fold: bool = field(
        default=False,
        metadata=_help(
            "keep the adapter folded into the weights while encoding one modality, instead of folding in every batch; "
            "a 4-bit model then takes the memory of its weights in the activations' precision beside its own"
        ),
    )

    image_instruction: str | None = field(default=None, metadata=_help("instruction after the image"))
    fields: list[str] | None = field(default=None, metadata=_help("attribute fields that make the text, in order"))
    pool_template: bool | None = field(default=None, metadata=_help("average over the chat template's own tokens too"))
    min_pixels: int | None = field(
        default=None, metadata=_help("smaller images are enlarged to this area; default: 400")
    )
    max_pixels: int | None = field(
        default=None, metadata=_help("larger images are reduced to this area; default: 65536")
    )
    seed: int | None = field(
        default=None, metadata=_help("of the noise images that stand for missing ones; default: 0")
    )

    shard_items: int = field(
        default=512, metadata=_help("items between two intermediate files; at most so many are lost by a kill")
    )
    progress: bool = field(default=True, metadata=_help("show a progress bar"))

    def __post_init__(self) -> None:
        for name in ("items", "output", "images", "adapter", "pca_from"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.tower_cache not in ("auto", "none"):
            object.__setattr__(self, "tower_cache", Path(self.tower_cache))
        for name in ("batch_size", "pca_dim", "shard_items", "tower_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pca_from is not None and self.pca == "none":
            raise ValueError(f"pca is 'none' but pca_from is {self.pca_from}")
        if self.fold and self.adapter is None:
            raise ValueError("fold is set but there is no adapter to fold")

    def inherited(self) -> dict[str, Any]:
        """What the model is shown, with the adapter's training settings where this configuration leaves them open."""
        settings: dict[str, Any] = {
            "image_instruction": PromptConfig().image_instruction,
            "fields": None,
            "pool_template": True,
            "min_pixels": ImageOptions().min_pixels,
            "max_pixels": ImageOptions().max_pixels,
            "seed": 0,
        }
        for source in (self.trained_with(), vars(self)):
            settings.update({name: source[name] for name in settings if source.get(name) is not None})
        return settings

    def tower_cache_folder(self) -> Path | None:
        """Where the tower's outputs are kept; None: nowhere."""
        if self.tower_cache != "auto":
            return None if self.tower_cache == "none" else Path(self.tower_cache)
        folder = self.trained_with().get("tower_cache", "none")
        return Path(folder) if folder != "none" and Path(folder).is_dir() else None

    def trained_with(self) -> dict[str, Any]:
        """The settings in the adapter's training.json; {} without one."""
        path = None if self.adapter is None else self.adapter / TRAINING_FILE
        if path is None or not path.is_file():
            return {}
        return json.loads(path.read_text(encoding="utf-8"))["settings"]


def embed(config: EmbedConfig) -> Path:
    """Write the table of a catalogue's item vectors (sda_fast.data.ItemVectors) and return its path.

    `image` and `text` are the pooled vectors at full width, `vectors` their reductions side by side. The reduction is
    written beside the table (`<name>.pca.safetensors`), so that later items can be brought into the same space.
    Intermediate files beside the table let a killed run continue; they are deleted at the end. A table that is there
    already and was made in the same way is kept; if only the reduction differs, nothing is encoded again. Under
    `accelerate launch` or `torchrun` the processes share the catalogue; the output folder must be one that all see.

    Raises:
        ValueError: a vector is not finite (the item is named), or the adapter does not fit the model.
        FileNotFoundError: no such model or adapter.
    """
    catalogue = read_items(config.items, config.images)
    log_differences(config)
    if config.adapter is not None:
        config = replace(config, adapter=adapter_folder(config.adapter))
    quantization = config.trained_with().get("quantization", config.quantization)
    if quantization != config.quantization:
        logger.warning("the adapter was trained with quantization %s, not %s", quantization, config.quantization)
    accelerator = Accelerator(cpu=config.device == "cpu")
    device = chosen_device(config.device, accelerator)
    encoding = _encoding(config, catalogue, device)
    encoding_key = digest(encoding)
    reduction: dict[str, Any] = {"pca": config.pca, "pca_dim": config.pca_dim, "pca_from": None}
    if config.pca_from is not None:
        reduction = {"pca": config.pca, "pca_dim": "", "pca_from": file_sha256(config.pca_from)}
    present = _metadata(config.output)
    if present.get("encoding_key") == encoding_key and all(present[k] == str(v) for k, v in reduction.items()):
        logger.info("%s is there already", config.output)
        return config.output

    shards = EmbeddingShards(config.output.with_name(config.output.name + ".parts"), encoding_key)
    plan = _plan(catalogue, encoding, config.shard_items)
    if present.get("encoding_key") != encoding_key:
        _encode_missing(config, catalogue, encoding, plan, shards, accelerator, device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if present.get("encoding_key") == encoding_key:
            table = read_item_vectors(config.output)
        else:
            table = _gather(catalogue, plan, shards)
            table.metadata.update({name: _word(value) for name, value in encoding.items()})
            table.metadata.update(encoding_key=encoding_key, versions=json.dumps(versions()))
        _reduce(table, config)
        table.metadata.update({name: str(value) for name, value in reduction.items()})
        write_item_vectors(config.output, table)
        shards.delete()
    accelerator.wait_for_everyone()
    return config.output


def _encoding(config: EmbedConfig, catalogue: Catalogue, device: torch.device) -> dict[str, Any]:
    """Everything that decides the full-width vectors beyond rounding."""
    model = Path(config.model)
    return {
        "model": config.model,
        "model_fingerprint": folder_fingerprint(model) if model.is_dir() else None,
        "adapter": None if config.adapter is None else str(config.adapter),
        "adapter_fingerprint": None
        if config.adapter is None
        else folder_fingerprint(config.adapter, ("adapter_config.json", "adapter_model.safetensors")),
        "quantization": config.quantization,
        "double_quant": config.double_quant,
        "dtype": str(activation_dtype(config.precision, device)).removeprefix("torch."),
        "items": catalogue_fingerprint(catalogue, pictures=True),
        "shown": config.inherited(),
    }


def _metadata(table: Path) -> dict[str, str]:
    """The header of a table; {} where there is none that can be read."""
    if not table.is_file():
        return {}
    try:
        with safe_open(str(table), framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        logger.warning("making %s again, it cannot be read: %s", table, error)
        return {}


@dataclass(frozen=True)
class _Work:
    """One shard to make: these places of the catalogue, in order of length."""

    modality: str
    index: int
    places: torch.Tensor


def _plan(catalogue: Catalogue, encoding: Mapping[str, Any], shard_items: int) -> list[_Work]:
    prompts, options = _shown(encoding)
    lengths = {
        "image": [image_area(item, options) for item in catalogue],
        "text": [len(attribute_text(item, prompts)) for item in catalogue],
    }
    return [
        _Work(modality, index, torch.tensor(places, dtype=torch.int64))
        for modality in MODALITIES
        for index, places in enumerate(length_buckets(lengths[modality], shard_items))
    ]


def _shown(encoding: Mapping[str, Any]) -> tuple[PromptConfig, ImageOptions]:
    shown = encoding["shown"]
    prompts = PromptConfig(**{name: shown[name] for name in ("image_instruction", "fields", "pool_template")})
    return prompts, ImageOptions(shown["min_pixels"], shown["max_pixels"], shown["seed"])


def _encode_missing(
    config: EmbedConfig,
    catalogue: Catalogue,
    encoding: Mapping[str, Any],
    plan: Sequence[_Work],
    shards: EmbeddingShards,
    accelerator: Accelerator,
    device: torch.device,
) -> None:
    """Make this process's share of the shards that are not there yet."""
    mine = plan[accelerator.process_index :: accelerator.num_processes]
    missing = [work for work in mine if shards.read(work.modality, work.index, work.places) is None]
    total = sum(len(work.places) for work in mine)
    progress = tqdm(
        total=total,
        initial=total - sum(len(work.places) for work in missing),
        desc="Embedding",
        unit="sequence",
        disable=not (config.progress and accelerator.is_main_process),
    )
    with progress:
        if not missing:
            return
        dtype = activation_dtype(config.precision, device)
        lvlm = load_lvlm(
            config.model,
            quantization=config.quantization,
            double_quant=config.double_quant,
            dtype=dtype,
            device=device,
            attention=attention_for(config.packing, read_config(config.model), device, dtype),
            progress=config.progress and accelerator.is_main_process,
        )
        if config.adapter is not None:
            load_adapter(lvlm.model, config.adapter)
        lvlm.model.eval()
        prompts, options = _shown(encoding)
        folder = config.tower_cache_folder()
        cache = None
        if folder is not None:
            cache = TowerCache(lvlm, folder, options, most_bytes=int(config.tower_cache_gib * 2**30))
        tower = Tower(lvlm, cache, group_size=config.tower_batch, offload=config.tower_offload)
        maker = BatchMaker(lvlm, prompts, options, packs=packed_modalities(config.packing, lvlm), cache=cache)
        batch_size = config.batch_size
        folded = None
        for work in missing:
            if config.fold and work.modality != folded:
                fold_model(lvlm.model, work.modality)
                folded = work.modality
            vectors: list[torch.Tensor] = []
            counts = {"tokens": 0, "slots": 0, "noise_images": 0}
            done = 0
            while done < len(work.places):
                items = [catalogue[int(place)] for place in work.places[done : done + batch_size]]
                chunk = maker.image_chunk(items) if work.modality == "image" else maker.text_chunk(items)
                try:
                    pooled = _encode_chunk(lvlm, tower, chunk, work.modality)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or batch_size == 1:
                        raise
                    pooled = None
                if pooled is None:
                    batch_size = (min(batch_size, len(items)) + 1) // 2
                    logger.warning("out of memory; going on with batches of %d items", batch_size)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                _check_finite(pooled, items, work.modality)
                vectors.append(pooled)
                counts["tokens"] += chunk.num_tokens
                counts["slots"] += chunk.num_slots
                counts["noise_images"] += int(chunk.tensors["is_noise"].sum()) if "is_noise" in chunk.tensors else 0
                done += len(items)
                progress.update(len(items))
            if cache is not None:
                cache.flush()
            shards.write(work.modality, work.index, Shard(work.places, torch.cat(vectors), counts))
        if cache is not None:
            logger.info("%s", cache)


def _encode_chunk(lvlm: LVLM, tower: Tower, chunk: Chunk, modality: str) -> torch.Tensor:
    """Vectors of a chunk, on the CPU."""
    with torch.no_grad():
        tower.complete([chunk])
        return encode(lvlm, chunk.tensors, modality, image_features=chunk.image_features, packed=chunk.packed).cpu()


def _check_finite(vectors: torch.Tensor, items: Sequence[Item], modality: str) -> None:
    bad = [item.item_id for item, row in zip(items, vectors, strict=True) if not torch.isfinite(row).all()]
    if bad:
        raise ValueError(f"the {modality} vectors of these items are not finite: {', '.join(bad)}")


def _gather(catalogue: Catalogue, plan: Sequence[_Work], shards: EmbeddingShards) -> ItemVectors:
    """The full-width vectors in the catalogue's order; `vectors` is still empty."""
    whole: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    for work in plan:
        shard = shards.read(work.modality, work.index, work.places)
        if shard is None:
            path = shards.path(work.modality, work.index)
            raise RuntimeError(f"{path} was made by another process but cannot be read here; is the folder shared?")
        if work.modality not in whole:
            whole[work.modality] = torch.full((len(catalogue), shard.vectors.shape[1]), torch.nan)
        whole[work.modality][work.places] = shard.vectors
        counts.update(shard.counts)
    padding = 1 - counts["tokens"] / counts["slots"]
    logger.info("%.1f%% of the tokens were padding; %d images were noise", 100 * padding, counts["noise_images"])
    metadata = {"padding": f"{padding:.4f}", "noise_images": str(counts["noise_images"])}
    nothing = np.empty((len(catalogue), 0), dtype=np.float32)
    return ItemVectors(catalogue.item_ids, whole["image"].numpy(), whole["text"].numpy(), nothing, metadata)


def _reduce(table: ItemVectors, config: EmbedConfig) -> None:
    """Fill `table.vectors` and write the fitted reduction beside the table."""
    full = {"image": torch.from_numpy(table.image), "text": torch.from_numpy(table.text)}
    path = config.output.with_suffix(".pca.safetensors")
    if config.pca == "none":
        table.vectors = np.concatenate([table.image, table.text], axis=1)
        path.unlink(missing_ok=True)
        return
    if config.pca_from is not None:
        fitted = read_pca(config.pca_from)
    elif config.pca == "joint":
        both = fit_pca(torch.cat(list(full.values())), config.pca_dim)
        fitted = dict.fromkeys(MODALITIES, both)
    else:
        fitted = {modality: fit_pca(vectors, config.pca_dim) for modality, vectors in full.items()}
    table.vectors = torch.cat([fitted[modality].transform(full[modality]) for modality in MODALITIES], dim=1).numpy()
    for modality in MODALITIES:
        table.metadata[f"explained_share_{modality}"] = f"{fitted[modality].explained_share:.4f}"
    write_pca(path, fitted)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
