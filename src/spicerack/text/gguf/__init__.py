"""Tokenizers and chat templates as GGUF's metadata holds them, and transformers' tokenizers, both ways.

metadata    the keys: what is read is checked, for files of strangers
splitters   how each `tokenizer.ggml.pre` cuts a text before its merges
reading     metadata -> a fast tokenizer of transformers
writing     a fast tokenizer -> metadata, or a refusal that names what llama.cpp could not do the same way
templates   chat templates, with names or without
folder      all of it for a model folder
"""

from __future__ import annotations

from spicerack.text.gguf.reading import tokenizer_of_gguf
from spicerack.text.gguf.writing import gguf_of_tokenizer

__all__ = ["gguf_of_tokenizer", "tokenizer_of_gguf"]
