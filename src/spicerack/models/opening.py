"""The door for strangers' models: whatever they lie in, they are a checkpoint behind it.

FILE.gguf             names, order of rows and config as transformers has them (`gguf.checkpoint`)
a folder, a hub id    as it is; a release in FP8 or MXFP4 as the floats that it stands for (`storage.released`), and
                      MLX's stacks of experts as experts one by one (`storage.stacks`)
"""

from __future__ import annotations

from pathlib import Path

from spicerack.storage import files, released, stacks
from spicerack.storage.reader import Checkpoint


def open_stored(model: str | Path) -> Checkpoint:
    """The checkpoint at a path or hub id as it lies there; headers are read, weights are not.

    model: a folder, a hub id, a .gguf file, or the first file of a split one. Raises CheckpointError.
    """
    path = files.local(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from spicerack.models.gguf.checkpoint import GgufCheckpoint  # folders are opened without it

        return GgufCheckpoint.open(path.resolve())
    return stacks.unstacked(Checkpoint.open(model))


def open_model(model: str | Path) -> Checkpoint:
    """The same, a release as the floats that it stands for. Raises CheckpointError."""
    return released.decoded(open_stored(model))


def told_pooling(file: Path) -> str | None:
    """How the sentence encoder in a .gguf file makes one vector of many, as the file says it; None where it does not.

    Raises CheckpointError.
    """
    from spicerack.models.gguf import config
    from spicerack.models.gguf.checkpoint import GgufCheckpoint

    checkpoint = GgufCheckpoint.open(file)
    return config.pooling(checkpoint.metadata, checkpoint.family)
