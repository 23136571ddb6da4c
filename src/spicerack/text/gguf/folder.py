"""The tokenizer of a model folder as the keys of a GGUF file, and what llama.cpp makes of some texts all the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from spicerack.errors import CheckpointError
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.models.gguf.family import Family
from spicerack.storage.gguf.metadata import Entry, Value
from spicerack.storage.reader import Checkpoint
from spicerack.text.gguf.strips import what_counts
from spicerack.text.gguf.writing import differences, gguf_of_tokenizer
from spicerack.text.tokenizer import read_tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
"""Files of a tokenizer, one of which a folder has that has a tokenizer."""


@dataclass(frozen=True, slots=True)
class Words:
    """A tokenizer in a GGUF file.

    entries      its keys, `tokenizer.*`
    differences  on which texts, rare in practice, llama.cpp gives other ids, a line for each kind of them
    """

    entries: Mapping[str, Entry]
    differences: tuple[str, ...] = ()


def words_of(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], name: str = "") -> Words:
    """The tokenizer of a folder; a GGUF file's own as it is.

    config: of the float model, whole (`models.gguf.config.whole`). name: of the model in the file, by which llama.cpp
    knows the white space of some. Raises CheckpointError where there is none, or one that llama.cpp has not.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return Words({key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")})
    files = tuple(path for path in (checkpoint.folder / file for file in _FILES) if path.is_file())
    if not files:
        raise CheckpointError("the folder has no tokenizer, without which llama.cpp runs no model", "add its files")
    state = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    whole = json.dumps(dict(config))
    return _words(checkpoint.folder, state, family.model_type, whole, family.architecture, what_counts(name))


@lru_cache(maxsize=4)
def _words(folder: Path, _state: object, model_type: str, config: str, architecture: str, name: str) -> Words:
    """The same of files in that state: an export asks three times, and each takes a second."""
    of_model = CONFIG_MAPPING[model_type].from_dict(json.loads(config))
    tokenizer = read_tokenizer(folder, of_model)
    entries = gguf_of_tokenizer(tokenizer, of_model.vocab_size, architecture=architecture, name=name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "others were refused"
    general: dict[str, Entry] = {
        "general.architecture": Value("string", architecture),
        "general.name": Value("string", name),
    }
    return Words(entries, tuple(differences(tokenizer, {**entries, **general})))
