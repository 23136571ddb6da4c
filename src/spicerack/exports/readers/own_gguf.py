"""Our own second opinion on GGUF files, where gguf-py is not installed or does not decode one of their types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spicerack._version import __version__
from spicerack.exports.readers import _ggml, _gguf_weights
from spicerack.exports.readings import Weights
from spicerack.exports.source import Source


@dataclass(frozen=True, slots=True)
class OwnGguf:
    """Methods: `exports.verify.Reader`."""

    name: str = f"spicerack {__version__}'s second decoder of GGUF"
    foreign: bool = False

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Other formats."""
        return None if to == "gguf" else "it reads GGUF alone"

    def opened(self, path: Path, source: Source, /) -> Weights:
        """All files of the model, mapped."""
        return _gguf_weights.weights_of(_ggml.Table.of(_gguf_weights.files_of(path)), source)


READER = OwnGguf()
