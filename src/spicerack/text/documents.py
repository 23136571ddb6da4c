"""Where text for calibration and training comes from: a text file, JSON lines, a folder of those, or a dataset.

Whatever it is, it is read as a stream of passages, of which each says whether a document begins with it: a long
document is several passages, so that no source has to fit into memory.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spicerack.errors import TextError
from spicerack.text import chats
from spicerack.text.pieces import PIECE_BYTES, pieces, sentences

TEXT, LINES = ".txt", ".jsonl"
"""Ends of files of plain text, and of one JSON object a line."""
TABLES = (".parquet", ".arrow")
"""Ends of files that only the package `datasets` reads: a folder with one is taken for a dataset."""
LONGEST_LINE = 1 << 26
"""Characters of one JSON line, which must be in memory as a whole: 64 MiB of ASCII. What is longer is no JSON lines."""
SHUFFLED = 1000
"""Rows of a dataset that are shuffled at once, beside its shards: they are held in memory."""
_AS_LINES = 'write one object a line, its text under "text", and call it {name}'
_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
"""Form of a dataset's id: name, owner/name, and a configuration behind a colon."""
_NO_TEXT = {
    ".json": "is JSON, not text",
    ".csv": "is a table, not text",
    ".tsv": "is a table, not text",
    ".ndjson": "is JSON lines under another name",
}
"""Ends of files that are text to a computer and would be read, commas and braces and all -> what they are."""
_FILE_ENDS = (TEXT, LINES, *TABLES, *_NO_TEXT, ".md")
"""Ends that a file has and a dataset's id has not: a name with one is a file that is missing."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Some text of one document.

    text       of any length, possibly none
    first      whether the document begins with it
    rendered   whether a chat template wrote it, whose special tokens are meant; in other text they are only text
    fraction   share of the source, 0 to 1, that has been read at its end; 0 of a dataset, whose size nobody knows
    mended     how many halves of surrogate pairs were in it, which JSON can hold and tokenizers cannot read: each is
               U+FFFD now
    """

    text: str
    first: bool
    rendered: bool = False
    fraction: float = 0.0
    mended: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where text is: files to read one after the other, or the id or folder of a dataset."""

    files: tuple[Path, ...] = ()
    dataset: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files that exist; 0 of a dataset, whose size nobody knows before it is read."""
        return sum(file.stat().st_size for file in self.files if file.is_file())


def find(source: str | Path) -> Source:
    """What `source` names: a file, a folder of text or of tables, a dataset's id (`name`, `owner/name`, `name:config`).

    A name of the form of an id that is no file here is one. Raises TextError if there is nothing of use in it, and for
    a file that is no text by its name; one that is missing is told when it is read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    end = _end(path)
    if end in _NO_TEXT:
        raise TextError(f"{path} {_NO_TEXT[end]}", _AS_LINES.format(name=f"{path.stem}{LINES}"))
    if end in TABLES and path.is_file():
        raise TextError(f"{path} is a table, not text", "give the folder that it is in, which is read as a dataset")
    if not path.exists() and _ID.fullmatch(str(source)) and end not in _FILE_ENDS:
        return Source(dataset=str(source))
    return Source((path,))


def _in_folder(path: Path) -> Source:
    """The text files in a folder, or the folder as a dataset where it holds tables that are read as one.

    Raises TextError for one without either.
    """
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if any(_end(p) in TABLES for p in inside):
        return Source(dataset=str(path))
    files = tuple(p for p in inside if _end(p) in (TEXT, LINES))
    if not files:
        others = [p for p in inside if _end(p) in _NO_TEXT]
        there = f": {others[0].name} {_NO_TEXT[_end(others[0])]}" if others else ""
        raise TextError(f"{path} has no {TEXT} or {LINES} file{there}", "give a folder with text in it, or a file")
    return Source(files)


def _end(path: Path) -> str:
    """The end of a file's name, in small letters: what it says that the file is."""
    return path.suffix.lower()


def passages(source: Source, tokenizer: PreTrainedTokenizerBase, *, by_line: bool, seed: int) -> Iterator[Passage]:
    """The text of `source`, file by file; a text file is one document, or with `by_line` each of its lines is one.

    tokenizer: its chat template renders chats. A dataset's rows come shuffled by `seed`. Raises TextError for what is
    no text, naming file and line.
    """
    if source.dataset is not None:
        for number, row in enumerate(_rows(source.dataset, seed), start=1):
            yield from _document(row, f"{source.dataset}, row {number}", tokenizer)
    whole, before = max(source.size, 1), 0
    for path in source.files:
        size = path.stat().st_size if path.is_file() else 0
        for passage in _of_file(path, tokenizer, by_line=by_line):
            yield replace(passage, fraction=(before + passage.fraction * size) / whole)
        before += size


def _of_file(path: Path, tokenizer: PreTrainedTokenizerBase, *, by_line: bool) -> Iterator[Passage]:
    """The passages of a file, with shares of that file; the rest is as `passages` has it."""
    if _end(path) == LINES:
        for number, line, fraction in _lines(path):
            for passage in _document(_object(line, path, number), f"{path}, line {number}", tokenizer):
                yield replace(passage, fraction=fraction)
        return
    _refuse_records(path)
    if by_line:
        for sentence, fraction in sentences(path):
            yield Passage(sentence, True, fraction=fraction)
    else:
        for number, piece in enumerate(pieces(path)):
            yield Passage(piece.text, number == 0, fraction=piece.fraction)


def _refuse_records(path: Path) -> None:
    """Raise TextError for JSON lines under the name of a text: its first line is such an object, as documents lie in.

    A file that is missing, empty or no text is told where it is read.
    """
    line = ""
    if path.is_file():
        with path.open("rb") as file:
            line = file.readline(PIECE_BYTES).decode("utf-8-sig", "replace").strip()
    if line.startswith("{") and re.search(r'"(text|messages)"\s*:', line):
        raise TextError(f"{path} holds JSON lines, and its name says text", f"call it {path.stem}{LINES}")


def _document(record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    """A record's text in pieces of `PIECE_BYTES` characters, or its chat, rendered by the tokenizer's template in one.

    record: {"text": ...} or {"messages": [...]}, the latter with "tools" that may be called; other keys are ignored.
    where: what an error calls the record. Raises TextError for a record with neither, a chat without a template, and
    one that the template refuses.
    """
    text, messages = record.get("text"), record.get("messages")
    if isinstance(text, str):
        text, mended = chats.whole(text)
        for at in range(0, len(text) or 1, PIECE_BYTES):
            yield Passage(text[at : at + PIECE_BYTES], at == 0, mended=mended if at == 0 else 0)
        return
    if not chats.is_chat(messages):
        reason = 'has neither "text" nor "messages"' if messages is None else 'has "messages" that are no chat'
        raise TextError(
            f"{where} {reason}",
            'give {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    rendered, mended = chats.whole(chats.render(tokenizer, messages, where, tools=record.get("tools")))
    yield Passage(rendered, True, rendered=True, mended=mended)


def _lines(path: Path) -> Iterator[tuple[int, str, float]]:
    """The lines that are not blank, with their numbers, from 1, and the share of the file that is read behind each.

    Raises TextError for one beyond `LONGEST_LINE`.
    """
    parts: list[str] = []
    number = length = 0
    for piece in pieces(path):
        parts.append(piece.text)
        length += len(piece.text)
        if piece.fraction < 1.0 and not piece.text.endswith("\n"):
            if length > LONGEST_LINE:
                raise TextError(f"{path}, line {number + 1} is longer than 64 MiB", f"is it a {LINES} file?")
            continue
        for line in "".join(parts).removesuffix("\n").split("\n"):  # JSON has other line ends inside its strings
            number += 1
            if line.strip():
                yield number, line, piece.fraction
        parts, length = [], 0


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    """The JSON object in a line. Raises TextError for anything else, naming the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}, line {number} is not JSON: {error}", "give one JSON object a line") from error
    if not isinstance(record, dict):
        raise TextError(
            f"{path}, line {number} is {type(record).__name__}, not an object", "give one JSON object a line"
        )
    return record


def _rows(dataset: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a dataset's `train` split, streamed and shuffled by `seed`, `SHUFFLED` at a time.

    dataset: an id, id:config, or a folder of tables. Raises TextError for one that cannot be read, also where the
    package `datasets` is missing, which nothing else needs.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        reason = f"{dataset} is no file here" if not Path(dataset).exists() else f"{dataset} holds tables"
        raise TextError(
            f"{reason}, and reading it as a dataset needs the package `datasets`",
            f"pip install datasets, or give a {TEXT} or {LINES} file that exists",
        ) from error
    try:
        name, _, config = (dataset, "", "") if Path(dataset).exists() else dataset.partition(":")
        rows = library.load_dataset(name, config or None, split="train", streaming=True)
        yield from rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"{dataset} cannot be read as a dataset: {reason}", "try NAME:CONFIG, or give a file"
        ) from error
