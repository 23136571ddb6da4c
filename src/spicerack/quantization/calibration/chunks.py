"""`Text`: the calibration text in chunks, which run through a block at once; and whether a model can take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from spicerack.errors import UsageError
from spicerack.machine.ranks import Ranks
from spicerack.models.architecture import on_meta
from spicerack.models.blocks.find import repeated
from spicerack.models.inputs import limits
from spicerack.models.kind import obstacle
from spicerack.quantization.job import Job
from spicerack.quantization.rotation import original
from spicerack.text.calibration import Calibration

_WITHOUT = "quantize it without --calib"
"""What helps where a model cannot be calibrated."""


@dataclass(frozen=True, slots=True)
class Text:
    """The calibration text, cut into chunks, which are what runs through a block at once.

    calibration   ids int64 [S, L], and a mask where there is padding
    rows          sequences of a chunk; the last may have fewer
    """

    calibration: Calibration
    rows: int

    @property
    def count(self) -> int:
        """Number of chunks, those of all ranks."""
        return -(-len(self.calibration.ids) // self.rows)

    def chunks(self, ranks: Ranks) -> Iterator[tuple[int, slice]]:
        """The chunks that are this rank's, in the order of the text: their number, and which sequences they are."""
        numbers = range(ranks.rank, self.count, ranks.count)
        return ((number, slice(number * self.rows, (number + 1) * self.rows)) for number in numbers)

    def inputs(self, sequences: slice | Sequence[int]) -> dict[str, torch.Tensor]:
        """What the model is called with for these sequences: input_ids [B, L], attention_mask if there is padding."""
        rows = sequences if isinstance(sequences, slice) else list(sequences)
        inputs = {"input_ids": self.calibration.ids[rows]}
        if self.calibration.mask is not None:
            inputs["attention_mask"] = self.calibration.mask[rows].long()
        return inputs


def tokens(x: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens of x [..., K], [tokens, K], without the padding that `inputs`, the model's, mark.

    Layers that see other rows than tokens, such as experts, have no padding to drop.
    """
    rows = x.reshape(-1, x.shape[-1])
    mask = inputs.get("attention_mask")
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).bool()]


def check(job: Job, calibration: Calibration) -> None:
    """Asked before any work, of config.json and headers: can the model be calibrated, and with this text?

    Raises UsageError for a model that text cannot be run through block by block, and for text that does not fit it. A
    model that transformers does not know is tried as it is.
    """
    source = original(job.source)
    if reason := obstacle(source.config):
        raise UsageError(f"{source.folder} {reason}", _WITHOUT)
    model = on_meta(source.config)
    if model is None:
        return
    repeated(model)
    given = limits(model, model.config)
    given.check_ids(calibration.ids)
    given.check_length(calibration.ids.shape[1], "--length")
