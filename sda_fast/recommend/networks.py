"""cornac's sequence networks, seen through one interface: hidden states of every position, and candidates.

cornac trains SASRec and BERT4Rec on one prefix per position, each padded to the full length, and scores one user at a
time. The networks themselves are cornac's and unchanged here; what is added is access to all positions at once, batches
cut to their longest row (positions count from the right, so the result is that of the full length), and the exchange of
the item embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from cornac.models import GRU4Rec, SASRec, TransformerRec
from cornac.models.gru4rec.gru4rec import GRU4RecModel
from cornac.models.recommender import NextItemRecommender
from cornac.models.sasrec.sasrec import SASRecModel
from cornac.models.transformer_rec.transformer_rec import TransformerRecModel
from torch import Tensor, nn

from sda_fast.recommend.config import RecommendConfig


class SequenceNetwork(nn.Module):
    """A cornac network. Item ids are 0 ... num_items - 1, padding is num_items; rows are padded on the left.

    Attributes:
        inner: the cornac module.
        masked: whether it is trained by masking items (and asked by a mask at the end) rather than by the next item.
    """

    embedding_name = "item_emb"
    num_special = 1
    masked = False

    def __init__(self, inner: nn.Module, num_items: int, max_length: int) -> None:
        super().__init__()
        self.inner: Any = inner
        self.num_items, self.max_length = num_items, max_length

    @property
    def embedding(self) -> nn.Module:
        return getattr(self.inner, self.embedding_name)

    def replace_embedding(self, module: nn.Module) -> None:
        """Put `module`, with an `nn.Embedding`'s interface, in the place of the item embedding."""
        setattr(self.inner, self.embedding_name, module)

    def item_vectors(self) -> Tensor:
        """[num_items, D] without gradient: the embeddings of all items."""
        with torch.no_grad():
            return self.embedding(torch.arange(self.num_items, device=next(self.parameters()).device))

    def hidden_states(self, sequences: Tensor) -> Tensor:
        """[B, T] int64 ids, T at most max_length -> [B, T, D]."""
        raise NotImplementedError

    def last_states(self, histories: Tensor) -> Tensor:
        """[B, T] int64 ids -> [B, D]: what is compared with the items that could come next."""
        return self.hidden_states(histories[:, -self.max_length :])[:, -1]

    def biases(self, items: Tensor) -> Tensor | None:
        """[C] item ids -> [C], or None where the network has no item biases."""
        return None

    def to_cornac(self) -> NextItemRecommender:
        """The stock cornac recommender with this network, ready for its `score`."""
        raise NotImplementedError

    def _adopt(self, recommender: Any) -> NextItemRecommender:
        recommender.model = self.inner
        recommender.pad_idx = self.num_items
        recommender.num_items = self.num_items
        recommender.iid_map = dict.fromkeys(range(self.num_items))
        return recommender


class _RightAligned(nn.Module):
    """Position embedding that numbers a shorter row as the right end of a row of full length."""

    def __init__(self, positions: nn.Embedding, max_length: int) -> None:
        super().__init__()
        self.positions, self.max_length = positions, max_length

    def forward(self, positions: Tensor) -> Tensor:
        return self.positions(positions + (self.max_length - positions.shape[1]))


class SASRecNetwork(SequenceNetwork):
    """cornac's SASRecModel; its `_encode` returns the last position only, so the last layer norm is read by a hook."""

    def __init__(self, num_items: int, config: RecommendConfig) -> None:
        inner = SASRecModel(
            item_num=num_items,
            embedding_dim=config.embedding_dim,
            maxlen=config.max_length,
            n_layers=config.num_blocks,
            n_heads=config.num_heads,
            use_biases=False,
            dropout=config.dropout,
            pad_idx=num_items,
        )
        inner.pos_emb = _RightAligned(inner.pos_emb, config.max_length)  # type: ignore[assignment]
        super().__init__(inner, num_items, config.max_length)

    def hidden_states(self, sequences: Tensor) -> Tensor:
        states: list[Tensor] = []
        hook = self.inner.last_layernorm.register_forward_hook(lambda module, inputs, output: states.append(output))
        try:
            self.inner._encode(sequences)
        finally:
            hook.remove()
        return states[0]

    def to_cornac(self) -> NextItemRecommender:
        return self._adopt(SASRec(max_len=self.max_length))


class BERT4RecNetwork(SequenceNetwork):
    """cornac's TransformerRecModel with its BERT backbone, trained by masking as the paper's authors did."""

    num_special = 2
    masked = True

    def __init__(self, num_items: int, config: RecommendConfig) -> None:
        inner = TransformerRecModel(
            item_num=num_items,
            backbone="bert",
            embedding_dim=config.embedding_dim,
            maxlen=config.max_length,
            n_layers=config.num_blocks,
            n_heads=config.num_heads,
            dropout=config.dropout,
        )
        super().__init__(inner, num_items, config.max_length)

    @property
    def mask_id(self) -> int:
        return self.num_items + 1

    def hidden_states(self, sequences: Tensor) -> Tensor:
        length = sequences.shape[1]
        positions = torch.arange(self.max_length - length, self.max_length, device=sequences.device)
        return self.inner.encode(sequences, position_ids=positions[None])

    def last_states(self, histories: Tensor) -> Tensor:
        mask = torch.full_like(histories[:, :1], self.mask_id)
        return super().last_states(torch.cat([histories, mask], dim=1))

    def biases(self, items: Tensor) -> Tensor | None:
        return self.inner.item_biases(items)[:, 0]

    def to_cornac(self) -> NextItemRecommender:
        recommender = TransformerRec(backbone="bert", objective="mlm", max_len=self.max_length)
        recommender.pad_idx, recommender.mask_idx = self.num_items, self.mask_id
        recommender.objective_ = recommender._build_objective()
        return self._adopt(recommender)


class GRU4RecNetwork(SequenceNetwork):
    """cornac's GRU4RecModel with tied embeddings, unrolled over whole rows (cornac truncates after every step)."""

    embedding_name = "Wy"

    def __init__(self, num_items: int, config: RecommendConfig) -> None:
        self.layers = [config.embedding_dim] * max(1, config.num_blocks // 2)
        inner = GRU4RecModel(
            n_items=num_items,
            layers=self.layers,
            dropout_p_embed=config.dropout,
            dropout_p_hidden=config.dropout,
            constrained_embedding=True,
        )
        inner.Wy.sparse = inner.By.sparse = False
        super().__init__(inner, num_items, config.max_length)

    def hidden_states(self, sequences: Tensor) -> Tensor:
        inputs = self.inner.DE(self.embedding(sequences))
        present = (sequences != self.num_items).unsqueeze(-1)
        hidden = [inputs.new_zeros(len(sequences), width) for width in self.layers]
        states = []
        for step in range(sequences.shape[1]):
            states.append(self.inner.hidden_step(inputs[:, step], hidden, training=self.training))
            hidden = [state * present[:, step] for state in hidden]
        return torch.stack(states, dim=1)

    def biases(self, items: Tensor) -> Tensor | None:
        return self.inner.By(items)[:, 0]

    def to_cornac(self) -> NextItemRecommender:
        return self._adopt(GRU4Rec(layers=self.layers))


def build_network(name: str, num_items: int, config: RecommendConfig) -> SequenceNetwork:
    """A freshly initialised "sasrec", "bert4rec" or "gru4rec" with an ID embedding."""
    networks = {"sasrec": SASRecNetwork, "bert4rec": BERT4RecNetwork, "gru4rec": GRU4RecNetwork}
    return networks[name](num_items, config)
