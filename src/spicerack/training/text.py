"""Training text: packed once into rows of one length, in a file that is mapped, and the order in which they come.

The source is streamed: neither it nor its tokens are ever in memory as a whole. If it has more rows than a run looks
at, each is as likely as any other to be taken (Vitter's algorithm R, ACM TOMS 11, 1985).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError
from spicerack.storage.durable import json_bytes, read_json, write_atomically
from spicerack.text import calibration, documents
from spicerack.text.calibration import Calibration
from spicerack.text.packing import Packing, Reading

BYTES_A_TOKEN = 8
"""Text that is tokenized for each token wanted: about twice as much."""
LEAST_BYTES = 1 << 20
HELD_OUT = 128
"""Rows that are evaluated on, at most."""
_SHARE = 100
"""One row in so many is held out where there is no text for that."""
_CHECKED = 64
"""Rows that are looked at for unknown tokens and the like."""
_SEED = 0
"""Which rows are taken does not depend on a run's seed, so that runs with several seeds see the same text."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """tokens int32 [R, L], mapped. sha256: of them. notes: sentences on what was not as asked for."""

    tokens: torch.Tensor
    sha256: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, numbers: Sequence[int]) -> torch.Tensor:
        """int64 [len(numbers), L]."""
        return self.tokens[list(numbers)].long()


def pack(source: str | Path, tokenizer: PreTrainedTokenizerBase, file: Path, *, length: int, most: int) -> Rows:
    """At most `most` rows of `length` tokens from `source`, kept in `file`; what is there already is taken as it is.

    source: as for calibration: text, JSON lines, a folder of those, a dataset. Raises TextError where there is not one
    row, or text that is no use.
    """
    record = file.with_suffix(".json")
    known = read_json(record)
    if known is None:
        known = _pack(source, tokenizer, file, length=length, most=most)
        write_atomically(record, json_bytes(known))
    tokens = np.memmap(file, dtype=np.int32, mode="c", shape=(known["rows"], length))
    rows = Rows(torch.from_numpy(tokens), known["sha256"], tuple(known["notes"]))
    some = rows.ids(range(min(len(rows), _CHECKED)))
    checked = calibration.checked(Calibration(some, None, rows.sha256, 0.0, str(source), ()), tokenizer)
    return Rows(rows.tokens, rows.sha256, (*rows.notes, *checked.notes))


def _pack(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, file: Path, *, length: int, most: int
) -> dict[str, Any]:
    found = documents.find(source)
    budget = max(BYTES_A_TOKEN * most * length, LEAST_BYTES)
    reading = Reading(
        share=1.0 if found.dataset else min(budget / max(found.size, 1), 1.0),
        limit=budget if found.dataset else None,
        seed=_SEED,
    )
    packing = Packing(tokenizer, length)
    rng = random.Random(_SEED)
    seen = 0
    with file.open("wb") as out:
        passages = documents.passages(found, tokenizer, by_line=False, seed=_SEED)
        for row in packing.sequences(reading.keep(passages)):
            place = seen if seen < most else int(rng.random() * (seen + 1))
            seen += 1
            if place < most:
                out.seek(4 * place * length)
                out.write(np.array(row, dtype=np.int32).tobytes())
    if not seen:
        raise TextError(
            f"{source} has {packing.seen} tokens, and one sequence needs {length}",
            f"give a longer text, or use sequences of {max(packing.seen, 2)} tokens or fewer",
        )
    notes = []
    if reading.share < 1:
        notes.append(f"{source}: rows were chosen from {reading.share:.2%} of the text, spread over all of it")
    if reading.stopped:
        notes.append(f"{source}: rows are of the first {reading.documents} documents of the shuffled dataset")
    digest = hashlib.sha256()
    with file.open("rb") as made:
        while piece := made.read(1 << 20):
            digest.update(piece)
    return {"rows": min(seen, most), "sha256": digest.hexdigest(), "notes": notes}


class Order(Dataset[tuple[int, torch.Tensor]]):
    """What a run sees, `count` rows in all: (number, int64 [L]), the rows shuffled anew each time through them."""

    def __init__(self, rows: Rows, numbers: torch.Tensor, count: int, seed: int) -> None:
        self.rows, self.numbers, self.count, self.seed = rows, numbers, count, seed
        self._shuffled: tuple[int, torch.Tensor] = (-1, numbers)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        times, place = divmod(index, len(self.numbers))
        if self._shuffled[0] != times:
            generator = torch.Generator().manual_seed(self.seed + times)
            self._shuffled = times, self.numbers[torch.randperm(len(self.numbers), generator=generator)]
        number = int(self._shuffled[1][place])
        return number, self.rows.ids([number])[0]


def split(count: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of rows to train on and, chosen among all `count`, of those that are held out, int64, in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    return order[held:].sort().values, order[:held].sort().values


def prepare(
    data: str | Path,
    held_out: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    length: int,
    batch: int,
    steps: int,
) -> tuple[Rows, torch.Tensor, tuple[Rows, torch.Tensor]]:
    """Packed rows, the numbers of those to train on, and rows and numbers that are held out, in files in `folder`.

    Raises TextError where there is not enough for one batch.
    """
    most = steps * batch
    spare = 0 if held_out is not None else max(min(most // _SHARE, HELD_OUT), 1)
    rows = pack(data, tokenizer, folder / "text.bin", length=length, most=most + spare)
    if spare:
        spare = max(min(spare, len(rows) // _SHARE), 1)
    numbers, apart = split(len(rows), spare)
    if len(numbers) < batch:
        raise TextError(
            f"{data} has {len(numbers)} sequences of {length} tokens to train on, a batch needs "
            f"{batch}", "give a longer text, or use a smaller batch or length",
        )  # fmt: skip
    if held_out is None:
        return rows, numbers, (rows, apart)
    held = pack(held_out, tokenizer, folder / "held_out.bin", length=length, most=HELD_OUT)
    return rows, numbers, (held, torch.arange(len(held)))
