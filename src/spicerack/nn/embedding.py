"""`QEmbedding`: nn.Embedding with packed rows, of which no more are decoded than a batch asks for."""

from __future__ import annotations

import torch
from torch import nn

from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.qtensor import QTensor


class QEmbedding(PackedLayer, nn.Embedding):
    """ids [...] -> rows [..., K] in the table's type: only the rows that are asked for are decoded, each once.

    packed        the table [rows, K]
    padding_idx   as in nn.Embedding; here it decides nothing, for a packed row has no gradient, and is kept for those
                  who open the layer again

    Raises IndexError for ids that are no row.
    """

    def __init__(self, packed: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx
        # What else a float table may do, none of which a packed one does (`kinds`).
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def of(
        cls,
        q: QTensor,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> QEmbedding:
        """The table q [rows, K], on `device`.

        dtype: of the result, as of the float table that it replaces. Raises SchemeError if no kernel holds the scheme
        there.
        """
        return cls(PackedWeight(q, dtype, device), padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] for ids [...] of any integer type; a row that is asked for twice is decoded once."""
        different, place = torch.unique(ids, return_inverse=True)
        return self.packed.rows(different)[place]
