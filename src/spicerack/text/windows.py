"""What an evaluation reads: any source of text as windows of tokens (for decoders), or as sentences (for encoders).

A text file is read as it is, without gaps. Documents of JSON lines and datasets are joined as calibration joins them,
by the tokenizer's own end and start tokens, and chats are written out by its template: what is measured is the text in
the file, and never the file's syntax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError
from spicerack.text import documents
from spicerack.text.documents import Passage
from spicerack.text.packing import Reading
from spicerack.text.pieces import start_token

_SEED = 0
"""Of the order of a dataset's rows: two evaluations read the same."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model reads together.

    ids       int64 [length], the tokenizer's start token in front if it has one
    unknown   how many of them are unknown tokens
    fraction  share of the text, 0 to 1, that has been read at its end
    """

    ids: torch.Tensor
    unknown: int
    fraction: float


def windows(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Iterator[Window]:
    """The text's tokens, packed without gaps into windows of `length`; what is left at the end is dropped.

    source       a text file in UTF-8, JSON lines, a folder of those, or a dataset, as for calibration
    tokenizer    the model's
    length       tokens of a window, its start token counted, 2 at least
    max_tokens   of the text that are used at most, start tokens counted; None: all of it

    A window starts with the tokenizer's start token, if it has one, and continues the text where the last one stopped.
    Between documents stand the tokenizer's end and start tokens. Special tokens spelled out in text are read as text,
    and those that a chat template wrote are meant. Raises TextError if there is not a single window.
    """
    if length < 2:
        raise TextError(f"a window of {length} tokens predicts nothing", "use --window 2 or more")
    most = None if max_tokens is None else max_tokens // length  # of whole windows, which are what is compared
    if most == 0:
        raise TextError(f"--max-tokens {max_tokens} is less than one window of {length} tokens", "lower --window")
    cutting = _Cutting(tokenizer, length)
    count = 0
    for passage in documents.passages(documents.find(source), tokenizer, by_line=False, seed=_SEED):
        for window in cutting.windows(passage):
            count += 1
            yield window if most is None else replace(window, fraction=max(window.fraction, count / most))
            if count == most:
                return
    if not count:
        raise TextError(
            f"{source} has {cutting.tokens} tokens, less than one window of {length}",
            f"give a longer text, or --window {max(cutting.tokens, 2)} or less",
        )


class _Cutting:
    """Passages to windows: holds the tokens that have not filled one yet. tokens: of the text, so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        start = start_token(tokenizer)
        self.tokenizer = tokenizer
        self.prefix = [] if start is None else [start]
        self.fresh = length - len(self.prefix)
        self.waiting: list[int] = []
        self.joint = [t for t in (tokenizer.eos_token_id,) if t is not None and t != start] + self.prefix
        self.last: int | None = None
        self.tokens = 0
        self.before = 0.0

    def windows(self, passage: Passage) -> Iterator[Window]:
        """The windows that this passage completes, in order."""
        # verbose=False: a passage is longer than the model's window on purpose
        new = self.tokenizer(
            passage.text, add_special_tokens=False, split_special_tokens=not passage.rendered, verbose=False
        ).input_ids
        if passage.first and self.last is not None and new:  # a chat template may have written such tokens itself
            self.waiting += [token for token in self.joint if token not in (self.last, new[0])]
        self.last = new[-1] if new else self.last
        self.tokens += len(new)
        self.waiting += new
        begin = 0
        while True:
            while self.waiting[begin : begin + 1] == self.prefix != []:  # every window gets one in front of it anyway
                begin += 1
            if len(self.waiting) - begin < self.fresh:
                break
            ids = self.waiting[begin : begin + self.fresh]
            begin += self.fresh
            unread = (len(self.waiting) - begin) / max(len(new), 1)  # of the passage, if its tokens are of one size
            fraction = passage.fraction - (passage.fraction - self.before) * unread
            unknown = 0 if self.tokenizer.unk_token_id is None else ids.count(self.tokenizer.unk_token_id)
            yield Window(
                torch.tensor(self.prefix + ids, dtype=torch.int64, device="cpu"), unknown, min(max(fraction, 0.0), 1.0)
            )
        self.waiting = self.waiting[begin:]
        self.before = passage.fraction


def sentences(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, float]]:
    """The sentences of a text, each with the share of it that has been read: the lines of a file, else documents.

    source: as for `windows`. tokenizer: its template writes chats out. Raises TextError where there is not one.
    """
    empty = True
    for passage in documents.passages(documents.find(source), tokenizer, by_line=True, seed=_SEED):
        if passage.first and passage.text.strip():
            empty = False
            yield passage.text.strip(), passage.fraction
    if empty:
        raise TextError(f"{source} has no text", "give one sentence per line")


def text_hash(source: str | Path, tokenizer: PreTrainedTokenizerBase, *, by_line: bool) -> str | None:
    """The hash by which a calibration text that was read whole is known again; None where there is no file.

    by_line: whether each line of a text file is a document, as for encoders. The rest is as for `windows`.
    """
    origin = documents.find(source)
    if not origin.files or not all(file.is_file() for file in origin.files):
        return None
    reading = Reading(share=1.0, limit=None, seed=_SEED)
    for _ in reading.keep(documents.passages(origin, tokenizer, by_line=by_line, seed=_SEED)):
        pass
    return reading.digest.hexdigest()
