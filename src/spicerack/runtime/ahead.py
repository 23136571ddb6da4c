"""`Ahead`: the packed weights of a folder, laid out for their kernels while transformers still builds the model.

What a weight is laid out as depends on its scheme, its shape and this processor, which headers tell; and laying it out
is native code that needs no interpreter. So it begins when a folder is opened, in a thread beside the one that builds
the model, on as many native threads as torch has, and the disk is read meanwhile. Weights go from the mapped files
into panels a batch at a time; the pages of a batch are let go when it is done, so that besides what is packed no more
than a batch is in memory.

What this leaves alone is packed when its turn comes (`slots.fill`): experts in one tensor, schemes and devices that no
kernel stages, and codes that are no levels, which the format then names.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from spicerack.errors import SchemeError
from spicerack.kernels import kernel, panels
from spicerack.kernels.kernel import Choice, Compute, Kernel
from spicerack.kernels.panels import Room
from spicerack.numerics.scheme import Scheme
from spicerack.runtime.folder import Folder
from spicerack.storage.format import StoredTensor

_BATCH = 32 << 20
"""Bytes of packed tensors that are laid out at once. Each batch waits for the interpreter's lock, which the thread that
builds the model gives up every 5 ms. Chosen, and not measured."""


@dataclass(frozen=True, slots=True)
class Way:
    """How packed layers will run, as in `load`.

    device    where they will be
    compute   what weight-only schemes multiply with; None: the default there
    engine    an instruction set; None: the fastest
    """

    device: str | torch.device
    compute: Compute | None = None
    engine: str | None = None


class Choices:
    """The kernels of a folder's weights: those that are alike are asked for once."""

    def __init__(self, way: Way) -> None:
        self._way, self._known = way, dict[tuple[Scheme, tuple[int, int], torch.dtype], Choice]()

    def pick(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Choice:
        """See `kernel.pick`. Raises SchemeError if no kernel runs it."""
        key, way = (scheme, shape, dtype), self._way
        if key not in self._known:
            self._known[key] = kernel.pick(scheme, shape, dtype, torch.device(way.device), way.compute, way.engine)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Ready:
    """A weight that is laid out: for which kernel, and its tensors."""

    kernel: Kernel
    tensors: dict[str, torch.Tensor]


class Ahead:
    """Begins to lay out a folder's packed weights when it is made; a `with` block does not end before it has."""

    def __init__(self, folder: Folder, way: Way) -> None:
        self._folder, self._choices = folder, Choices(way)
        self._pool = ThreadPoolExecutor(1)
        self._work: Future[dict[str, Ready]] = self._pool.submit(self._run, torch.get_num_threads())

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def result(self) -> dict[str, Ready]:
        """Module in the checkpoint's names -> its weight, of all that could be laid out; waits until they are.

        Raises CheckpointError for scales that no folder of ours has.
        """
        return self._work.result()

    def _run(self, threads: int) -> dict[str, Ready]:
        ready: dict[str, Ready] = {}
        rooms: list[Room] = []
        for batch in self._batches():
            room = Room(sum(_nbytes(stored) for stored, _ in batch), huge=not rooms or rooms[-1].huge)
            rooms.append(room)
            staged = {}
            for stored, row in batch:
                undecoded = self._folder.undecoded(stored)
                if undecoded is not None and row.stage is not None:
                    staged[stored.module] = row.stage(undecoded, room), row
            levels = panels.fill([one for one, _ in staged.values()], threads)
            for (module, (one, row)), good in zip(staged.items(), levels, strict=True):
                if good:
                    ready[module] = Ready(row, one.tensors)
            for stored, _ in batch:
                self._folder.release(stored)
        panels.merge(rooms)
        return ready

    def _batches(self) -> Iterator[list[tuple[StoredTensor, Kernel]]]:
        """Weights that their kernels may stage, in the order of the disk, about _BATCH bytes at a time."""
        batch: list[tuple[StoredTensor, Kernel]] = []
        size = 0
        for stored in self._folder.contents.values():
            row = self._kernel(stored)
            if row is None or row.stage is None:
                continue
            batch.append((stored, row))
            size += _nbytes(stored)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _kernel(self, stored: StoredTensor) -> Kernel | None:
        """The kernel for floats of any type: which of them a layer has is known when the model is built."""
        if len(stored.shape) != 2:
            return None
        rows, columns = stored.shape
        try:
            return self._choices.pick(stored.scheme, (rows, columns), torch.float32).kernel
        except SchemeError:  # who fills the slot says so
            return None


def _nbytes(stored: StoredTensor) -> int:
    """Bytes of the codes of a matrix, at most: nobody lays them out in more than their bits, and a whole tile."""
    rows, columns = stored.shape
    return panels.nbytes(stored.scheme, (rows, columns))
