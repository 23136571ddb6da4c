"""`QEmbedding`: nn.Embedding with packed rows."""

from __future__ import annotations

import torch

from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.qtensor import QTensor


class QEmbedding(PackedLayer):
    """ids [...] -> rows [..., K]: only the rows that are asked for are decoded, each once."""

    def __init__(self, packed: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx

    @classmethod
    def of(
        cls,
        q: QTensor,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> QEmbedding:
        """The table q [rows, K]; dtype is that of the result."""
        return cls(PackedWeight(q, dtype, device), padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found, place = torch.unique(ids, return_inverse=True)
        return self.packed.rows(found)[place]
