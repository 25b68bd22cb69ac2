"""Principal components of item vectors, deterministic in values and signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sda_fast.atomic import write_safetensors_atomic

_ROWS_PER_BLOCK = 8192


@dataclass(frozen=True)
class PCA:
    """A fitted reduction: `transform` subtracts `mean` [D] and multiplies by `components` [d, D] (orthonormal rows)."""

    mean: torch.Tensor
    components: torch.Tensor
    explained_variance: torch.Tensor
    total_variance: float

    @property
    def explained_share(self) -> float:
        """The share of the vectors' variance that the kept components hold, 0 to 1."""
        return float(self.explained_variance.sum()) / self.total_variance if self.total_variance > 0 else 1.0

    def transform(self, vectors: torch.Tensor) -> torch.Tensor:
        """[n, D] float32 to [n, d] float32; computed in float64, rounded once."""
        blocks = [(block.double() - self.mean) @ self.components.T for block in vectors.split(_ROWS_PER_BLOCK)]
        return torch.cat(blocks).float()


def fit_pca(vectors: torch.Tensor, num_components: int) -> PCA:
    """Fit principal components in float64.

    Args:
        vectors: [n, D].
        num_components: how many to keep; fewer are kept when D or n - 1 (the rank after centring) is smaller.
    Returns:
        Components in order of falling variance; in each, the entry of largest magnitude is positive.
    Raises:
        ValueError: no rows, num_components < 1, or a value is not finite.
    """
    if vectors.ndim != 2 or vectors.shape[0] == 0:
        raise ValueError(f"expected vectors [n, D] with n > 0, got shape {tuple(vectors.shape)}")
    if num_components < 1:
        raise ValueError(f"num_components must be at least 1, got {num_components}")
    if not torch.isfinite(vectors).all():
        row = int((~torch.isfinite(vectors)).any(dim=1).nonzero()[0])
        raise ValueError(f"row {row} of the vectors holds a value that is not finite")
    n, width = vectors.shape
    kept = min(num_components, width, max(n - 1, 1))
    mean = vectors.mean(dim=0, dtype=torch.float64)
    if n > width:
        # The D x D scatter matrix: rows are visited in blocks, so no float64 copy of the table is made.
        scatter = torch.zeros(width, width, dtype=torch.float64)
        for block in vectors.split(_ROWS_PER_BLOCK):
            centred = block.double() - mean
            scatter.addmm_(centred.T, centred)
        eigenvalues, eigenvectors = torch.linalg.eigh(scatter)
        variances = eigenvalues.flip(0).clamp_min(0)
        components = eigenvectors.flip(1).T
    else:
        _, singular_values, components = torch.linalg.svd(vectors.double() - mean, full_matrices=False)
        variances = singular_values.square()
    components = components[:kept]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0).to(components)
    divisor = max(n - 1, 1)
    return PCA(mean, components.contiguous(), variances[:kept] / divisor, float(variances.sum()) / divisor)


def write_pca(path: Path, fitted: Mapping[str, PCA]) -> None:
    """Write fitted reductions by name to one safetensors file, atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, pca in fitted.items():
        tensors[f"{name}.mean"] = pca.mean.clone()
        tensors[f"{name}.components"] = pca.components.clone()
        tensors[f"{name}.explained_variance"] = pca.explained_variance.clone()
        tensors[f"{name}.total_variance"] = torch.tensor(pca.total_variance, dtype=torch.float64)
    write_safetensors_atomic(path, tensors)


def read_pca(path: Path) -> dict[str, PCA]:
    """What `write_pca` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no reductions.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors = load_file(path)
    names = [name.removesuffix(".components") for name in tensors if name.endswith(".components")]
    if not names:
        raise ValueError(f"{path} holds no reductions but {sorted(tensors)}")
    return {
        name: PCA(
            tensors[f"{name}.mean"],
            tensors[f"{name}.components"],
            tensors[f"{name}.explained_variance"],
            float(tensors[f"{name}.total_variance"]),
        )
        for name in names
    }
