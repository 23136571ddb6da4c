"""`QEmbedding`: nn.Embedding with packed rows, of which no more are decoded than a batch asks for.

Some families multiply what they look up by a number (Gemma, by the square root of the width). That is their own class
of embedding; here it is a part of `Lookup`, so that one packed layer stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spicerack.errors import ShapeError
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics.qtensor import QTensor

_INDICES = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types that ids may have."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What an embedding is beside its numbers.

    padding_idx   as in nn.Embedding; to a packed table it means nothing, for its rows have no gradient
    scale         rows are multiplied by it; None: they are not
    rounded       the scale is rounded to the rows' type before that, as Gemma does
    """

    padding_idx: int | None = None
    scale: float | None = None
    rounded: bool = False

    @classmethod
    def of(cls, layer: Any) -> Lookup:
        """That of a float table, or of a layer in its place, which carries it or has the table's attributes.

        Raises ValueError for a scale that is not known yet: a tensor on the meta device, and no number beside it.
        """
        if isinstance(lookup := vars(layer).get("lookup"), Lookup):
            return lookup
        buffer = layer._buffers.get("embed_scale")
        scale = vars(layer).get("scalar_embed_scale", vars(layer).get("embed_scale", buffer))
        return cls(layer.padding_idx, None if scale is None else float(scale), buffer is not None)

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., K], as they are in the table -> as they are looked up."""
        if self.scale is None:
            return rows
        if not self.rounded:
            return rows * self.scale
        return rows * torch.tensor(self.scale, dtype=torch.float32, device=rows.device).to(rows.dtype)


class ScaledEmbedding(nn.Embedding):
    """A float table [rows, K] whose rows are scaled as `lookup` says, for those who open a packed one again."""

    def __init__(self, rows: int, columns: int, lookup: Lookup) -> None:
        super().__init__(rows, columns, lookup.padding_idx)
        self.lookup = lookup

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lookup.scaled(super().forward(ids))


class QEmbedding(PackedLayer, nn.Embedding):
    """ids [...] -> rows [..., K] in the table's type: only the rows that are asked for are decoded, each once.

    packed   the table [rows, K]
    lookup   what it is beside its numbers

    Raises IndexError for ids that are no row, ShapeError for ids that are no integers.
    """

    def __init__(self, packed: PackedWeight, lookup: Lookup | None = None) -> None:
        super().__init__(packed)
        self.lookup = lookup or Lookup()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = self.lookup.padding_idx
        # What else a float table may do, none of which a packed one does (`kinds`).
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def of(
        cls,
        q: QTensor,
        lookup: Lookup | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> QEmbedding:
        """The table q [rows, K], on `device`.

        dtype: of the result, as of the float table that it replaces. Raises SchemeError if no kernel holds the scheme
        there.
        """
        return cls(PackedWeight(q, dtype, device), lookup)

    @property
    def embed_scale(self) -> float | torch.Tensor:
        """As the float layer has it, for the code of families that ask."""
        if self.lookup.scale is None:
            raise AttributeError("its rows are not scaled")
        if not self.lookup.rounded:
            return self.lookup.scale
        return torch.tensor(self.lookup.scale, dtype=torch.float32, device=self.packed.device)

    def extra_repr(self) -> str:
        scale = "" if self.lookup.scale is None else f", scale={self.lookup.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{scale}"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] for ids [...] of any integer type; a row that is asked for twice is decoded once."""
        if ids.dtype not in _INDICES:
            raise ShapeError(f"ids are {ids.dtype}, and a table takes integers", "check the layer's input")
        if ids.is_meta:  # there are none that differ
            return self.lookup.scaled(self.packed.rows(slice(0, 1)).expand(*ids.shape, -1))
        different, place = torch.unique(ids, return_inverse=True)
        return self.lookup.scaled(self.packed.rows(different))[place]
