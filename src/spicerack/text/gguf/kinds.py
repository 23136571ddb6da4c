"""What llama.cpp has to be told of a tokenizer's algorithm, found by what that does; or why it cannot be told.

Each takes a tokenizer of the library tokenizers and the JSON of it, and returns a `Kind`, or raises UnsupportedError.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from spicerack.text.gguf.probe import long_texts, short_texts
from spicerack.text.gguf.splitters import SPLITTERS, Splitter, unigram_steps
from spicerack.text.gguf.vocabulary import WHITESPACE_MARK

Parts = Mapping[str, Any]
"""A tokenizer.json."""


class UnsupportedError(Exception):
    """llama.cpp cannot do what the tokenizer does; the message says what that is."""


@dataclass(frozen=True)
class Kind:
    """An algorithm, in llama.cpp's terms.

    model     `tokenizer.ggml.model`
    pre       `tokenizer.ggml.pre`
    scores    token -> score, for those that need one; None for algorithms without
    merges    pairs, best first; None for algorithms without
    flags     further keys, without `tokenizer.ggml.`
    table     `tokenizer.ggml.precompiled_charsmap`; empty for none
    composed  whether texts are composed (NFC) first, which llama.cpp leaves out
    """

    model: str
    pre: str = "default"
    scores: Mapping[str, float] | None = None
    merges: Sequence[tuple[str, str]] | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    table: bytes = b""
    composed: bool = False


def kind_of(tokenizer: Tokenizer, parts: Parts) -> Kind:
    """How llama.cpp can do what this tokenizer does. Raises UnsupportedError, saying what it cannot."""
    model = parts["model"]
    if model["type"] == "BPE":
        if model.get("dropout"):
            raise UnsupportedError("merges at random (dropout)")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise UnsupportedError("marks parts of words with a prefix or suffix")
        return _characters(tokenizer, parts) if model.get("byte_fallback") else _bytes(tokenizer, parts)
    if model["type"] == "Unigram":
        return _unigram(tokenizer, parts)
    if model["type"] == "WordPiece":
        return _wordpiece(parts)
    raise UnsupportedError(f"is of the algorithm {model['type']}")


def _merges(parts: Parts) -> list[tuple[str, str]]:
    """The merges of BPE, best first."""
    merges: list[tuple[str, str]] = [(left, right) for left, right in parts["model"]["merges"]]
    if any(" " in token for pair in merges for token in pair):
        raise UnsupportedError("merges tokens that have a space in them")
    return merges


def steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in a tokenizer.json, those of sequences one by one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers", part.get("pretokenizers", []))
    return [step for entry in inner for step in steps(entry)]


def _bytes(tokenizer: Tokenizer, parts: Parts) -> Kind:
    """BPE over bytes: which of llama.cpp's ways to cut a text is this tokenizer's?"""
    before = [step["type"] for step in steps(parts["normalizer"])]
    if before not in ([], ["NFC"]):
        raise UnsupportedError(f"normalizes texts by {', '.join(before)}")
    name = _name_of_cut(tokenizer, bool(parts["model"].get("ignore_merges")), bool(before), parts)
    return Kind("gpt2", name, merges=_merges(parts), composed=bool(before))


def _name_of_cut(tokenizer: Tokenizer, whole: bool, composed: bool, parts: Parts) -> str:
    """The `tokenizer.ggml.pre` that cuts texts as a tokenizer does, and keeps words whole where that matters."""
    if tokenizer.pre_tokenizer is None:
        raise UnsupportedError("does not cut texts into words before it merges")
    known = {name: splitter for name, splitter in SPLITTERS.items() if splitter.bytes and not splitter.pairs}
    same = _cut_alike(tokenizer.pre_tokenizer, known)
    if not same:
        raise UnsupportedError("cuts texts into words in a way that is none of llama.cpp's (tokenizer.ggml.pre)")
    best = min(same, key=lambda name: (known[name].whole != whole, known[name].composed != composed))
    if known[best].whole != whole and not _merges_suffice(parts):
        raise UnsupportedError(
            "keeps words whole that its merges do not make (or does not), unlike all that cut texts alike"
        )
    return best


def _cut_alike(cut: pre_tokenizers.PreTokenizer, known: Mapping[str, Splitter]) -> list[str]:
    """Names of those that cut every text of the probe as `cut` does, in order."""
    left = {splitter.patterns: splitter.pre_tokenizer() for splitter in known.values()}
    for text in (*short_texts(), *long_texts()):
        pieces = cut.pre_tokenize_str(text)
        left = {patterns: other for patterns, other in left.items() if other.pre_tokenize_str(text) == pieces}
    return [name for name, splitter in known.items() if splitter.patterns in left]


def _merges_suffice(parts: Parts) -> bool:
    """Whether merges make every token of the vocabulary out of its own characters."""
    model = {**parts["model"], "ignore_merges": False}
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    added = {token["content"] for token in parts["added_tokens"]}
    return all(len(bare.model.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _written(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that a tokenizer merges in, as they are spelled."""
    normalized = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [normalized]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]


def _characters(tokenizer: Tokenizer, parts: Parts) -> Kind:
    """BPE over characters, with bytes for those that are no token: SentencePiece's, by scores or by merges."""
    prefixed = _written(tokenizer, "a") == [f"{WHITESPACE_MARK}a"]
    by_line = len(_written(tokenizer, "a\na")) > 1
    for text in short_texts():
        text = text.lstrip()  # readers of SentencePiece differ in what they put before a space
        spelled = (WHITESPACE_MARK if prefixed else "") + text.replace(" ", WHITESPACE_MARK)
        words = re.findall(r"[^\n]+|\n+", spelled) if by_line else [spelled]
        if text and _written(tokenizer, text) != words:
            raise UnsupportedError(f"does not leave texts whole, spaces marked, as SentencePiece does: {text[:20]!r}")
    merges = _merges(parts)
    flags = {"add_space_prefix": prefixed}
    added = {token["content"] for token in parts["added_tokens"]}
    scores = _scores(merges, set(parts["model"]["vocab"]) - added)
    if scores is not None and not by_line:
        return Kind("llama", scores=scores, flags=flags)
    if prefixed:
        raise UnsupportedError("begins texts with a space, and its merges do not follow from scores of tokens")
    if not by_line and any("\n" in pair[0] + pair[1] and set(pair[0] + pair[1]) != {"\n"} for pair in merges):
        raise UnsupportedError(
            "merges line breaks with other characters, and its merges do not follow from scores of tokens"
        )
    adds_bos = len(tokenizer.encode("a").ids) > len(tokenizer.encode("a", add_special_tokens=False).ids)
    return Kind("gpt2", "gemma4" if adds_bos else "sarvam-moe", merges=merges, flags=flags)


def _scores(merges: Sequence[tuple[str, str]], tokens: set[str]) -> dict[str, float] | None:
    """Scores of tokens by which SentencePiece merges as these merges do; None if there are none.

    SentencePiece merges any two neighbours that are a token together, the best token first: so all pairs that make a
    token must be merges. Where merges of several tokens are mixed, these have the same score; then they must stand by
    the length of their left part, as those have it who make merges of scores.
    """
    possible = sum(token[:at] in tokens and token[at:] in tokens for token in tokens for at in range(1, len(token)))
    if possible != len(set(merges)) or any(left not in tokens or right not in tokens for left, right in merges):
        return None
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    ranks: dict[str, float] = {}
    start, end = 0, -1
    for rank, (left, right) in enumerate(merges):
        if rank > end:  # no merge before this one is of a token that has others behind it
            start = rank
        end = max(end, last[left + right])
        ranks[left + right] = -float(start)
        mixed = rank > start and left + right != "".join(merges[rank - 1])
        if mixed and len(left) > len(merges[rank - 1][0]):
            return None
    return {token: ranks.get(token, -float(len(merges))) for token in tokens}


def _unigram(tokenizer: Tokenizer, parts: Parts) -> Kind:
    """Unigram: SentencePiece's table of characters, and what is done with spaces."""
    if parts["model"].get("byte_fallback"):
        raise UnsupportedError("is a Unigram that spells unknown characters in bytes")
    tables = [step for step in steps(parts["normalizer"]) if step["type"] == "Precompiled"]
    others = {step["type"] for step in steps(parts["normalizer"])} - {"Precompiled", "Strip", "Replace", "Prepend"}
    if others or len(tables) > 1:
        raise UnsupportedError(f"normalizes texts by {', '.join(sorted(others)) or 'two tables'}")
    table = base64.b64decode(tables[0]["precompiled_charsmap"]) if tables else b""
    for prefixed, merged in itertools.product((True, False), repeat=2):
        twin = normalizers.Sequence(unigram_steps(table, prefixed, merged))
        if all(
            "".join(_written(tokenizer, text)) == twin.normalize_str(text)
            for text in map(str.strip, short_texts())
            if text
        ):
            scores = {token: float(score) for token, score in parts["model"]["vocab"]}
            flags = {"add_space_prefix": prefixed, "remove_extra_whitespaces": merged}
            return Kind("t5", scores=scores, flags=flags, table=table)
    raise UnsupportedError("does something to spaces that SentencePiece does not")


def _wordpiece(parts: Parts) -> Kind:
    """WordPiece of BERT."""
    if parts["model"]["continuing_subword_prefix"] != "##":
        raise UnsupportedError(f"marks parts of words with {parts['model']['continuing_subword_prefix']!r}")
    normal = parts["normalizer"] or {}
    if normal.get("type") != "BertNormalizer" or not normal["clean_text"] or not normal["handle_chinese_chars"]:
        raise UnsupportedError("does not normalize texts as BERT does")
    if (parts["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer":
        raise UnsupportedError("does not cut texts into words as BERT does")
    accents = normal["lowercase"] if normal["strip_accents"] is None else normal["strip_accents"]
    return Kind("bert", flags={"normalizer.lowercase": normal["lowercase"], "normalizer.strip_accents": accents})
