"""A folder that `quantize` wrote, as a planner sees it: the float model of its ledger, in the bytes that are there."""

from __future__ import annotations

from pathlib import Path

from spicerack.errors import CheckpointError
from spicerack.models.opening import open_model as open_folder
from spicerack.models.overview import source_of
from spicerack.planning.model import Model, of_checkpoint
from spicerack.planning.precisions import Precision
from spicerack.storage import ledger
from spicerack.storage.files import LEDGER


def open_written(folder: str | Path) -> tuple[Model, Precision]:
    """The model that a folder of ours was made from, and the numbers that it is in: headers and ledger are read.

    Raises CheckpointError for a folder without a ledger, or without a language model that is known.
    """
    checkpoint = open_folder(folder)
    written = ledger.read(checkpoint.folder)
    if written is None:
        raise CheckpointError(f"{checkpoint.folder} has no {LEDGER}", "give a folder that spicerack quantize wrote")
    model = of_checkpoint(str(folder), source_of(checkpoint, written))
    nbytes = {entry.tensor: entry.bytes_after for entry in written.entries}
    weights = [entry for entry in written.entries if entry.action == "quantize"]
    numbers = sum(entry.numel for entry in weights)
    bits = 8 * sum(entry.bytes_after for entry in weights) / numbers if numbers else 16.0

    def weigh(model: Model) -> list[int]:
        """As the ledger has it."""
        return [nbytes[weight.entry.name] * weight.count for weight in model.weights]

    return model, Precision(written.recipe or "as saved", bits, weigh)
