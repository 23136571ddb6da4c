"""`MappedShards`: the shards of a folder, each opened and mapped once, for who reads many tensors of it.

A mapping that lives on keeps every page that was touched resident, until it is told to let go: `release` does that for
a tensor that is not needed any more, so that a pass over a folder holds one tensor and not all of them. The system
still has the pages in its cache.

What is read are views of the mapping, which is private: who writes into one changes nothing on disk. Files must not
shrink while anybody looks at them; that they hold what their header promised is checked once more when they are mapped.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from spicerack.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class MappedShards:
    """The shards in `folder`, mapped when they are first asked for, and unmapped when all that was read is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, file: str, begin: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of a shard, from byte `begin` on; nothing is read before it is looked at.

        Raises CheckpointError for a file that cannot be mapped, or that has become shorter.
        """
        import torch

        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        mapping = self._map(file)
        if begin + nbytes > len(mapping):
            raise CheckpointError(
                f"{self._folder / file} has {len(mapping)} bytes, its header promised {begin + nbytes}",
                "the file was changed while it was read: load it again",
            )
        return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=begin)

    def release(self, file: str, begin: int, nbytes: int) -> None:
        """Let go of the pages that hold these bytes and nothing else, where the system can.

        They are read again if somebody looks. What was written there is lost: for tensors that nobody keeps.
        """
        mapping = self._maps.get(file)
        first, last = -(-begin // mmap.PAGESIZE), (begin + nbytes) // mmap.PAGESIZE
        if mapping is not None and first < last and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def _map(self, file: str) -> mmap.mmap:
        """The whole shard. Raises CheckpointError."""
        if file not in self._maps:
            path = self._folder / file
            try:
                with path.open("rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}", "fetch the file again") from error
        return self._maps[file]
