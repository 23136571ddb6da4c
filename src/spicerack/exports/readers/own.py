"""Our own second opinion, in numpy, for formats whose engine is not installed: bit by bit, from their descriptions.

It shares nothing with what writes: no packing, no QTensor, no scheme. Slow where that code is fast, and short.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from spicerack._version import __version__
from spicerack.errors import OutputError
from spicerack.exports.readers._described import DECODERS, array, matrix, ours
from spicerack.exports.readings import Grid, Weights
from spicerack.exports.source import Source
from spicerack.storage.files import CONTAINER
from spicerack.storage.reader import Checkpoint
from spicerack.storage.stacks import unstacked


@dataclass(frozen=True, slots=True)
class Own:
    """Methods: `exports.verify.Reader`."""

    name: str = f"spicerack {__version__}'s second decoder"
    foreign: bool = False

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Formats that are not described here."""
        return None if to in (*DECODERS, CONTAINER) else f"{to} is not decoded here"

    def opened(self, path: Path, source: Source, /) -> Weights:
        """From files and config.json alone. Raises OutputError for a folder that nobody would know."""
        checkpoint = unstacked(Checkpoint.open(path)).held()
        if checkpoint.config.get("model_type") == CONTAINER:
            return partial(_contained, checkpoint, source)
        section = checkpoint.config.get("quantization_config", {})
        method = section.get("quant_method", "mlx" if "quantization" in checkpoint.config else None)
        if method not in DECODERS:
            raise OutputError(f"config.json says {method!r}, which is no format", "this is a fault of spicerack")
        return partial(_weights, checkpoint, source)


def _weights(checkpoint: Checkpoint, source: Source, name: str) -> torch.Tensor | Grid:
    """One tensor: decoded where the source has it packed, else as it lies there."""
    module = name.removesuffix(".weight")
    if module not in source.contents:
        return checkpoint.read(name)
    return matrix(checkpoint, module)


def _contained(checkpoint: Checkpoint, source: Source, name: str) -> torch.Tensor | Grid:
    """One tensor of our own container."""
    module = name.removesuffix(".weight")
    stored = source.contents.get(module)
    if stored is None:
        return checkpoint.read(name)
    return ours(partial(array, checkpoint, module), stored.scheme, stored.shape)


READER = Own()
