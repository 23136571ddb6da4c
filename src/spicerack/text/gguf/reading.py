"""A tokenizer of transformers from the metadata of a GGUF file: the same ids that the model's own tokenizer gives.

transformers reads tokenizers from GGUF, too (integrations/gguf); what it does not know it takes for something that it
knows: names of `tokenizer.ggml.pre` other than two dozen are cut as in GPT-2, a Unigram's normalizer is T5's, and
WordPiece is not read at all. Here a name that is not known is refused.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.metadata import Metadata
from spicerack.text.gguf import charsmap
from spicerack.text.gguf.splitters import SPLITTERS, Splitter, unigram_steps
from spicerack.text.gguf.strips import stripped
from spicerack.text.gguf.templates import read_templates
from spicerack.text.gguf.vocabulary import REMEDY, WHITESPACE_MARK, TokenType, Vocabulary, read_vocabulary

_MAX_LENGTH = "{}.context_length"


def tokenizer_of_gguf(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describes; `save_pretrained` writes it.

    Raises CheckpointError, naming the file and the key, where there is no tokenizer, where it is damaged, and where it
    is of a kind that is not read.
    """
    vocabulary = read_vocabulary(metadata)
    build = _BUILDERS.get(vocabulary.model)
    if build is None:
        raise CheckpointError(
            f"{metadata.where}: tokenizer.ggml.model is {vocabulary.model[:60]!r}, which is not read "
            f"(only {', '.join(_BUILDERS)})",
            "use a tokenizer from the model's own folder",
        )
    tokenizer = build(vocabulary, metadata)
    _add_tokens(tokenizer, vocabulary, metadata)
    # as the tokenizer spells them: WordPiece has its own spelling
    names = {f"{name}_token": str(tokenizer.id_to_token(number)) for name, number in vocabulary.specials.items()}
    length = metadata.integer(_MAX_LENGTH.format(metadata.text("general.architecture", "")), 0)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **names,
        **({"model_max_length": length} if length > 0 else {}),
    )
    fast.chat_template = read_templates(metadata)
    return fast


def _byte_pairs(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    """BPE over bytes, or over characters where `tokenizer.ggml.pre` is of a model that has those."""
    name = metadata.text("tokenizer.ggml.pre", "default") or "default"
    splitter = SPLITTERS.get(name)
    if splitter is None:
        raise CheckpointError(
            f"{metadata.where}: tokenizer.ggml.pre is {name[:60]!r}, which is not known",
            "use a tokenizer from the model's own folder",
        )
    return _split_pairs(vocabulary, metadata, splitter)


def _gemma4(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    """BPE over characters, as Gemma 4 has it; what `tokenizer.ggml.pre` says does not count, as in llama.cpp."""
    return _split_pairs(vocabulary, metadata, SPLITTERS["gemma4"])


def _split_pairs(vocabulary: Vocabulary, metadata: Metadata, splitter: Splitter) -> Tokenizer:
    """BPE by the merges of the file, of words that a splitter makes."""
    characters = {} if splitter.bytes else _by_character(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=_known_merges(vocabulary), ignore_merges=splitter.whole, **characters)
    )
    if (normalizer := splitter.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel() if splitter.bytes else _spaces_back(prefixed=False)
    adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", splitter.adds_bos)
    tokenizer.post_processor = _ends(
        vocabulary,
        # llama.cpp lets no file of Gemma 4 do without: many were written so by mistake
        bos=adds_bos or (splitter.adds_bos and not splitter.bytes),
        eos=metadata.flag("tokenizer.ggml.add_eos_token", False),
        pairs=splitter.pairs,
    )
    return tokenizer


def _known_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges of the file. Raises CheckpointError if there are none, or one of tokens that there are not."""
    if vocabulary.merges is None:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.merges is missing", REMEDY)
    known = set(vocabulary.tokens)
    for index, (left, right) in enumerate(vocabulary.merges):
        if left not in known or right not in known or left + right not in known:
            raise CheckpointError(
                f"{vocabulary.where}: merge {index}, of {left[:60]!r} and {right[:60]!r}, is of tokens that there "
                "are not",
                REMEDY,
            )
    return list(vocabulary.merges)


def _sentencepiece(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    """SentencePiece's BPE: of two neighbours that are a token together, those of the best token are merged first."""
    prefixed = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    merges = _scored_merges(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, **_by_character(vocabulary)))
    spaces = normalizers.Replace(" ", WHITESPACE_MARK)
    # a prefix after each special token, too, where other readers of SentencePiece differ: so does llama.cpp
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(WHITESPACE_MARK), spaces]) if prefixed else spaces
    tokenizer.decoder = _spaces_back(prefixed)
    tokenizer.post_processor = _ends(
        vocabulary,
        bos=metadata.flag("tokenizer.ggml.add_bos_token", True),
        eos=metadata.flag("tokenizer.ggml.add_eos_token", False),
    )
    return tokenizer


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that is one together, by that one's score, best first.

    Several pairs may make the same token; SentencePiece then takes the one that comes first in the text, for which BPE
    has no rank. Here that with the longer left part is first: runs of one letter, where it matters, are merged from the
    left.
    """
    if vocabulary.scores is None:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.scores is missing", REMEDY)
    kinds = (TokenType.NORMAL, TokenType.USER_DEFINED)
    known = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in kinds}
    pairs = [
        (-score, -at, token)
        for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True)
        if token in known
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    pairs.sort(key=lambda pair: pair[:2])
    return [(token[:-at], token[-at:]) for _, at, token in pairs]


def _by_character(vocabulary: Vocabulary) -> dict[str, object]:
    """What BPE over characters has beside its merges: a character that is no token is spelled in bytes."""
    unknown = vocabulary.special("unk")
    return {"byte_fallback": True, "fuse_unk": True, **({} if unknown is None else {"unk_token": unknown})}


def _spaces_back(prefixed: bool) -> decoders.Decoder:
    """Tokens of SentencePiece to text."""
    steps = [decoders.Replace(WHITESPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)


def _unigram(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    """Unigram: the likeliest tokens."""
    if vocabulary.scores is None:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.scores is missing", REMEDY)
    if "unk" not in vocabulary.specials:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.unknown_token_id is missing", REMEDY)
    pieces = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=vocabulary.specials["unk"], byte_fallback=False))
    prefixed = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    merged = metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    tokenizer.normalizer = normalizers.Sequence(unigram_steps(_table(metadata), prefixed, merged))
    # llama.cpp cuts nothing, and no token but those that a user defined goes on behind a space
    inner = any(WHITESPACE_MARK in token[1:].lstrip(WHITESPACE_MARK) for token in vocabulary.tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WHITESPACE_MARK, "never", split=not inner)
    tokenizer.decoder = decoders.Metaspace(WHITESPACE_MARK, "always" if prefixed else "never")
    tokenizer.post_processor = _ends(
        vocabulary,
        bos=metadata.flag("tokenizer.ggml.add_bos_token", False),
        eos=metadata.flag("tokenizer.ggml.add_eos_token", True),
    )
    return tokenizer


def _table(metadata: Metadata) -> bytes:
    """SentencePiece's map of characters, compiled; empty where the file has none."""
    if "tokenizer.ggml.precompiled_charsmap" not in metadata:
        return b""
    table = bytes(metadata.array("tokenizer.ggml.precompiled_charsmap", "i8", "u8").raw)
    if (reason := charsmap.obstacle(table)) is not None:
        raise CheckpointError(f"{metadata.where}: tokenizer.ggml.precompiled_charsmap {reason}", REMEDY)
    return table


def _wordpiece(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    """WordPiece: GGUF marks what begins a word, the vocabularies of BERT what goes on with one."""
    marked = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNKNOWN)
    ids: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind not in marked:
            token = token[1:] if token.startswith(WHITESPACE_MARK) and token != WHITESPACE_MARK else f"##{token}"
        if ids.setdefault(token, index) != index:
            raise CheckpointError(
                f"{vocabulary.where}: tokens {ids[token]} and {index} are both {token[:60]!r}", REMEDY
            )
    for name in ("cls", "sep", "unk"):
        if name not in vocabulary.specials:
            raise CheckpointError(f"{vocabulary.where}: {name} is missing among the special tokens", REMEDY)
    spelled = {index: token for token, index in ids.items()}
    first, last, unknown = (spelled[vocabulary.specials[name]] for name in ("cls", "sep", "unk"))
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    lowercase = metadata.flag("tokenizer.ggml.normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=metadata.flag("tokenizer.ggml.normalizer.strip_accents", lowercase)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[(first, vocabulary.specials["cls"]), (last, vocabulary.specials["sep"])],
    )
    return tokenizer


def _ends(vocabulary: Vocabulary, bos: bool, eos: bool, pairs: bool = False) -> processors.PostProcessor:
    """What puts bos before a text and eos behind it; `pairs`: what stands between two is RoBERTa's."""
    wanted = [name for name, adds in (("bos", bos), ("eos", eos)) if adds]
    for name in wanted:
        if name not in vocabulary.specials:
            raise CheckpointError(
                f"{vocabulary.where}: {name} is to be added to texts, but tokenizer.ggml.{name}_token_id is missing",
                REMEDY,
            )
    before = [str(vocabulary.special("bos"))] if bos else []
    after = [str(vocabulary.special("eos"))] if eos else []
    second = [*after, "$B", *after] if pairs else [*before, "$B:1", *after]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second],
        special_tokens=[(str(vocabulary.special(name)), vocabulary.specials[name]) for name in wanted],
    )


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, metadata: Metadata) -> None:
    """Tells the tokenizer which tokens are found in a text before all else, as they stand in it."""
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    whole = [(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in kinds]
    left, right = stripped(metadata, [token for token, _ in whole])
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                lstrip=token in left,
                rstrip=token in right,
                normalized=False,
                special=kind is not TokenType.USER_DEFINED,
            )
            for token, kind in whole
        ]
    )


_BUILDERS = {
    "gpt2": _byte_pairs, "llama": _sentencepiece, "gemma4": _gemma4, "t5": _unigram, "bert": _wordpiece,
}  # fmt: skip
"""By `tokenizer.ggml.model`."""
