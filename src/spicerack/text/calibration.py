"""Calibration text: a few sequences of tokens, chosen by seed from a source of any size, for statistics of activations.

For a decoder the documents are joined with the tokenizer's own end and start tokens and cut into sequences of equal
length; nothing is padded. For an encoder each document is one sequence, and padding is masked: that is how either is
used.

How it chooses. Of a large source an evenly spread share is tokenized, about `BYTES_A_TOKEN` bytes for each token that
was asked for; of the sequences that this makes, each is as likely as any other. What is given up is the rest of the
source, and that a sequence begins where a cut falls and not where a sentence does.

Calibrate on other text than is evaluated: the same would flatter the result. The hash of the text is kept for that, and
an evaluation on it warns.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
from transformers import PreTrainedTokenizerBase

from spicerack import arguments
from spicerack.errors import TextError, UsageError, counted
from spicerack.models.kind import Kind
from spicerack.text import documents
from spicerack.text.documents import Passage
from spicerack.text.packing import Packing, Reading

T = TypeVar("T")

BYTES_A_TOKEN = 32
"""Text that is tokenized for each token asked for: about eight times as much as is used, at four bytes a token."""
LEAST_BYTES = 1 << 20
"""Text that is tokenized at least, if there is so much: a few sequences, too, come from all over it."""
SPARE_TOKENS, SPARE_LENGTH = 4096, 256
"""Tokens of the text, beyond those that were chosen, that are kept for a check, and how many of a sequence it reads."""
FEWEST_TOKENS = 8
"""Different tokens that a text has at least: with fewer, statistics of activations are of these tokens, not of text."""
UNKNOWN_NOTED, UNKNOWN_REFUSED = 0.01, 0.5
"""Shares of unknown tokens from which on a note is made, and the text refused: it is in another language."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """S sequences of at most L tokens, and where they are from.

    ids      int64 [S, L]
    mask     bool [S, L], False where padding is; None where there is none
    sha256   of the text that the sequences were chosen from, in UTF-8 with a zero byte between documents; of a text
             file that was read whole it is the file's own
    unknown  share of tokens that the tokenizer does not know, 0 to 1
    source   what was read
    notes    sentences on what was not as asked for
    spare    int64 [n, L], sequences of the same text that were not chosen, from its end, of a decoder: for a check of
             what was made of the others; None where there are none
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    sha256: str
    unknown: float
    source: str
    notes: tuple[str, ...] = ()
    spare: torch.Tensor | None = None

    def __post_init__(self) -> None:
        arguments.check_fields(self)

    @property
    def fingerprint(self) -> str:
        """sha256 of ids and mask: what must be the same for a run to continue, whatever text they are from."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()


@arguments.checked
def read(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    kind: Kind = "decoder",
) -> Calibration:
    """Choose `samples` sequences from `source`: for a decoder of `length` tokens, for an encoder of at most as many.

    source     a text file, a .jsonl file of {"text"} or {"messages"}, a folder of those, or a dataset (an id,
               id:config, or a folder of tables), which needs the package `datasets`
    tokenizer  the model's
    samples    how many sequences, at least 1
    length     tokens of each, at least 2
    kind       what the model is for, which decides how sequences are made: see the module
    seed       which sequences: all are equally likely, and keep the order of the source; if there are fewer, all are
               taken. Of large sources a part is tokenized that is spread over the whole

    Raises TextError for text that is missing, broken, too short, of hardly any different tokens, or mostly unknown to
    the tokenizer.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"kind is {kind!r}", f"one of {', '.join(get_args(Kind))}")
    if samples < 1 or length < 2:
        raise TextError(f"{samples} sequences of {length} tokens are no calibration", "ask for at least 1 of 2 tokens")
    origin = documents.find(source)
    budget = max(BYTES_A_TOKEN * samples * length, LEAST_BYTES)
    reading = Reading(
        share=1.0 if kind == "encoder" or origin.dataset else min(budget / max(origin.size, 1), 1.0),
        limit=budget if origin.dataset else None,
        seed=seed,
    )
    passages = reading.keep(documents.passages(origin, tokenizer, by_line=kind == "encoder", seed=seed))
    choose = _padded if kind == "encoder" else _packed
    ids, mask, spare, notes = choose(passages, tokenizer, source, samples=samples, length=length, seed=seed)
    notes += _shortfalls(reading, len(ids), samples)
    digest = reading.digest.hexdigest()
    return checked(Calibration(ids, mask, digest, 0.0, str(source), tuple(notes), spare), tokenizer)


def _shortfalls(reading: Reading, count: int, samples: int) -> Iterator[str]:
    """Sentences on what of the source was not looked at, and on sequences, `count` of `samples`, that it has not."""
    if reading.share < 1:
        yield f"chosen from {reading.share:.2%} of the text, spread over all of it"
    if reading.stopped:
        yield f"chosen from the first {counted(reading.documents, 'document')} of the shuffled dataset"
    yield from reading.notes
    if count < samples:
        yield f"the text has only {count} of the {counted(samples, 'sequence')} asked for"


_Chosen = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, list[str]]
"""ids int64 [S, L]; mask bool [S, L], or None; spare, as `Calibration` has it; notes."""


def _packed(
    passages: Iterable[Passage],
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    *,
    samples: int,
    length: int,
    seed: int,
) -> _Chosen:
    """Some of the sequences that the passages make when they are joined: ids, no mask, some of the others, no notes.

    passages    of all documents, in order
    tokenizer   the model's
    source      for the error alone
    samples     how many sequences at most
    length      tokens of each
    seed        which of them

    Raises TextError where there is not one.
    """
    packing = Packing(tokenizer, length)
    wanted = -(-SPARE_TOKENS // min(length, SPARE_LENGTH))
    sequences, others = divided(packing.sequences(passages), samples, seed, wanted)
    if not sequences:
        raise TextError(
            f"{source} has {packing.tokens} tokens, and one sequence needs {length}",
            f"give a longer text, or use sequences of {max(packing.tokens, 2)} tokens or fewer",
        )
    spare = [other for other in others if other not in sequences]  # a text may repeat itself
    ids, rest = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (sequences, spare))
    return ids, None, rest if spare else None, []


def _padded(
    passages: Iterable[Passage],
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    *,
    samples: int,
    length: int,
    seed: int,
) -> _Chosen:
    """Some of the documents, each a sequence, cut and padded at the end to the longest: ids, mask, no spare, and notes.

    passages    of all documents; of each the first is used
    tokenizer   the model's
    source      for the error alone
    samples     how many documents at most
    length      tokens at which they are cut; a note says how many were
    seed        which of them

    Raises TextError where there is no text.
    """
    texts, _ = divided(
        (passage.text for passage in passages if passage.first and passage.text.strip()), samples, seed, 0
    )
    if not texts:
        raise TextError(f"{source} has no text", "give one sentence per line")
    rows = tokenizer(texts, truncation=True, max_length=length, verbose=False).input_ids
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.int64, device="cpu") for row in filled],
            batch_first=True,
            padding_value=value,
        )
        for filled, value in ((rows, tokenizer.pad_token_id or 0), ([[True] * len(row) for row in rows], False))
    )
    full = int(mask.all(1).sum()) if mask.shape[1] == length else 0
    fill = "fills" if full == 1 else "fill"
    note = f"{counted(full, 'document')} {fill} all {length} tokens; what is beyond was not used"
    return ids, mask, None, [note] if full else []


def checked(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """`calibration` with its share of unknown tokens, and notes on what is odd about it; nothing in it is changed.

    tokenizer: which tokens stand for what it does not know, and which are special and do not count. Raises TextError if
    the text is no use: more than half of it is unknown, or it has fewer than `FEWEST_TOKENS` different tokens.
    """
    special = set(tokenizer.all_special_ids)
    unknown_id = tokenizer.unk_token_id
    if unknown_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        unknown_id = None  # GPT-2's end of text also stands for what is unknown, of which there is none
    real = calibration.ids if calibration.mask is None else calibration.ids[calibration.mask]
    words = real[~torch.isin(real, torch.tensor(sorted(special - {unknown_id}), dtype=torch.int64, device="cpu"))]
    unknown = 0.0 if unknown_id is None else int((words == unknown_id).sum()) / max(len(words), 1)
    if unknown > UNKNOWN_REFUSED:
        raise TextError(
            f"{calibration.source}: the tokenizer does not know {unknown:.0%} of the tokens",
            "give text in a language that the model was trained on",
        )
    different = words.unique().tolist()
    if len(different) < FEWEST_TOKENS:
        shown = ", ".join(repr(tokenizer.decode([token])) for token in different)
        raise TextError(
            f"{calibration.source} has only {len(different)} different tokens: {shown or 'none'}",
            "give text such as the model will meet",
        )
    notes = list(calibration.notes)
    distinct, count = len(calibration.ids.unique(dim=0)), len(calibration.ids)
    if distinct < count:
        notes.append(f"only {distinct} of the {count} sequences differ from each other")
    if unknown > UNKNOWN_NOTED:
        notes.append(f"the tokenizer does not know {unknown:.1%} of the tokens")
    return replace(calibration, unknown=unknown, notes=tuple(notes))


def divided(items: Iterable[T], count: int, seed: int, spare: int) -> tuple[list[T], list[T]]:
    """`count` of the items, or all if there are fewer, in their order, every choice equally likely; and up to `spare`
    of the others, the last ones to be passed over.

    The stream may be of any length: so many items are kept in memory, and the n-th takes the place of a chosen one with
    probability count / n. (Vitter's algorithm R, ACM TOMS 11, 1985.)
    """
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    others: deque[T] = deque(maxlen=spare)
    for number, item in enumerate(items):
        if number < count:
            kept.append((number, item))
            continue
        place = int(rng.random() * (number + 1))
        if place < count:
            others.append(kept[place][1])
            kept[place] = number, item
        else:
            others.append(item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])], list(others)
