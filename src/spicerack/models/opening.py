"""The door for strangers' models: whatever they lie in, they are a checkpoint behind it.

FILE.gguf             names, order of rows and config as transformers has them (`gguf.checkpoint`)
a folder, a hub id    as it is; a release in FP8 or MXFP4 as the floats that it stands for (`storage.released`)
"""

from __future__ import annotations

from pathlib import Path

from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.storage import files, released
from spicerack.storage.reader import Checkpoint


def open_model(model: str | Path) -> Checkpoint:
    """The checkpoint at a path or hub id; headers are read, weights are not.

    model: a folder, a hub id, a .gguf file, or the first file of a split one. Raises CheckpointError.
    """
    path = files.local(model)
    if path.suffix == ".gguf" and path.is_file():
        return GgufCheckpoint.open(path.resolve())
    return released.decoded(Checkpoint.open(model))
