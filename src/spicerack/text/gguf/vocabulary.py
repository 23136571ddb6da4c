"""The vocabulary that a GGUF file's metadata holds, checked: llama.cpp's keys, types of tokens and defaults.

What is missing is what llama.cpp takes for it. What is damaged llama.cpp aborts on or passes over; here it is refused
by name, because a tokenizer that is nearly right is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.metadata import INTEGERS, Metadata

REMEDY = "fetch the file again, or convert the model anew"


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token, by llama.h's numbers."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BY_NUMBER = {int(kind): kind for kind in TokenType}
SPECIAL_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
"""A special token's name in transformers, without `_token` -> the key of its id (the spelling is llama.cpp's)."""
_DEFAULT_SPECIALS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "bert": {"cls": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}
"""By `tokenizer.ggml.model`: what llama.cpp takes where a key is missing and the vocabulary is large enough."""
WHITESPACE_MARK = "\u2581"
"""Stands for a space in vocabularies of SentencePiece."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens.

    where      what errors call the file
    model      `tokenizer.ggml.model`: which algorithm
    tokens     by id, all different
    types      of each token
    scores     of each token; None where the file has none
    merges     pairs of tokens, best first, none twice; None where the file has none
    specials   name of a special token -> its id
    """

    where: str
    model: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[tuple[str, str], ...] | None
    specials: Mapping[str, int]

    @property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: index for index, token in enumerate(self.tokens)}

    def special(self, name: str) -> str | None:
        """The special token of that name, if there is one."""
        return self.tokens[self.specials[name]] if name in self.specials else None


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """The vocabulary of a file. Raises CheckpointError, naming file and key, for what is missing or makes no sense."""
    model = metadata.text("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    if "tokenizer.ggml.token_type" in metadata:
        types = tuple(map(_token_type, _as_many(metadata, "tokenizer.ggml.token_type", INTEGERS, len(tokens))))
    else:
        types = (TokenType.NORMAL,) * len(tokens)
    scores = None
    if "tokenizer.ggml.scores" in metadata:
        scores = tuple(map(float, _as_many(metadata, "tokenizer.ggml.scores", ("f32", "i32"), len(tokens))))
        if not all(map(math.isfinite, scores)):
            raise CheckpointError(f"{metadata.where}: tokenizer.ggml.scores has numbers that are not finite", REMEDY)
    return Vocabulary(
        metadata.where, model, tokens, types, scores, _merges(metadata), _specials(metadata, model, tokens)
    )


def _tokens(metadata: Metadata) -> tuple[str, ...]:
    """All tokens; one that is empty gets a name, as in llama.cpp."""
    array = metadata.array("tokenizer.ggml.tokens", "string")
    tokens = tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(array.strings()))
    if not tokens:
        raise CheckpointError(f"{metadata.where}: tokenizer.ggml.tokens is empty", REMEDY)
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if first.setdefault(token, index) != index:
                raise CheckpointError(
                    f"{metadata.where}: tokens {first[token]} and {index} are both {token[:60]!r}", REMEDY
                )
    return tokens


def _as_many(metadata: Metadata, key: str, kinds: Sequence[str], count: int) -> list[float]:
    """The first `count` numbers of an array."""
    array = metadata.array(key, *kinds)
    if len(array) < count:
        raise CheckpointError(f"{metadata.where}: {key} has {len(array)} items for {count} tokens", REMEDY)
    numbers: list[float] = array.numpy()[:count].tolist()
    return numbers


def _token_type(number: float) -> TokenType:
    """The type of that number; one that llama.cpp does not know is none, there as here."""
    return _BY_NUMBER.get(int(number), TokenType.UNDEFINED)


def _merges(metadata: Metadata) -> tuple[tuple[str, str], ...] | None:
    """Pairs of tokens, cut where llama.cpp cuts them: at the first space that is not the first letter.

    Of equal ones the first counts.
    """
    if "tokenizer.ggml.merges" not in metadata:
        return None
    pairs: dict[tuple[str, str], None] = {}
    for index, merge in enumerate(metadata.array("tokenizer.ggml.merges", "string").strings()):
        at = merge.find(" ", 1)
        if at < 0:
            raise CheckpointError(f"{metadata.where}: merge {index} is {merge[:60]!r}, not two tokens", REMEDY)
        pairs[merge[:at], merge[at + 1 :]] = None
    return tuple(pairs)


def _specials(metadata: Metadata, model: str, tokens: Sequence[str]) -> dict[str, int]:
    """Ids of special tokens, those that llama.cpp assumes included."""
    specials = {name: number for name, number in _DEFAULT_SPECIALS.get(model, {}).items() if number < len(tokens)}
    for name, key in SPECIAL_KEYS.items():
        if key in metadata:
            number = metadata.integer(key)
            if not 0 <= number < len(tokens):
                raise CheckpointError(f"{metadata.where}: {key} is {number} of {len(tokens)} tokens", REMEDY)
            specials[name] = number
    return specials
