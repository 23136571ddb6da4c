"""How each `tokenizer.ggml.pre` of llama.cpp cuts a text into words, of which the merges of BPE never join two.

A file has only the name; what it means stands in llama.cpp's source (src/llama-vocab.cpp, its table `regex_exprs`).
Where a comment there keeps the expression of the model's own tokenizer.json, that one is here: std::regex has no case
folding and no classes of letters by case, and what llama.cpp uses instead differs for letters outside of ASCII.
`otherwise` says so; all else was compared with llama.cpp (xllamacpp 2026.10) on the texts of `probe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from spicerack.text.gguf.vocabulary import WHITESPACE_MARK

_SHORTENED = "'s|'t|'re|'ve|'m|'ll|'d"
_FOLDED = f"(?i:{_SHORTENED})"
_GPT2 = rf"{_SHORTENED}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_LLAMA3 = rf"{_FOLDED}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_REST}"
_QWEN2 = rf"{_FOLDED}|{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|{_REST}"
_QWEN35 = rf"{_FOLDED}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"


def _by_case(end: str, numbers: str, without: str = "") -> str:
    """Words that end before a capital, as tekken and o200k have them; `end`: what may follow a word."""
    capital, small = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
    )
    before = r"[^\r\n\p{L}\p{N}]?"
    return rf"{before}{capital}*{small}+{end}|{before}{capital}+{small}*{end}|{numbers}"


_NUMBER, _NUMBERS = r"\p{N}", r"\p{N}{1,3}"
_TEKKEN = rf"{_by_case('', _NUMBER)}|{_MARKS}[\r\n/]*|{_REST}"
_O200K = rf"{_by_case(_FOLDED + '?', _NUMBERS)}|{_MARKS}[\r\n/]*|{_REST}"
_YOUTU = rf"{_by_case(_FOLDED + '?', _NUMBER)}|{_MARKS}[\r\n/]*|{_REST}"
_NO_HAN = r"&&[^\p{Han}]"
_KIMI = rf"\p{{Han}}+|{_by_case(_FOLDED + '?', _NUMBERS, _NO_HAN)}|{_MARKS}[\r\n]*|{_REST}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ALPHABETIC = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters of alphabets, written out by DeepSeek."""


@dataclass(frozen=True)
class Splitter:
    """What a name of `tokenizer.ggml.pre` stands for.

    patterns   regular expressions of Oniguruma: each cuts what the ones before it left, where it matches and between
    whole      whether a word that is a token stays one, though no merges make it (`ignore_merges`)
    adds_bos   whether a text begins with bos where the file does not say
    composed   whether the models' own tokenizer composes Unicode (NFC) first, which llama.cpp does not
    bytes      whether words are spelled in the alphabet of bytes; else spaces are U+2581, and bytes tokens as <0x0A>
    pairs      whether between two texts stands one more sep, as in RoBERTa
    otherwise  which texts llama.cpp cuts otherwise than the models' own tokenizer; "" for none
    """

    patterns: tuple[str, ...]
    whole: bool = False
    adds_bos: bool = False
    composed: bool = False
    bytes: bool = True
    pairs: bool = False
    otherwise: str = ""

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Of tokenizers: what cuts a text, and spells the words as the vocabulary does."""
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        last = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if self.bytes else []
        return pre_tokenizers.Sequence([*steps, *last])

    def normalizer(self) -> normalizers.Normalizer | None:
        """Of tokenizers: what is done to a text before it is cut."""
        if not self.bytes:
            return normalizers.Replace(" ", WHITESPACE_MARK)
        return normalizers.NFC() if self.composed else None


_BY_CASE = "words with capitals outside of ASCII, and marks behind letters"
_NO_CASE = "words with a capital inside"
_IDEOGRAPHIC = "letters behind an ideographic space (U+3000)"
_STARCODER = (r"\p{N}", _GPT2)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LINES = (r"[^\n]+|[\n]+",)
_DEEPSEEK3_PATTERNS = (r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}[\r\n]*|{_REST}")

SPLITTERS: dict[str, Splitter] = {
    "gpt-2": Splitter((_GPT2,)),
    "llama-bpe": Splitter((_LLAMA3,), whole=True, adds_bos=True),
    "qwen2": Splitter((_QWEN2,), composed=True),
    "tekken": Splitter((_TEKKEN,), whole=True, adds_bos=True, otherwise=_BY_CASE),
    "gpt-4o": Splitter((_O200K,), otherwise=_BY_CASE),
    "starcoder": Splitter(_STARCODER),
    "smaug-bpe": Splitter((_LLAMA3,)),
    "deepseek-r1-qwen": Splitter((_QWEN2,)),
    "qwen35": Splitter((_QWEN35,)),
    "olmo": Splitter((_GPT2,), composed=True),
    "command-r": Splitter(_STARCODER, composed=True),
    "falcon": Splitter((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Splitter(
        (
            "[\\r\\n]",
            rf"\s?[{_ALPHABETIC}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _WIDE,
            r"\p{N}+",
        ),
        otherwise=_IDEOGRAPHIC,
    ),
    "deepseek-coder": Splitter(("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE, r"\p{N}"), otherwise=_IDEOGRAPHIC),
    "deepseek-v3": Splitter(_DEEPSEEK3_PATTERNS),
    "bloom": Splitter((_BLOOM,)),
    "viking": Splitter((_BLOOM, r"\p{N}")),
    "glm4": Splitter((_LLAMA3,), whole=True),
    "minicpm5": Splitter((r"\p{N}{1,3}", rf"{_FOLDED}|{_WORD}|\p{{N}}+|{_MARKS}[\r\n]*|{_REST}"), whole=True),
    "spark2_5": Splitter((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "youtu": Splitter(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+"
            "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
            f"|[\u3105-\u312f]+|{_CJK}",
            _YOUTU,
        ),
        whole=True,
        otherwise=_NO_CASE,
    ),
    "jais-2": Splitter(
        (
            rf"{_FOLDED}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|\s*[\r\n]+|"
            + "|".join(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
            + r"|\s{1}",
        )
    ),
    "granite-embed-multi-97m": Splitter((_O200K,), whole=True, otherwise=_BY_CASE),
    "tiny_aya": Splitter(
        (r"\d{1,3}(?=(?:\d{3})*\b)", _O200K),
        otherwise="digits before a letter, and letters of more than ASCII with capitals",
    ),
    "kimi-k2": Splitter((_KIMI,), otherwise=_NO_CASE),
    "bailingmoe": Splitter((rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)),
    "seed-coder": Splitter((rf"{_FOLDED}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}",)),
    "ufakzeka": Splitter((rf"{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|{_REST}",)),
    "afmoe": Splitter(
        (
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
            "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            rf"{_DEEPSEEK3}[\r\n]*|{_REST}",
        ),
        otherwise="characters of no kind, and white space, beside digits",
    ),
    "laguna": Splitter((*_LINES, _QWEN2)),
    "exaone-moe": Splitter(
        (
            rf"{_FOLDED}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_MARKS}[\r\n/]?"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "chameleon": Splitter(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    "roberta-bpe": Splitter((_GPT2,), pairs=True),
    "gemma4": Splitter(_LINES, adds_bos=True, bytes=False),
    "sarvam-moe": Splitter(_LINES, bytes=False),
    "default": Splitter((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""By name. What is written for a tokenizer is the first that does as it does; names that mean the same are below."""

_SAME = {
    "gpt-2": (
        "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum jais trillion granite-docling exaone4"
    ),
    "olmo": "mpt modern-bert",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    "smaug-bpe": "dbrx chatglm-bpe",
    "glm4": "glm5",
    "qwen2": "kormo f2llmv2 megrez",
    "deepseek-r1-qwen": "stablelm2 hunyuan solar-open grok-2",
    "starcoder": "refact smollm codeshell exaone minerva-7b mellum2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bloom": "poro-chat gpt3-finnish",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "tiny_aya": "cohere2moe",
    "bailingmoe": "bailingmoe2 llada-moe",
    "roberta-bpe": "jina-v1-en jina-v2-code",
    "gemma4": "granite-embed-multi-311m",
}
SPLITTERS.update((name, SPLITTERS[first]) for first, names in _SAME.items() for name in names.split())


def unigram_steps(table: bytes, prefixed: bool, merged: bool) -> list[normalizers.Normalizer]:
    """What SentencePiece does to a text before it looks for tokens, in order.

    table     its map of characters, compiled; empty for none
    prefixed  whether a text begins with a space
    merged    whether several spaces count as one, and those at the ends as none
    """
    first = [normalizers.Precompiled(table)] if table else []
    spaces = [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")] if merged else []
    prefix = [normalizers.Prepend(WHITESPACE_MARK)] if prefixed or merged else []
    return [*first, *spaces, *prefix, normalizers.Replace(" ", WHITESPACE_MARK)]
