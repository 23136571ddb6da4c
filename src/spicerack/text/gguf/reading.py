"""A tokenizer of transformers from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerFast


def tokenizer_of_gguf(metadata: Mapping[str, object], where: str = "the GGUF file") -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describes, as `save_pretrained` writes it.

    metadata   the file's keys; arrays as lists, tuples or numpy arrays; keys of no tokenizer are passed over
    where      what an error calls the file

    Raises CheckpointError where there is no tokenizer, where it is damaged, and where it is of a kind that is not read.
    """
    raise NotImplementedError
