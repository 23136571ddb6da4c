"""How long a folder takes to open: the call of `load`, and a first result of 16 tokens behind it; warm and cold.

Folders take turns, as in `turns.py`, and the first round does not count: it imports what a model's class needs and
fills the page cache. Models are let go before the next is opened, so that one is in memory at a time. Cold is measured
where the system drops files from its cache when it is asked to, which Linux does for files that nobody has mapped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from spicerack.models.inputs import check_text, limits
from spicerack.models.opening import open_stored

TOKENS, ROUNDS = 16, 3
"""Of a first result; rounds that count."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Seconds, medians.

    load    of the call, with the files in the page cache
    first   from there to the end of a first result
    cold    as `first`, with the files dropped from the page cache before; None where the system does not do that
    """

    load: float
    first: float
    cold: float | None

    def as_dict(self) -> dict[str, float]:
        """Keys of a row of the command line's contract."""
        cold = {} if self.cold is None else {"open_cold_s": self.cold}
        return {"open_load_s": self.load, "open_s": self.first, **cold}


def open_in_turns(
    loads: Mapping[str, tuple[Path, Callable[[], PreTrainedModel]]], progress: Callable[[float], None], *, head: bool
) -> dict[str, Opening]:
    """Open each folder warm and cold, in turns.

    loads: name -> (folder, what loads it). progress: called with the share of openings that is done. head: whether the
    models are to make logits, or hidden states; raises UsageError for those that do not, of text alone.
    """
    warm: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
    cold: dict[str, list[float]] = {name: [] for name in loads}
    turns = [(number, name) for number in range(ROUNDS + 1) for name in loads]
    for done, (number, name) in enumerate(turns):
        folder, load = loads[name]
        if number:
            if _drop(folder):
                cold[name].append(_open(load)[1])
            warm[name].append(_open(load))
        else:
            check_text(load(), head=head)
        progress((done + 1) / len(turns))
    return {
        name: Opening(
            median(load for load, _ in warm[name]),
            median(first for _, first in warm[name]),
            median(cold[name]) if cold[name] else None,
        )
        for name in loads
    }


@torch.no_grad()
def _open(load: Callable[[], PreTrainedModel]) -> tuple[float, float]:
    """Seconds of one load, and from its beginning to the end of a first result."""
    begin = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    most = limits(model, model.config)
    tokens = torch.arange(min(TOKENS, *(n for n in (most.positions, most.vocabulary) if n)), device=model.device)[None]
    model(input_ids=tokens)[0].cpu()  # which waits for a GPU
    return loaded - begin, time.perf_counter() - begin


def _drop(folder: Path) -> bool:
    """Drop a folder's weights from the page cache; False where the system has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in open_stored(folder).weight_files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
