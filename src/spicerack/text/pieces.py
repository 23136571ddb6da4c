"""Plain text: a file of any size, read in pieces or as sentences.

Pieces end at line ends, where a cut hardly changes what a tokenizer makes of the text; only a line that is longer than
a piece is cut where the piece ends.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
