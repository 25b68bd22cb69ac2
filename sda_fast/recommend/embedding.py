"""Item vectors behind a small adapter, with the interface of an `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INITIAL_STD = 0.02


class ContentEmbedding(nn.Module):
    """Takes the place of an item embedding: a frozen table read through a two-layer adapter.

    Rows 0 ... n-1 are items; the rows after them are trained directly (padding, which stays zero, and the mask token
    of BERT4Rec). The table is centred and divided by its root mean square, and the adapter starts with outputs of
    standard deviation 0.02, the usual start of an ID embedding, so that both kinds train with the same settings.

    Args:
        table: [n, d] float, one row per item.
        embedding_dim: width of the output.
        hidden: width between the two layers.
        num_special: rows after the items; the first of them is the padding.
        activation: "gelu", "relu" or "none".

    Raises:
        ValueError: `table` is not two-dimensional or holds NaN or infinity.
    """

    table: Tensor

    def __init__(
        self, table: Tensor, embedding_dim: int, *, hidden: int = 768, num_special: int = 1, activation: str = "gelu"
    ) -> None:
        super().__init__()
        if table.dim() != 2:
            raise ValueError(f"table must be [items, width], got shape {tuple(table.shape)}")
        if not torch.isfinite(table).all():
            raise ValueError(f"table has {int((~torch.isfinite(table)).sum())} values that are NaN or infinite")
        self.num_items, self.embedding_dim = table.shape[0], embedding_dim
        self.num_embeddings = self.num_items + num_special
        self.padding_idx = self.num_items
        centred = table.float() - table.float().mean(0)
        self.register_buffer("table", centred / centred.square().mean().sqrt().clamp_min(1e-12), persistent=False)
        between: dict[str, nn.Module] = {"gelu": nn.GELU(), "relu": nn.ReLU(), "none": nn.Identity()}
        self.adapter = nn.Sequential(
            nn.Linear(table.shape[1], hidden), between[activation], nn.Linear(hidden, embedding_dim)
        )
        self.special = nn.Parameter(torch.empty(num_special, embedding_dim).normal_(std=INITIAL_STD))
        self._position_of_item: Tensor | None = None
        self._shared: Tensor | None = None
        with torch.no_grad():
            last: nn.Linear = self.adapter[2]  # type: ignore[assignment]
            last.bias.zero_()
            last.weight.mul_(INITIAL_STD / self.adapter(self.table).std().clamp_min(1e-12))

    @property
    def weight(self) -> Tensor:
        """[n + num_special, embedding_dim]: all rows, computed."""
        return self(torch.arange(self.num_embeddings, device=self.table.device))

    @contextmanager
    def shared(self, items: Tensor) -> Iterator[None]:
        """Run the adapter once for `items` (distinct, [m]) and serve every look-up inside the block from that."""
        position = torch.zeros(self.num_items, dtype=torch.long, device=items.device)
        position[items] = torch.arange(len(items), device=items.device)
        self._position_of_item, self._shared = position, self.adapter(self.table[items])
        try:
            yield
        finally:
            self._position_of_item = self._shared = None

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 ids -> [..., embedding_dim]."""
        if self._shared is None or self._position_of_item is None:
            items, position = ids.clamp_max(self.num_items - 1).unique(return_inverse=True)
            vectors = self.adapter(self.table[items])
        else:
            position, vectors = self._position_of_item[ids.clamp_max(self.num_items - 1)], self._shared
        padding = torch.zeros_like(self.special[:1])
        rows = torch.cat([vectors, padding, self.special[1:]])
        special = ids - self.num_items
        return nn.functional.embedding(torch.where(special >= 0, len(vectors) + special, position), rows)
