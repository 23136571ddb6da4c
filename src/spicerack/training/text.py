"""Training text: packed once into rows of one length, in a file that is mapped, and the order in which they come.

How it works. The source is streamed through the tokenizer: neither it nor its tokens are ever in memory as a whole.
Each row of `length` tokens is written to its place in a file of int32, which is mapped afterwards, so that a run's
memory does not grow with its text, and what was packed is there when the run is started again. If the source has more
rows than a run looks at, each is as likely as any other to be taken (Vitter's algorithm R, ACM TOMS 11, 1985): the n-th
row replaces a random one of those before it with probability most / n. The order of rows is a function of the seed and
of their number in the run, so that no checkpoint has to hold a position.

What is given up. Rows are cut without regard to sentences, and a document's end is followed by the next one in the same
row, told apart by the tokenizer's end token only. Nothing is padded, so every row costs the same and the mean over
micro-batches is that of the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError, counted
from spicerack.storage.durable import json_bytes, read_json, write_atomically
from spicerack.text import calibration, documents
from spicerack.text.calibration import Calibration
from spicerack.text.packing import Packing, Reading
from spicerack.text.pieces import sha256_of

BYTES_A_TOKEN = 8
"""Text that is tokenized for each token wanted: about twice as much as is used, at the four bytes a token that English
has in common vocabularies."""
LEAST_BYTES = 1 << 20
"""Text that is tokenized at least, if there is so much: a short run, too, sees rows from all over it."""
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
    """A packed text.

    tokens   int32 [R, L], mapped from its file
    sha256   of them
    notes    sentences on what was not as asked for
    """

    tokens: torch.Tensor
    sha256: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, numbers: Sequence[int]) -> torch.Tensor:
        """The rows with these numbers, int64 [len(numbers), L]: a copy in memory."""
        return self.tokens[list(numbers)].long()


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some rows of a packed text: those with these numbers, int64 [n]."""

    rows: Rows
    numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """What a run learns from, and what it is measured on: of two texts, or two parts of one that have no row in common.

    train      rows to learn from
    held_out   rows to measure on, `HELD_OUT` of them at most
    """

    train: Subset
    held_out: Subset

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was not as asked for, each once."""
        return tuple(dict.fromkeys((*self.train.rows.notes, *self.held_out.rows.notes)))


class Order(Dataset[tuple[int, torch.Tensor]]):
    """What a run sees, `count` rows in all: (number, int64 [L]), the rows shuffled anew each time through them.

    subset   the rows to learn from
    count    rows of the whole run: its steps times its batch
    seed     of the shuffles

    Any place can be asked for at once, as a run does that continues: the shuffle of each time through the rows is
    seeded by `seed` and by how often they were seen before.
    """

    def __init__(self, subset: Subset, count: int, seed: int) -> None:
        self.subset, self.count, self.seed = subset, count, seed
        self._shuffled: tuple[int, torch.Tensor] = (-1, subset.numbers)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        numbers = self.subset.numbers
        times, place = divmod(index, len(numbers))
        if self._shuffled[0] != times:  # one shuffle is kept: rows are asked for in order
            generator = torch.Generator().manual_seed(self.seed + times)
            self._shuffled = times, numbers[torch.randperm(len(numbers), generator=generator, device="cpu")]
        number = int(self._shuffled[1][place])
        return number, self.subset.rows.ids([number])[0]


def read(
    data: str | Path,
    held_out: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    length: int,
    batch: int,
    steps: int,
) -> Corpus:
    """The text of a run, packed into files in `folder`: what is learned from, and what is measured on.

    data        what is learned from: a text file, JSON lines, a folder of those, or a dataset
    held_out    what is measured on, the same kinds of source; None: one row of `data` in a hundred, at most 128
    tokenizer   the model's
    folder      exists; what was packed there before is taken as it is
    length      tokens of a row
    batch       rows of a step
    steps       of the run, which so looks at steps x batch rows

    Raises TextError where there is not enough for one batch, or text that is no use.
    """
    most = steps * batch
    spare = 0 if held_out is not None else max(min(most // _SHARE, HELD_OUT), 1)
    # so many rows more than are trained on; of a text that has fewer, one in a hundred after all
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
        return Corpus(Subset(rows, numbers), Subset(rows, apart))
    other = pack(held_out, tokenizer, folder / "held_out.bin", length=length, most=HELD_OUT)
    return Corpus(Subset(rows, numbers), Subset(other, torch.arange(len(other), device="cpu")))


def split(count: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of rows to train on and, chosen among all `count`, of the `held` that are held out, int64, in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED), device="cpu")
    return order[held:].sort().values, order[:held].sort().values


@dataclass(frozen=True, slots=True)
class _Record:
    """What is written down beside a packed file, once it is whole: its shape, its hash, and notes."""

    rows: int
    sha256: str
    notes: list[str]


def pack(source: str | Path, tokenizer: PreTrainedTokenizerBase, file: Path, *, length: int, most: int) -> Rows:
    """At most `most` rows of `length` tokens from `source`, kept in `file`; what is there already is taken as it is.

    source         as for calibration: text, JSON lines, a folder of those, a dataset
    tokenizer      the model's
    file           of the rows; a record of the same name with `.json` says that it is whole
    length, most   tokens of a row; rows at most

    Raises TextError where there is not one row, or text that is no use.
    """
    beside = file.with_suffix(".json")
    written = read_json(beside)
    record = _Record(**written) if written is not None else _pack(source, tokenizer, file, length=length, most=most)
    if written is None:
        write_atomically(beside, json_bytes(asdict(record)))
    # "c": copy on write, so that nothing that is done to a tensor can reach the file
    tokens = np.memmap(file, dtype=np.int32, mode="c", shape=(record.rows, length))
    rows = Rows(torch.from_numpy(tokens), record.sha256, tuple(record.notes))
    some = rows.ids(range(min(len(rows), _CHECKED)))
    checked = calibration.checked(Calibration(some, None, rows.sha256, 0.0, str(source), ()), tokenizer)
    return Rows(rows.tokens, rows.sha256, (*rows.notes, *checked.notes))


def _pack(source: str | Path, tokenizer: PreTrainedTokenizerBase, file: Path, *, length: int, most: int) -> _Record:
    """Write the file, and say what is in it: how many rows, their hash, and notes on what was left out of the source.

    Of a large source an evenly spread share is read, about `BYTES_A_TOKEN` bytes for each token wanted. Raises
    TextError where there is not one row.
    """
    origin = documents.find(source)
    budget = max(BYTES_A_TOKEN * most * length, LEAST_BYTES)
    reading = Reading(
        share=1.0 if origin.dataset else min(budget / max(origin.size, 1), 1.0),
        limit=budget if origin.dataset else None,
        seed=_SEED,
    )
    packing = Packing(tokenizer, length)
    passages = documents.passages(origin, tokenizer, by_line=False, seed=_SEED)
    count = _write(packing.sequences(reading.keep(passages)), file, length=length, most=most)
    if not count:
        raise TextError(
            f"{source} has {packing.tokens} tokens, and one sequence needs {length}",
            f"give a longer text, or use sequences of {max(packing.tokens, 2)} tokens or fewer",
        )
    notes = []
    if reading.share < 1:
        notes.append(f"{source}: rows were chosen from {reading.share:.2%} of the text, spread over all of it")
    if reading.stopped:
        notes.append(
            f"{source}: rows are of the first {counted(reading.documents, 'document')} of the shuffled dataset"
        )
    notes += [f"{source}: {note}" for note in reading.notes]
    return _Record(min(count, most), sha256_of(file), notes)


def _write(rows: Iterable[list[int]], file: Path, *, length: int, most: int) -> int:
    """Keep `most` of the rows in `file`, each as likely as any other -> how many there were."""
    rng = random.Random(_SEED)
    count = 0
    with file.open("wb") as out:
        for row in rows:
            place = count if count < most else int(rng.random() * (count + 1))
            count += 1
            if place < most:
                out.seek(4 * place * length)
                out.write(np.array(row, dtype=np.int32).tobytes())
    return count
