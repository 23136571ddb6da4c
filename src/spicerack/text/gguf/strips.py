"""Which special tokens swallow the white space beside them. A GGUF file does not say it; llama.cpp goes by names.

The rules are those at the end of `llama_vocab::impl::load` (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Collection

from spicerack.storage.gguf.metadata import Metadata

_PHI = ("phi-3", "phi3")
_MODERN = "modern-bert"


def what_counts(name: str) -> str:
    """A model's name as far as llama.cpp looks at it: all names with the same answer are the same to it."""
    return next((part for part in (*_PHI, _MODERN) if part in name.lower()), "")


def stripped(metadata: Metadata, special: Collection[str]) -> tuple[set[str], set[str]]:
    """Those of the special tokens that llama.cpp lets swallow white space: to their left, and to their right.

    metadata   of which architecture, name and pre-tokenizer are looked at
    special    all tokens that are found in a text as they stand in it
    """
    pre = metadata.text("tokenizer.ggml.pre", "")
    name = what_counts(metadata.text("general.name", ""))
    architecture = metadata.text("general.architecture", "")
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")
    ):
        return {"<mask>"}, set()
    if name in _PHI:
        return set(), {*special, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}
    return ({"[MASK]"}, set()) if name == _MODERN else (set(), set())
