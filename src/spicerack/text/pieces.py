"""Evaluation text: a file of any size, read in pieces, as windows of tokens or as sentences."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError

PIECE_BYTES = 1 << 16
"""What is tokenized at once: small, because some tokenizers take more than linear time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of the file, and the share of the file that has been read at its end."""

    text: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Window:
    """ids int64 [length], the tokenizer's start token in front if it has one; unknown: how many are unknown tokens."""

    ids: torch.Tensor
    unknown: int
    fraction: float


def pieces(path: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Read UTF-8 text (with or without a byte-order mark), cut at line ends where a piece has one.

    Raises TextError for a file that is missing, empty, or not text.
    """
    size = _size(path)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, done = "", 0
    with path.open("rb") as file:
        while chunk := file.read(piece_bytes):
            rest += _decode(decoder, chunk, path, done)
            done += len(chunk)
            cut = rest.rfind("\n") + 1 or len(rest)
            if cut:
                yield Piece(rest[:cut], min(done / size, 1.0))
            rest = rest[cut:]
    rest += _decode(decoder, b"", path, done)
    if rest:
        yield Piece(rest, 1.0)


def _size(path: Path) -> int:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is not a regular file"
        raise TextError(f"{path} {kind}", "give a plain text file")
    size = path.stat().st_size
    if size == 0:
        raise TextError(f"{path} is empty", "give a text that the models have not seen in training")
    return size


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, offset: int) -> str:
    remedy = "give plain text in UTF-8"
    try:
        text = decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: {error.reason} near byte {offset + error.start}", remedy) from error
    if "\0" in text:
        raise TextError(f"{path} is not text: it has a zero byte after byte {offset}", remedy)
    return text


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that this tokenizer puts before every text, if it does."""
    with_special = tokenizer("a").input_ids
    if with_special and with_special[0] == tokenizer.bos_token_id:
        return int(with_special[0])
    return None


def windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Iterator[Window]:
    """The file's tokens, packed without gaps into windows of `length`; what is left at the end is dropped.

    A window starts with the tokenizer's start token, if it has one, and continues the text where the last one stopped.
    Special tokens spelled out in the text are read as text. At most `max_tokens` tokens are used. Raises TextError if
    there is not a single window.
    """
    if length < 2:
        raise TextError(f"a window of {length} tokens predicts nothing", "use --window 2 or more")
    start = start_token(tokenizer)
    prefix = [] if start is None else [start]
    fresh = length - len(prefix)
    most = None if max_tokens is None else max_tokens // length
    if most == 0:
        raise TextError(f"--max-tokens {max_tokens} is less than one window of {length} tokens", "lower --window")
    waiting: list[int] = []
    made, seen = 0, 0
    before = 0.0
    for piece in pieces(path):
        # verbose=False: a piece is longer than the model's window on purpose
        new = tokenizer(piece.text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        seen += len(new)
        waiting += new
        at = 0
        while len(waiting) - at >= fresh:
            ids = waiting[at : at + fresh]
            at += fresh
            made += 1
            read = piece.fraction - (piece.fraction - before) * (len(waiting) - at) / max(len(new), 1)
            fraction = max(read, 0.0) if most is None else max(read, made / most)
            unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
            yield Window(torch.tensor(prefix + ids), unknown, min(fraction, 1.0))
            if made == most:
                return
        waiting = waiting[at:]
        before = piece.fraction
    if not made:
        raise TextError(
            f"{path} has {seen} tokens, less than one window of {length}",
            f"give a longer text, or --window {max(seen, 2)} or less",
        )


def sentences(path: Path) -> Iterator[tuple[str, float]]:
    """The non-empty lines of a file, each with the share of the file that has been read. Raises TextError."""
    found = False
    before = 0.0
    for piece in pieces(path):
        lines = [line.strip() for line in piece.text.splitlines()]
        for i, line in enumerate(lines, start=1):
            if line:
                found = True
                yield line, before + (piece.fraction - before) * i / len(lines)
        before = piece.fraction
    if not found:
        raise TextError(f"{path} has only blank lines", "give one sentence per line")
