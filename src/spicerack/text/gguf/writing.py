"""The metadata that makes llama.cpp tokenize as a tokenizer of transformers does, or the reason why nothing can.

Two steps. What the tokenizer is, is found by what it does (kinds). Then what was written is read again, as any file of
strangers is, and has to give the same ids for all texts of the probe and around every special token: reading follows
llama.cpp, and is tested against it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.metadata import Array, Entry, Metadata, Value
from spicerack.text.gguf.kinds import Kind, Parts, UnsupportedError, kind_of
from spicerack.text.gguf.probe import long_texts, short_texts
from spicerack.text.gguf.reading import tokenizer_of_gguf
from spicerack.text.gguf.splitters import SPLITTERS
from spicerack.text.gguf.templates import templates_of
from spicerack.text.gguf.vocabulary import SPECIAL_KEYS, WHITESPACE_MARK, TokenType

_GGML = "tokenizer.ggml."
_LLAMA_CPP = {
    "t5": ["half-width katakana with a mark behind it: tokenizers maps both alone, llama.cpp together"],
    "bert": ["Korean, where accents are stripped: llama.cpp takes syllables apart otherwise"],
}
"""By model: what llama.cpp (xllamacpp 2026.10) was seen to do otherwise than tokenizers with the same vocabulary."""


def gguf_of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: int, *, architecture: str = "", name: str = ""
) -> dict[str, Entry]:
    """The keys `tokenizer.*` for llama.cpp: vocabulary, merges, special tokens and chat templates.

    rows          of the model's embedding: as many tokens are written, those that the tokenizer has not as unused ones
    architecture  `general.architecture` of the file, by which llama.cpp knows some tokens' white space; as does
    name          `general.name`

    Raises CheckpointError where llama.cpp would not give the same ids, naming what it cannot do.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refused(f"is no tokenizer of the library tokenizers, but {type(tokenizer).__name__}")
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    parts: Parts = json.loads(plain.to_str())
    try:
        kind = kind_of(plain, parts)
        entries: dict[str, Entry] = {
            f"{_GGML}model": Value("string", kind.model),
            f"{_GGML}pre": Value("string", kind.pre),
            **_vocabulary(parts, kind, rows, tokenizer.unk_token),
            **_specials(tokenizer, plain, kind),
            **{f"{_GGML}{key}": Value("bool", flag) for key, flag in kind.flags.items()},
        }
        if kind.table:
            entries[f"{_GGML}precompiled_charsmap"] = Array.of("u8", kind.table)
        told = {"general.architecture": Value("string", architecture), "general.name": Value("string", name)}
        again = tokenizer_of_gguf(Metadata({**entries, **told}, "what was written")).backend_tokenizer
        _compare(plain, again, parts, kind.composed, tokenizer.mask_token)
    except UnsupportedError as reason:
        raise _refused(str(reason)) from None
    return {**entries, **templates_of(tokenizer.chat_template)}


def differences(tokenizer: PreTrainedTokenizerFast, entries: Mapping[str, Entry]) -> list[str]:
    """On which texts, rare in practice, llama.cpp gives other ids after all: a line for each kind of them.

    entries   what `gguf_of_tokenizer` returned for it, with `general.*` of the file
    """
    metadata = Metadata(entries, "what was written")
    again, ours = tokenizer_of_gguf(metadata).backend_tokenizer, tokenizer.backend_tokenizer
    cases = {
        "texts that Unicode would compose (NFC): llama.cpp does not": ("cafe\u0301",),
        "texts that begin with a space: llama.cpp puts one more before them": (" a", "  a"),
        "words right behind a special token: llama.cpp puts a space before them": tuple(
            f"a{token}a" for token in tokenizer.all_special_tokens
        ),
    }
    lines = [line for line, texts in cases.items() if any(_ids(ours, text) != _ids(again, text) for text in texts)]
    model = metadata.text(f"{_GGML}model")
    if model == "gpt2" and (otherwise := SPLITTERS[metadata.text(f"{_GGML}pre")].otherwise):
        lines.append(f"{otherwise}: llama.cpp cuts them otherwise")
    return lines + _LLAMA_CPP.get(model, [])


def _refused(reason: str) -> CheckpointError:
    """For a tokenizer that llama.cpp cannot follow."""
    return CheckpointError(f"the tokenizer {reason}; llama.cpp has no such tokenizer", "export to a folder instead")


def _ids(tokenizer: Tokenizer, text: str, ends: bool = False) -> list[int]:
    """Ids of a text; `ends`: with what is added before and behind it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=ends).ids
    return ids


def _vocabulary(parts: Parts, kind: Kind, rows: int, unknown: str | None) -> dict[str, Entry]:
    """Tokens, their types, scores and merges."""
    vocabulary = parts["model"]["vocab"]
    if kind.model == "t5":
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["id"]: token for token in parts["added_tokens"]}
    by_id = {index: token for token, index in vocabulary.items()} | {index: t["content"] for index, t in added.items()}
    if max(by_id) >= rows:
        raise UnsupportedError(f"has token {max(by_id)}, and the model only {rows} rows for tokens")
    tokens, types = [], []
    for index in range(rows):
        spelled, token_type = f"[PAD{index}]", TokenType.UNUSED
        if index in added:
            spelled, token_type = by_id[index], TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
            if by_id[index] == unknown and kind.model in ("llama", "t5"):
                token_type = TokenType.UNKNOWN
        elif index in by_id and (kind.model != "bert" or by_id[index] != "##"):  # "##" begins words that have no more
            spelled, token_type = _spelled(by_id[index], kind)
        tokens.append(spelled)
        types.append(token_type)
    if len(set(tokens)) < rows:
        raise UnsupportedError("has two tokens that llama.cpp would spell alike")
    entries: dict[str, Entry] = {
        f"{_GGML}tokens": Array.of("string", tokens),
        f"{_GGML}token_type": Array.of("i32", map(int, types)),
    }
    if kind.scores is not None:
        lowest = min(kind.scores.values(), default=0.0)
        scores = [kind.scores.get(by_id[index], lowest) if index in by_id else lowest for index in range(rows)]
        entries[f"{_GGML}scores"] = Array.of("f32", scores)
    if kind.merges is not None:
        entries[f"{_GGML}merges"] = Array.of("string", map(" ".join, kind.merges))
    return entries


def _spelled(token: str, kind: Kind) -> tuple[str, TokenType]:
    """A token of the model as GGUF has it, and its type."""
    if kind.model == "bert":
        return (token[2:] if token.startswith("##") else WHITESPACE_MARK + token), TokenType.NORMAL
    by_character = kind.model == "llama" or kind.flags.get("add_space_prefix") is not None
    is_byte = by_character and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return token, TokenType.BYTE if is_byte else TokenType.NORMAL


def _specials(tokenizer: PreTrainedTokenizerFast, plain: Tokenizer, kind: Kind) -> dict[str, Entry]:
    """Ids of special tokens, and which are put before and behind a text."""
    numbers = {name: plain.token_to_id(token) for name, token in _names(tokenizer) if token is not None}
    ids = {name: number for name, number in numbers.items() if number is not None}
    before, after = _ends(plain)
    if kind.model == "bert":
        if before != [ids.get("cls")] or after != [ids.get("sep")]:
            raise UnsupportedError("does not put cls before a text and sep behind it")
        ids["bos"] = ids["cls"]
    else:
        if len(before) > 1 or len(after) > 1:
            raise UnsupportedError("puts more than one token before a text or behind it")
        if before and ids.setdefault("bos", before[0]) != before[0]:
            raise UnsupportedError("puts another token than bos before a text")
        if after and ids.setdefault("eos", after[0]) != after[0]:
            ids["eot"], ids["eos"] = ids["eos"], after[0]  # what ends a turn of a chat stops llama.cpp, too
    if kind.model == "gpt2":
        if "eos" not in ids:
            raise UnsupportedError("has no eos, for which llama.cpp would take token 11")
        ids.setdefault("bos", ids["eos"])  # or llama.cpp takes token 11
    keys = {**SPECIAL_KEYS, "eot": f"{_GGML}eot_token_id"}
    entries: dict[str, Entry] = {keys[name]: Value("u32", number) for name, number in ids.items()}
    entries[f"{_GGML}add_bos_token"] = Value("bool", bool(before))
    entries[f"{_GGML}add_eos_token"] = Value("bool", bool(after) and kind.model != "bert")
    return entries


def _names(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str | None]]:
    """Names of special tokens, without `_token`, and what they are."""
    yield "bos", tokenizer.bos_token
    yield "eos", tokenizer.eos_token
    yield "unk", tokenizer.unk_token
    yield "sep", tokenizer.sep_token
    yield "pad", tokenizer.pad_token
    yield "cls", tokenizer.cls_token
    yield "mask", tokenizer.mask_token


def _ends(plain: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that are put before a text, and behind it."""
    bare, whole = _ids(plain, "a"), _ids(plain, "a", ends=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UnsupportedError("changes the tokens of a text when it adds special ones")


def _compare(ours: Tokenizer, again: Tokenizer, parts: Parts, composed: bool, mask: str | None) -> None:
    """Raises UnsupportedError where what was written gives other ids: for the probe's texts, around added tokens."""
    for text in (*short_texts(), *long_texts()):
        # `differences` tells of a space at the start, and of texts that are not composed
        text = unicodedata.normalize("NFC", text.lstrip()) if composed else text.lstrip()
        if _ids(ours, text, ends=True) != _ids(again, text, ends=True):
            raise UnsupportedError(f"gives ids for {text[:20]!r} that llama.cpp would not give")
    again_parts: Parts = json.loads(again.to_str())
    sides = {token["content"]: _sides(token) for token in again_parts["added_tokens"]}
    for token in parts["added_tokens"]:
        content = token["content"]
        if sides.get(content) != _sides(token) and content != mask:  # texts of models have no masks
            raise UnsupportedError(f"finds its token {content!r} by the white space or words beside it")
        for text in (f"a{content}", f"a{content}{content}"):
            if _ids(ours, text) != _ids(again, text):
                raise UnsupportedError(f"finds its token {content!r} in a text otherwise than llama.cpp does")


def _sides(token: Mapping[str, Any]) -> tuple[bool, ...]:
    """What an added token does to the text beside it."""
    return token["lstrip"], token["rstrip"], token["single_word"]
