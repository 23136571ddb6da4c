"""Calibration text: what flows through the model while codes are chosen. Never the text that is evaluated on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack import evaluation_text
from spicerack.errors import TextError
from spicerack.hf import CACHES

SAMPLES, LENGTH = 128, 512
_MOST_UNKNOWN = 0.5
_LEAST_DISTINCT = 8
_ENDINGS = {".txt", ".md", ".jsonl"}
_MOST_LINE = 1 << 24
_AT_ONCE = 16
"""Sequences that a model writes beside each other."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """ids int64 [S, L]; mask bool [S, L], False at padding, or None; unknown: share of tokens that are unknown.

    sha256: of ids and mask, hexadecimal. source: what they were read from. files: sha256 of each file of it.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    unknown: float
    source: str
    files: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know."""
        if self.unknown <= 0.01:
            return ()
        return (f"{self.unknown:.0%} of the calibration text are tokens that the tokenizer does not know",)


def read(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    decoder: bool,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> Calibration:
    """`samples` sequences out of a text file, a .jsonl file or a folder of those; the same for the same seed.

    .jsonl: an object a line, with "text", or with "messages" that the tokenizer's chat template writes out. Decoders
    get documents packed without gaps into sequences of `length` tokens; encoders get each document (each line of a text
    file) as a sequence of its own, cut at `length` and padded. All is read once, one piece in memory; of more sequences
    than are asked for each has the same chance.

    Raises TextError: nothing there, too little, all the same, or a language that the tokenizer does not cover.
    """
    made = _packed(path, tokenizer, length) if decoder else _documents(path, tokenizer, length)
    chosen = _sample(made, samples, seed)
    if not chosen:
        raise TextError(
            f"{path} has less than one sequence of {length} tokens", "give a longer text, or lower --length"
        )
    ids = torch.full((len(chosen), max(map(len, chosen))), tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(chosen):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    distinct = len(ids[mask].unique())
    if distinct < _LEAST_DISTINCT:
        raise TextError(f"{path} has only {distinct} different tokens", "give a text like those the model will see")
    unknown = 0.0
    if tokenizer.unk_token_id is not None:
        unknown = float((ids[mask] == tokenizer.unk_token_id).double().mean())
    if unknown > _MOST_UNKNOWN:
        raise TextError(
            f"{unknown:.0%} of the tokens of {path} are unknown to the tokenizer", "give a text in its language"
        )
    return Calibration(ids, None if bool(mask.all()) else mask, unknown, str(path), tuple(map(sha256, _files(path))))


@torch.no_grad()
def written_by(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> Calibration:
    """Text that a decoder writes itself: the tokenizer's start token if it has one, then a token drawn evenly from all
    that are not special, then by the model's own probabilities.

    A sequence depends on the seed and its own number, not on those beside it. (Liu et al. 2023, arXiv:2305.17888.)
    """
    ordinary = [i for i in range(int(model.config.get_text_config().vocab_size)) if i not in tokenizer.all_special_ids]
    start = evaluation_text.start_token(tokenizer)
    rows = []
    for first in range(0, samples, _AT_ONCE):
        dice = [torch.Generator().manual_seed(seed * samples + i) for i in range(first, min(first + _AT_ONCE, samples))]
        drawn = [ordinary[int(torch.randint(len(ordinary), (1,), generator=g))] for g in dice]
        ids = torch.tensor([[token] if start is None else [start, token] for token in drawn])
        cache: dict[str, Any] = {}
        new = ids
        while ids.shape[1] < length:
            out = model(input_ids=new, use_cache=True, **cache)
            name = next(name for name in CACHES if name in out)
            cache = {name: out[name]}
            logits = out.logits[:, -1].float()
            noise = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g) for g in dice])
            new = (logits - noise.log()).argmax(1, keepdim=True)  # as likely as softmax says (Gumbel 1954)
            ids = torch.cat([ids, new], 1)
        rows.append(ids[:, :length])
    return Calibration(torch.cat(rows), None, 0.0, f"written by the model itself, seed {seed}")


def sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of a text; whole: a document. chat: written by the tokenizer's template."""

    text: str
    whole: bool = False
    chat: bool = False


def _sample(sequences: Iterator[list[int]], count: int, seed: int) -> list[list[int]]:
    """Reservoir sampling (Vitter 1985, algorithm R), in the order of the text."""
    dice = random.Random(seed)
    kept: list[tuple[int, list[int]]] = []
    for number, sequence in enumerate(sequences):
        if len(kept) < count:
            kept.append((number, sequence))
        elif (place := dice.randrange(number + 1)) < count:
            kept[place] = (number, sequence)
    return [sequence for _, sequence in sorted(kept)]


def _packed(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Windows of `length` tokens; a document ends with the end token, and each begins with the start token, if any."""
    start = evaluation_text.start_token(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    waiting: list[int] = []
    for piece in _pieces(path, tokenizer):
        ids = _tokens(tokenizer, piece)
        if start is not None and (piece.whole or not waiting) and ids[:1] != [start]:
            waiting.append(start)
        waiting += ids + (end if piece.whole and ids[-1:] != end else [])
        while len(waiting) >= length:
            yield waiting[:length]
            waiting = waiting[length:]


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    for piece in _pieces(path, tokenizer):
        for document in [piece.text] if piece.whole else piece.text.splitlines():
            if document.strip():
                ids = tokenizer(document, truncation=True, max_length=length).input_ids
                yield [int(i) for i in ids]


def _tokens(tokenizer: PreTrainedTokenizerBase, piece: _Piece) -> list[int]:
    """Special tokens spelled out in a text are read as text; those of a chat template are meant."""
    ids = tokenizer(
        piece.text, add_special_tokens=False, split_special_tokens=not piece.chat, verbose=False
    ).input_ids  # fmt: skip
    return [int(i) for i in ids]


def _pieces(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Piece]:
    for file in _files(path):
        if file.suffix == ".jsonl":
            for number, line in enumerate(_lines(file), start=1):
                if line.strip():
                    yield _document(line, f"{file}:{number}", tokenizer)
        else:
            for piece in evaluation_text.pieces(file):
                yield _Piece(piece.text)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _ENDINGS)
    if not inside:
        raise TextError(f"{path} holds no file that ends in {', '.join(sorted(_ENDINGS))}", "give a text file")
    return inside


def _lines(path: Path) -> Iterator[str]:
    waiting = ""
    for piece in evaluation_text.pieces(path):
        *whole, waiting = (waiting + piece.text).split("\n")
        yield from whole
        if len(waiting) > _MOST_LINE:
            raise TextError(f"{path} has a line of more than {_MOST_LINE} characters", "is it a .jsonl file?")
    yield waiting


def _document(line: str, place: str, tokenizer: PreTrainedTokenizerBase) -> _Piece:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{place} is not JSON: {error}", 'each line is an object such as {"text": "..."}') from error
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return _Piece(str(value["text"]), whole=True)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        if not tokenizer.chat_template:
            raise TextError(f"{place} has messages, and the tokenizer no chat template", 'give lines with "text"')
        try:
            text = str(tokenizer.apply_chat_template(value["messages"], tokenize=False))
            return _Piece(text, whole=True, chat=True)
        except (ValueError, TypeError, KeyError) as error:
            raise TextError(f"{place}: the chat template refuses it: {error}", "role and content, in turns") from error
    raise TextError(f'{place} has neither "text" nor "messages"', 'each line is an object such as {"text": "..."}')
