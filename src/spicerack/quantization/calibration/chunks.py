"""`Text`: the calibration text in chunks, which is what runs through a block at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from spicerack.machine.ranks import Ranks
from spicerack.text.calibration import Calibration


@dataclass(frozen=True, slots=True)
class Text:
    """rows: sequences of a chunk."""

    calibration: Calibration
    rows: int

    @property
    def count(self) -> int:
        """Chunks, of all ranks."""
        return -(-len(self.calibration.ids) // self.rows)

    def chunks(self, ranks: Ranks) -> Iterator[tuple[int, slice]]:
        """A few sequences at a time, those that are this rank's, by number."""
        numbers = range(ranks.rank, self.count, ranks.count)
        return ((number, slice(number * self.rows, (number + 1) * self.rows)) for number in numbers)

    def inputs(self, some: slice | Sequence[int]) -> dict[str, torch.Tensor]:
        """What the model is called with, for these sequences."""
        some = some if isinstance(some, slice) else list(some)
        chunk = {"input_ids": self.calibration.ids[some]}
        if self.calibration.mask is not None:
            chunk["attention_mask"] = self.calibration.mask[some].long()
        return chunk


def tokens(x: torch.Tensor, chunk: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[tokens, K] without padding; layers that see other rows than tokens, such as experts, have none to drop."""
    rows = x.reshape(-1, x.shape[-1])
    mask = chunk.get("attention_mask")
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).bool()]
