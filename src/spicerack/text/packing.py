"""From documents to sequences of tokens: what is read of a source, and how documents are joined and cut.

`Reading` decides which passages are used, `Packing` what sequences they make. Both are streams with a little memory: a
passage and less than one sequence of tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from spicerack.text.documents import Passage
from spicerack.text.pieces import start_token


class Reading:
    """Lets an evenly spread share of a source's passages through, or all up to a limit, and hashes what it lets
    through.

    share   of the passages, 0 to 1: every n-th, beginning at a place that `seed` chooses
    limit   bytes after which it stops; None: it reads to the end
    seed    where it begins

    Known when `keep` has run: documents, how many began; digest, sha256 of their text; stopped, whether the limit was
    reached; mended, how many characters could not be read, as `Passage` has it.
    """

    def __init__(self, *, share: float, limit: int | None, seed: int) -> None:
        self.share, self.limit = share, limit
        self.phase = random.Random(seed).random()
        self.digest = hashlib.sha256()
        self.documents = 0
        self.stopped = False
        self.mended = 0

    @property
    def notes(self) -> list[str]:
        """A sentence on characters that could not be read, if there were any."""
        if not self.mended:
            return []
        return [f"{self.mended} halves of characters (lone surrogates) were read as U+FFFD"]

    def keep(self, passages: Iterable[Passage]) -> Iterator[Passage]:
        """The passages that are let through; where something before one is missing, a document begins.

        The hash has a zero byte between documents, so that two ways to divide a text are two texts.
        """
        gap = False
        size = 0
        for passage in passages:
            self.phase += self.share
            if self.phase < 1:
                gap = True
                continue
            self.phase -= 1
            first, gap = passage.first or gap, False
            encoded = passage.text.encode()
            self.digest.update(b"\0" * (first and self.documents > 0) + encoded)
            self.documents += first
            self.mended += passage.mended
            yield replace(passage, first=first)
            size += len(encoded)
            if self.limit is not None and size >= self.limit:
                self.stopped = True
                return


class Packing:
    """Documents to sequences of `length` tokens, joined as a causal model expects.

    Between documents stand the end token, and the start token if the tokenizer puts one before every text; such a one
    also begins every sequence. What is left at the end is dropped. tokens: of the text, so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        start = start_token(tokenizer)
        self.tokenizer = tokenizer
        self.prefix = [] if start is None else [start]
        self.joint = [t for t in (tokenizer.eos_token_id,) if t is not None and t != start] + self.prefix
        self.fresh = length - len(self.prefix)
        self.tokens = 0

    def sequences(self, passages: Iterable[Passage]) -> Iterator[list[int]]:
        """The sequences, each of `length` tokens, in order, as soon as there are tokens enough for one.

        passages: a document may be several. Special tokens that are spelled out in text are read as text, but for
        passages that a chat template rendered, whose own start and end tokens are not doubled.
        """
        waiting: list[int] = []
        last: int | None = None
        for passage in passages:
            # verbose=False: a passage is longer than the model's window on purpose
            new = self.tokenizer(
                passage.text, add_special_tokens=False, split_special_tokens=not passage.rendered, verbose=False
            ).input_ids
            if not new:
                continue
            self.tokens += len(new)
            if passage.first and last is not None:  # a chat template may have written such tokens itself
                waiting += [token for token in self.joint if token not in (last, new[0])]
            waiting += new
            last = new[-1]
            begin = 0
            while True:
                while waiting[begin : begin + 1] == self.prefix != []:  # every sequence gets one in front of it anyway
                    begin += 1
                if len(waiting) - begin < self.fresh:
                    break
                yield self.prefix + waiting[begin : begin + self.fresh]
                begin += self.fresh
            waiting = waiting[begin:]
