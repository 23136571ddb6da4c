"""Tokenizers of GGUF files, in and out: the ids that llama.cpp itself gives, the same there and back, or a refusal."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer
from llama_cpp import LlamaCpp, zeros_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spicerack.errors import CheckpointError, TextError
from spicerack.storage.gguf.metadata import Array, Entry, Metadata, Value
from spicerack.text.chats import render
from spicerack.text.gguf import gguf_of_tokenizer, tokenizer_of_gguf
from spicerack.text.gguf.probe import long_texts, short_texts
from spicerack.text.gguf.splitters import SPLITTERS
from spicerack.text.gguf.vocabulary import TokenType
from spicerack.text.gguf.writing import differences

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "assets" / "stdlib-lm"
TEXTS = (*short_texts()[:9], *long_texts()[::3], *short_texts()[9::41])
"""Of the probe: lines, and every few of the rest."""
CORPUS = [text[at : at + 9] for text in (*short_texts()[:9], *long_texts()) for at in range(0, len(text), 9)]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def metadata(entries: dict[str, Entry], **more: Entry) -> Metadata:
    return Metadata({**entries, **more}, "m.gguf")


def texts(key: str, *items: str) -> dict[str, Entry]:
    return {f"tokenizer.ggml.{key}": Array.of("string", items)}


@cache
def greedy_merges(by_bytes: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of a BPE that joins any neighbours: where a text is cut shows in its ids."""
    if by_bytes:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        special, alphabet = ["<|end|>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], []
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=4000, initial_alphabet=sorted(alphabet), special_tokens=special, show_progress=False
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple(map(" ".join, model["merges"]))


def greedy(pre: str) -> dict[str, Entry]:
    """A vocabulary of these merges for that name of `tokenizer.ggml.pre`."""
    by_bytes = SPLITTERS[pre].bytes
    tokens, merges = greedy_merges(by_bytes)
    types = [
        TokenType.CONTROL if token in ("<|end|>", "<unk>", "<s>", "</s>")
        else TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL for token in tokens
    ]  # fmt: skip
    ids = {"bos": 0, "eos": 0} if by_bytes else {"unknown": 0, "bos": 1, "eos": 2}
    return {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", pre),
        **texts("tokens", *tokens),
        **texts("merges", *merges),
        "tokenizer.ggml.token_type": Array.of("i32", map(int, types)),
        **{f"tokenizer.ggml.{name}_token_id": Value("u32", number) for name, number in ids.items()},
    }


ALIKE = {(splitter.patterns, splitter.whole): name for name, splitter in reversed(SPLITTERS.items())}
"""One name for each way to cut a text."""
FAMILIES = ("gpt-2", "llama-bpe", "qwen2", "starcoder", "deepseek-v3", "gemma4", "default")
"""That are looked at every time; the others are as many seconds."""


@pytest.mark.parametrize(
    "pre",
    [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.interop) for name in sorted(ALIKE.values())],
)
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    entries = greedy(pre)
    ours = tokenizer_of_gguf(metadata(entries)).backend_tokenizer
    llama = LlamaCpp(zeros_model(tmp_path / "m.gguf", entries))
    unequal = 0
    for text in TEXTS:
        # composing is the models' own, and not llama.cpp's
        text = unicodedata.normalize("NFC", text) if SPLITTERS[pre].composed else text
        unequal += ours.encode(text, add_special_tokens=False).ids != llama.ids(text)
    if SPLITTERS[pre].otherwise:
        assert 0 < unequal < len(TEXTS) // 2, "what llama.cpp does otherwise is rare, and is seen here"
    else:
        assert unequal == 0


@pytest.mark.parametrize("pre", sorted({"gpt-2", "llama-bpe", "qwen2", "tekken", "deepseek-coder", "falcon", "viking"}))
def test_a_tokenizer_is_recognised_by_how_it_cuts(pre: str) -> None:
    tokenizer = tokenizer_of_gguf(metadata(greedy(pre)))
    written = gguf_of_tokenizer(tokenizer, len(tokenizer))
    assert written["tokenizer.ggml.pre"] == Value("string", pre)


def test_a_way_to_cut_that_is_spelled_otherwise_is_recognised() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert gguf_of_tokenizer(tokenizer, 257)["tokenizer.ggml.pre"] == Value("string", "starcoder")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # fewer digits than starcoder's
    with pytest.raises(CheckpointError, match=r"in a way that is none of llama\.cpp's"):
        gguf_of_tokenizer(tokenizer, 257)


def sentencepiece(prefixed: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's: scores of tokens, which llama.cpp reads, made of the commonest pieces of words."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "hello",
        "world",
        "ing",
        "ed",
        "tion",
        "Жук",
    ]
    runs = {piece for word in words for at in range(len(word)) for end in range(at + 1, len(word) + 1)
            for piece in (word[at:end], "\u2581" + word[:end])}  # fmt: skip
    spaces = ["\u2581" * count for count in (2, 4, 8)]
    pieces += [*spaces, *sorted(runs, key=lambda piece: (-len(piece), piece)), "\u2581"]
    entries = {
        "tokenizer.ggml.model": Value("string", "llama"),
        **texts("tokens", *pieces),
        "tokenizer.ggml.scores": Array.of("f32", [float(-at) for at in range(len(pieces))]),
        "tokenizer.ggml.token_type": Array.of("i32", [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]),
        "tokenizer.ggml.add_space_prefix": Value("bool", prefixed),
    }
    return tokenizer_of_gguf(metadata(entries))


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's, of bundled text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [(ASSET / "heldout.txt").read_text()[:20000]],
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def unigram() -> PreTrainedTokenizerFast:
    """As T5's, without a table of characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [(ASSET / "heldout.txt").read_text()[:20000]],
        trainers.UnigramTrainer(
            vocab_size=600, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
        ),
    )
    # SentencePiece has scores of 32 bits; with more, ties end otherwise
    pieces = [(piece, float(np.float32(score))) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer.model = models.Unigram(pieces, unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def own() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.mark.parametrize("make", [own, sentencepiece, wordpiece, unigram])
def test_llama_cpp_gives_the_ids_of_the_tokenizer_that_was_written(
    make: Callable[[], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    rows = len(tokenizer) + 3  # a model's table of tokens may have rows that no token has
    written = gguf_of_tokenizer(tokenizer, rows)
    assert len(written["tokenizer.ggml.tokens"]) == rows  # type: ignore[arg-type]
    llama = LlamaCpp(zeros_model(tmp_path / "m.gguf", written))
    again = tokenizer_of_gguf(metadata(written))
    lines = (ASSET / "heldout.txt").read_text()[:3000].splitlines()
    for text in ("Hello world", "a<think>b", "the  quick\n\nbrown fox", "na\u00efve 12345", *lines):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        # llama.cpp puts cls and sep of BERT wherever the others get bos
        assert llama.ids(text, ends=True) == ids, text


def test_a_tokenizer_comes_back_from_a_folder_as_it_was_read(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "\n{{ tools }}\n\n"}
    read = tokenizer_of_gguf(metadata(gguf_of_tokenizer(tokenizer, len(tokenizer))))
    read.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_tokens == read.all_special_tokens
    for text in TEXTS:
        assert loaded.encode(text) == read.encode(text)


def test_chats_are_rendered_as_llama_cpp_renders_them(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = TEMPLATE
    written = gguf_of_tokenizer(tokenizer, len(tokenizer))
    text = render(tokenizer_of_gguf(metadata(written)), CHAT, "a chat")
    assert text == render(tokenizer, CHAT, "a chat")
    # llama.cpp leaves out a bos that it adds itself
    assert text == "<s>" + LlamaCpp(zeros_model(tmp_path / "m.gguf", written)).rendered(CHAT).removeprefix("<s>")


def test_templates_of_strangers_stay_in_the_sandbox_and_their_names_in_the_folder() -> None:
    entries = gguf_of_tokenizer(byte_tokenizer(), 257)
    hostile = Value("string", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    read = tokenizer_of_gguf(metadata(entries, **{"tokenizer.chat_template": hostile}))
    with pytest.raises(TextError, match="refuses it"):
        render(read, CHAT, "a chat")
    for name in ("../../evil", "a/b", "", "con\n"):
        with pytest.raises(CheckpointError, match="chat template"):
            tokenizer_of_gguf(metadata(entries, **{f"tokenizer.chat_template.{name}": hostile}))
    with pytest.raises(CheckpointError, match=r"tokenizer.chat_template is u32"):
        tokenizer_of_gguf(metadata(entries, **{"tokenizer.chat_template": Value("u32", 1)}))


HOSTILE: dict[str, tuple[dict[str, Entry], str]] = {
    "no model": ({"tokenizer.ggml.model": Value("u32", 1)}, "tokenizer.ggml.model is u32"),
    "unknown model": ({"tokenizer.ggml.model": Value("string", "rwkv")}, "tokenizer.ggml.model is 'rwkv'"),
    "unknown pre": ({"tokenizer.ggml.pre": Value("string", "new-bpe")}, "tokenizer.ggml.pre is 'new-bpe'"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": Array.of("u32", [1])}, "tokenizer.ggml.tokens is an array of u32"),
    "no tokens": (texts("tokens"), "tokenizer.ggml.tokens is empty"),
    "a token twice": (texts("tokens", *"abcab", *"defgh"), "tokens 0 and 3 are both 'a'"),
    "few types": ({"tokenizer.ggml.token_type": Array.of("i32", [1])}, "token_type has 1 items for 257 tokens"),
    "types are text": (texts("token_type", "a"), "token_type is an array of string"),
    "scores are not finite": (
        {"tokenizer.ggml.scores": Array.of("f32", [float("nan")] * 257)}, "scores has numbers that are not finite"
    ),
    "an id out of range": ({"tokenizer.ggml.bos_token_id": Value("u32", 257)}, "bos_token_id is 257 of 257 tokens"),
    "a negative id": ({"tokenizer.ggml.eos_token_id": Value("i32", -1)}, "eos_token_id is -1 of 257 tokens"),
    "a merge of one": (texts("merges", "ab"), "merge 0 is 'ab', not two tokens"),
    "merges of unknown tokens": (texts("merges", "a zz"), "merge 0, of 'a' and 'zz'"),
    "merges to no token": (texts("merges", "a b"), "merge 0, of 'a' and 'b'"),
    "a flag that is none": ({"tokenizer.ggml.add_bos_token": Value("u8", 1)}, "add_bos_token is u8"),
    "sentencepiece without scores": ({"tokenizer.ggml.model": Value("string", "llama")}, "scores is missing"),
    "unigram without scores": ({"tokenizer.ggml.model": Value("string", "t5")}, "scores is missing"),
    "a damaged table": (
        {
            "tokenizer.ggml.model": Value("string", "t5"),
            "tokenizer.ggml.scores": Array.of("f32", [0.0] * 257),
            "tokenizer.ggml.precompiled_charsmap": Array.of("u8", [255] * 5),
        },
        "precompiled_charsmap has 5 bytes and promises an array of 4294967295",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_vocabularies_are_refused_by_name(case: str) -> None:
    entries, message = HOSTILE[case]
    sound = gguf_of_tokenizer(byte_tokenizer(), 257)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")) as error:
        tokenizer_of_gguf(metadata({**sound, **entries}))
    assert "m.gguf" in str(error.value)


def test_maps_of_characters_that_lead_outside_are_refused() -> None:
    sound = gguf_of_tokenizer(unigram(), 700)

    def read(units: dict[int, int], replacements: bytes = b"x\0") -> PreTrainedTokenizerFast:
        array = np.zeros(256, np.uint32)
        for place, unit in units.items():
            array[place] = unit
        table = Array.of("u8", (1024).to_bytes(4, "little") + array.tobytes() + replacements)
        return tokenizer_of_gguf(metadata(sound, **{"tokenizer.ggml.precompiled_charsmap": table}))

    # a map of "a" to "x": from the root (0) to the unit of "a", which has a replacement at 7, which is at 0 of the text
    a = {0x61: 0x61 | 1 << 8 | (0x61 ^ 7) << 10, 7: 1 << 31}
    assert read(a).backend_tokenizer.normalizer.normalize_str("banana") == "\u2581bxnxnx"
    assert read({}).encode("banana") == unigram().encode("banana")
    for units, replacements, reason in (
        ({0: 1 << 20}, b"x\0", "leads outside of its array"),
        ({**a, 7: 1 << 31 | 2}, b"x\0", "leads outside of its replacements"),
        (a, b"x", "leads outside of its replacements"),
        ({**a, 7: 1 << 31 | 1}, "\u00e9\0".encode(), "leads into the middle of a character"),
        (a, b"\xff\0", "has replacements that are not text in UTF-8"),
    ):
        with pytest.raises(CheckpointError, match=f"precompiled_charsmap {reason}"):
            read(units, replacements)


def test_special_tokens_of_wordpiece_are_spelled_as_the_vocabulary_spells_them() -> None:
    entries = gguf_of_tokenizer(wordpiece(), 600)
    tokens = [str(token) for token in entries["tokenizer.ggml.tokens"]]  # type: ignore[union-attr]
    normal = {**entries, **texts("tokens", tokens[0], "\u2581[UNK]", *tokens[2:])}
    normal["tokenizer.ggml.token_type"] = Array.of("i32", [3, 1, *[3] * 3, *[1] * 595])
    read = tokenizer_of_gguf(metadata(normal))
    assert (read.unk_token, read.unk_token_id, len(read)) == ("[UNK]", 1, 600)
    assert read.encode("\u4e00") == [2, 1, 3]


def test_bos_without_an_id_and_files_without_a_tokenizer_are_refused() -> None:
    entries = gguf_of_tokenizer(byte_tokenizer(), 257)
    del entries["tokenizer.ggml.bos_token_id"]
    with pytest.raises(CheckpointError, match="bos is to be added to texts"):
        tokenizer_of_gguf(metadata(entries, **{"tokenizer.ggml.add_bos_token": Value("bool", True)}))
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.model is missing"):
        tokenizer_of_gguf(metadata({}))


def changed(part: str, value: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with another part."""
    tokenizer = byte_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, value)
    return tokenizer


REFUSED: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str]] = {
    "a prefix": (lambda: changed("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts texts"),
    "lower case": (lambda: changed("normalizer", normalizers.Lowercase()), "normalizes texts by Lowercase"),
    "nothing is cut": (lambda: changed("pre_tokenizer", None), "does not cut texts into words"),
    "two before a text": (
        lambda: changed(
            "post_processor",
            processors.TemplateProcessing(single="<|end|> <|end|> $A", special_tokens=[("<|end|>", 256)]),
        ),
        "puts more than one token before a text",
    ),
    "words": (
        lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
        "is of the algorithm WordLevel",
    ),
    "white space is swallowed": (
        lambda: with_added(byte_tokenizer(), AddedToken("<x>", lstrip=True)), "finds its token '<x>' by the white space"
    ),
    "no eos": (lambda: PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer), "has no eos"),
}  # fmt: skip


def with_added(tokenizer: PreTrainedTokenizerFast, token: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        gguf_of_tokenizer(make(), 300)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(CheckpointError, match="has token 256, and the model only 200 rows"):
        gguf_of_tokenizer(byte_tokenizer(), 200)


def test_rare_differences_are_told() -> None:
    tokenizer = byte_tokenizer()
    assert differences(tokenizer, gguf_of_tokenizer(tokenizer, 257)) == []
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    written = gguf_of_tokenizer(tokenizer, 257)
    assert written["tokenizer.ggml.pre"] == Value("string", "olmo"), "whose models compose, too"
    spaced = sentencepiece()
    spaced.backend_tokenizer.normalizer = None  # type: ignore[assignment]
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    told = differences(spaced, gguf_of_tokenizer(spaced, len(spaced)))
    assert [line.partition(":")[0] for line in told] == [
        "texts that begin with a space", "words right behind a special token",
    ]  # fmt: skip


def test_merges_of_characters_that_follow_from_no_scores_are_written_as_merges(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_gguf(metadata(greedy("sarvam-moe")))
    written = gguf_of_tokenizer(tokenizer, len(tokenizer))
    assert written["tokenizer.ggml.pre"] == Value("string", "sarvam-moe")
    llama = LlamaCpp(zeros_model(tmp_path / "m.gguf", written))
    for text in TEXTS[:40]:
        assert llama.ids(text, ends=True) == tokenizer.encode(text)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    with pytest.raises(CheckpointError, match="begins texts with a space, and its merges do not follow from scores"):
        gguf_of_tokenizer(tokenizer, len(tokenizer))


def test_phi_3_swallows_white_space_behind_its_tokens() -> None:
    entries = gguf_of_tokenizer(with_added(sentencepiece(), AddedToken("<|end|>", special=True)), 700)
    read = tokenizer_of_gguf(metadata(entries, **{"general.name": Value("string", "Phi-3-mini")}))
    assert read.encode("<|end|>\n the") == read.encode("<|end|>the")
    plain = tokenizer_of_gguf(metadata(entries))
    assert plain.encode("<|end|>\n the") != plain.encode("<|end|>the")
