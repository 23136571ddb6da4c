"""The metadata that makes llama.cpp tokenize as a tokenizer of transformers does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Value = str | bool | int | list[str] | NDArray[np.float32] | NDArray[np.int32] | NDArray[np.uint8]
"""What a key holds: int is written as uint32, a list as an array of strings, an array of numpy as one of its type."""


def gguf_of_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Value]:
    """The keys `tokenizer.*` for llama.cpp: vocabulary, merges, special tokens and chat templates.

    rows   of the model's embedding: as many tokens are written, those that the tokenizer has no name for as unused

    Raises CheckpointError where llama.cpp would not give the same ids, naming what it cannot do.
    """
    raise NotImplementedError
