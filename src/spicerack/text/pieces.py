"""Plain text: a file of any size, read in pieces, as windows of tokens or as sentences.

Pieces end at line ends, where a cut hardly changes what a tokenizer makes of the text; only a line that is longer than
a piece is cut where the piece ends. Tokens are joined across pieces without a gap.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError

PIECE_BYTES = 1 << 16
"""What is tokenized at once: small, because some tokenizers take more than linear time."""
_HASHED_BYTES = 1 << 20
"""What is hashed at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of the file.

    text       ends with a line's end, unless it is the last or a line is longer than a piece
    fraction   share of the file, 0 to 1, that has been read at its end
    """

    text: str
    fraction: float


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


def pieces(path: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Read UTF-8 text (with or without a byte-order mark), cut at line ends where a piece has one.

    piece_bytes: bytes that are read at once; what is behind the last line end waits for the next piece. Raises
    TextError for a file that is missing, empty, or not text.
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
                yield Piece(rest[:cut], min(done / size, 1.0))  # the file may grow while it is read
            rest = rest[cut:]
    rest += _decode(decoder, b"", path, done)
    if rest:
        yield Piece(rest, 1.0)


def _size(path: Path) -> int:
    """Bytes of a regular file that is not empty. Raises TextError that says what it is instead: a folder, a device,
    nothing."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is not a regular file"
        raise TextError(f"{path} {kind}", "give a plain text file")
    size = path.stat().st_size
    if size == 0:
        raise TextError(f"{path} is empty", "give a text that the models have not seen in training")
    return size


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, offset: int) -> str:
    """The text in a chunk, which begins at byte `offset` of the file; an empty one ends it. Raises TextError.

    A zero byte is valid UTF-8, but no text has one: it tells archives and UTF-16 from what was meant.
    """
    remedy = "give plain text in UTF-8"
    try:
        text = decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: {error.reason} near byte {offset + error.start}", remedy) from error
    if "\0" in text:
        raise TextError(f"{path} is not text: it has a zero byte after byte {offset}", remedy)
    return text


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal: the hash by which a calibration text is known again."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that this tokenizer puts before every text; None if it puts none there, even if it has one."""
    with_special = tokenizer("a").input_ids
    if with_special and with_special[0] == tokenizer.bos_token_id:
        return int(with_special[0])
    return None


def windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Iterator[Window]:
    """The file's tokens, packed without gaps into windows of `length`; what is left at the end is dropped.

    path         a text file in UTF-8
    tokenizer    the model's
    length       tokens of a window, its start token counted, 2 at least
    max_tokens   of the text that are used at most, start tokens counted; None: all of it

    A window starts with the tokenizer's start token, if it has one, and continues the text where the last one stopped.
    Special tokens spelled out in the text are read as text. Raises TextError if there is not a single window.
    """
    if length < 2:
        raise TextError(f"a window of {length} tokens predicts nothing", "use --window 2 or more")
    most = None if max_tokens is None else max_tokens // length  # of whole windows, which are what is compared
    if most == 0:
        raise TextError(f"--max-tokens {max_tokens} is less than one window of {length} tokens", "lower --window")
    cutting = _Cutting(tokenizer, length)
    count = 0
    for piece in pieces(path):
        for window in cutting.windows(piece):
            count += 1
            yield window if most is None else replace(window, fraction=max(window.fraction, count / most))
            if count == most:
                return
    if not count:
        raise TextError(
            f"{path} has {cutting.tokens} tokens, less than one window of {length}",
            f"give a longer text, or --window {max(cutting.tokens, 2)} or less",
        )


class _Cutting:
    """Pieces to windows: holds the tokens that have not filled one yet. tokens: of the text, so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        start = start_token(tokenizer)
        self.tokenizer = tokenizer
        self.prefix = [] if start is None else [start]
        self.fresh = length - len(self.prefix)
        self.waiting: list[int] = []
        self.tokens = 0
        self.before = 0.0

    def windows(self, piece: Piece) -> Iterator[Window]:
        """The windows that this piece completes, in order."""
        # verbose=False: a piece is longer than the model's window on purpose
        new = self.tokenizer(piece.text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        self.tokens += len(new)
        self.waiting += new
        begin = 0
        while len(self.waiting) - begin >= self.fresh:
            ids = self.waiting[begin : begin + self.fresh]
            begin += self.fresh
            unread = (len(self.waiting) - begin) / max(len(new), 1)  # of the piece, if its tokens are of one size
            fraction = piece.fraction - (piece.fraction - self.before) * unread
            unknown = 0 if self.tokenizer.unk_token_id is None else ids.count(self.tokenizer.unk_token_id)
            yield Window(
                torch.tensor(self.prefix + ids, dtype=torch.int64, device="cpu"), unknown, min(max(fraction, 0.0), 1.0)
            )
        self.waiting = self.waiting[begin:]
        self.before = piece.fraction


def sentences(path: Path) -> Iterator[tuple[str, float]]:
    """The non-empty lines of a file without their margins, each with the share of the file that has been read.

    Raises TextError for a file that is no text, or has only blank lines.
    """
    empty = True
    before = 0.0
    for piece in pieces(path):
        lines = [line.strip() for line in piece.text.splitlines()]
        for i, line in enumerate(lines, start=1):
            if line:
                empty = False
                yield line, before + (piece.fraction - before) * i / len(lines)
        before = piece.fraction
    if empty:
        raise TextError(f"{path} has only blank lines", "give one sentence per line")
