"""config.json and the metadata of a GGUF file, both ways.

Going out a config is first made whole by transformers' own class, which knows what is left out and how older files said
it. Coming in only what the file says is written down, and what llama.cpp takes for granted: the rest is the class's
business again. Numbers in float32 come back as the shortest decimal that is them, so that 1e-06 stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from spicerack.errors import CheckpointError
from spicerack.models.architecture import harmless
from spicerack.models.gguf import rope
from spicerack.models.gguf.family import Family, Window
from spicerack.models.gguf.rope import decimal, head_dim
from spicerack.storage.gguf.metadata import Array, Entry, Metadata, Value

MODEL_TYPE, DTYPE = "spicerack.model_type", "spicerack.dtype"
"""Our own keys: what transformers calls the family, and the float type of the model that the file was made from."""
POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}
"""How a sentence encoder makes one vector of many, and llama.cpp's number for it."""
_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"
_KINDS_OF_TOKENS = "tokenizer.ggml.token_type_count"
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_MOST = 1 << 31
"""Of a size that is read: more than any model has, and what transformers' classes take."""
_MOST_LAYERS = 10_000
_MOST_WIDTH = 1 << 14
"""Columns of a head, of which transformers makes a table before it looks at a weight; models have 512 at most."""
_BAD_CONFIG = (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError)


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with all that transformers' class adds to it, rotary embeddings in the one way that is current.

    Raises CheckpointError for a family that transformers does not know, and for a damaged config.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers does not know models of the family {model_type!r}", "update transformers")
    try:
        full: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(harmless(dict(config))).to_dict()
    except _BAD_CONFIG as error:
        raise CheckpointError(f"config.json: {error}", "the file is damaged, or newer than transformers") from error
    return full


def obstacles(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp would not compute what the model does, a sentence each; empty if it does.

    config: whole.
    """
    reasons = []
    classes = config.get("architectures") or [family.classes[0]]
    if classes[0] not in family.classes:
        reasons.append(
            f"{classes[0]} has weights that GGUF has no names for; {' and '.join(family.classes)} go into it"
        )
    for key, allowed in family.fixed.items():
        if key in config and config[key] not in allowed:
            taken = " or ".join(repr(value) for value in allowed)
            reasons.append(f"config.json has {key} {config[key]!r}, and llama.cpp computes with {taken}")
    if family.window is None and any(kind not in family.kinds for kind in config.get("layer_types") or ()):
        reasons.append("some layers look back a bounded number of tokens, and in llama.cpp none does")
    if (reason := rope.obstacle(family, config)) is not None:
        reasons.append(reason)
    if not reasons and (reason := family.refuses(config)) is not None:
        reasons.append(reason)
    return reasons


def notes(family: Family, config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp computes a little otherwise, or for long texts, and people should know; config: whole."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    lines = [line for line in (rope.note(family, config),) if line is not None]
    if family.window is None and type(window) is int and type(longest) is int and 0 < window < longest:
        lines.append(
            f"llama.cpp looks back all the way: beyond {window} tokens it computes something else than transformers"
        )
    return lines


def to_metadata(family: Family, config: Mapping[str, Any], pooling: str | None = None) -> dict[str, Entry]:
    """Keys of a file for a config without `obstacles`, those of rotary embeddings too, but for their tensors.

    config: whole. pooling: how an encoder's tokens become one vector, a key of `POOLINGS`; None where nothing says so.
    """
    at = family.architecture
    values: dict[str, tuple[str, Any]] = {}
    for key in family.keys:
        value = config.get(key.config) if key.optional else config[key.config]
        if value is not None:
            values[key.metadata] = key.kind, value
    values |= family.to_metadata(config)
    values["vocab_size"] = "u32", config["vocab_size"]
    written = rope.to_metadata(family, config)
    values |= written.keys
    entries: dict[str, Entry] = {f"{at}.{key}": Value(kind, value) for key, (kind, value) in values.items()}
    if family.window is not None:
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
        if sliding != _sliding(family.window, len(sliding)):
            entries[f"{at}.{_PATTERN}"] = Array.of("bool", sliding)
    if family.encoder:
        entries[f"{at}.attention.causal"] = Value("bool", False)
        if pooling is not None:
            entries[f"{at}.pooling_type"] = Value("u32", POOLINGS[pooling])
        entries[_KINDS_OF_TOKENS] = Value("u32", config["type_vocab_size"])
    entries |= _token_keys(config)
    entries |= {key: Value("string", value) for key, value in written.own.items()}
    entries[MODEL_TYPE] = Value("string", family.model_type)
    if isinstance(dtype := config.get("dtype"), str):
        entries[DTYPE] = Value("string", dtype)
    return entries


def to_config(
    family: Family,
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    floats: str,
    tensors: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """config.json of the model in a file.

    shapes   of its tensors, by the file's names
    floats   the type of the model's floats, as config.json calls it, where the file does not say it
    tensors  those that are numbers of the config (`rope.TENSORS`)

    Raises CheckpointError for keys that are missing, of another type, or make no sense.
    """
    at = f"{family.architecture}."
    config: dict[str, Any] = {
        "architectures": [family.classes[0]],
        "model_type": family.model_type,
        "dtype": metadata.text(DTYPE, floats),
        **family.settings,
    }
    for key in family.keys:
        if at + key.metadata in metadata:
            config[key.config] = _value(metadata, at + key.metadata, key.kind)
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{metadata.where}: tensor token_embd.weight is missing", "fetch the file again")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    if not family.encoder and "tie_word_embeddings" not in family.settings:
        config["tie_word_embeddings"] = "output.weight" not in shapes
    if family.encoder:
        config["type_vocab_size"] = metadata.integer(_KINDS_OF_TOKENS, shapes.get("token_types.weight", (2,))[0])
    keys = {key.removeprefix(at): entry.value for key, entry in metadata.items() if isinstance(entry, Value)}
    try:
        config |= family.to_config(keys, shapes)
        width = head_dim({**_sizes(family, metadata), **config}) if family.rope else 0
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{metadata.where}: {at}* lacks or contradicts {error}", "convert the model anew"
        ) from error
    if family.rope and not 0 < width <= _MOST_WIDTH:
        raise CheckpointError(f"{metadata.where}: heads of {width} columns", "convert the model anew")
    config |= rope.to_config(family, metadata, tensors, width)
    if family.window is not None:
        config["layer_types"] = _layer_types(family.window, metadata, at, int(config["num_hidden_layers"]))
    ids = _tokens(metadata, config["vocab_size"])
    return config | ({key: value for key, value in ids.items() if value is not None} if family.encoder else ids)


def pooling(metadata: Metadata, family: Family) -> str | None:
    """How a file says that an encoder's tokens become one vector; None where it does not, or in another way."""
    number = metadata.integer(f"{family.architecture}.pooling_type", -1)
    return next((name for name, known in POOLINGS.items() if known == number), None)


def _value(metadata: Metadata, key: str, kind: str) -> int | float | bool:
    """One value of a file as config.json has it. Raises CheckpointError for a size that no model has."""
    if kind == "bool":
        return metadata.flag(key)
    if kind == "f32":
        return decimal(metadata.number(key))
    size = metadata.integer(key)
    if not 0 <= size < _MOST:
        raise CheckpointError(f"{metadata.where}: {key} is {size}", "the file is damaged")
    return size


def _sizes(family: Family, metadata: Metadata) -> dict[str, int]:
    """Width and heads, under the names that nearly all families have for them."""
    at = family.architecture
    return {
        "hidden_size": metadata.integer(f"{at}.embedding_length"),
        "num_attention_heads": metadata.integer(f"{at}.attention.head_count"),
    }


def _layer_types(window: Window, metadata: Metadata, at: str, layers: int) -> list[str]:
    """What each layer is: as the file says it by layer or by a period, else as llama.cpp takes it for granted."""
    if layers > _MOST_LAYERS:  # a list of them is made here
        raise CheckpointError(f"{metadata.where}: {at}block_count is {layers}", "the file is damaged")
    if isinstance(metadata.get(at + _PATTERN), Array):
        sliding = [bool(one) for one in metadata.array(at + _PATTERN, "bool", "u32", "i32")][:layers]
    else:
        sliding = _sliding(Window(metadata.integer(at + _PATTERN, window.period)), layers)
    if metadata.integer(at + _WINDOW, 1) == 0:
        sliding = [False] * layers
    if len(sliding) != layers:
        raise CheckpointError(
            f"{metadata.where}: {at}{_PATTERN} has {len(sliding)} of {layers} layers", "convert it anew"
        )
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def _sliding(window: Window, layers: int) -> list[bool]:
    """Which layers look back a bounded number of tokens, where only a period is known."""
    return [window.period == 0 or i % window.period < window.period - 1 for i in range(layers)]


def _token_keys(config: Mapping[str, Any]) -> dict[str, Entry]:
    """Inverse of `_tokens`; what the tokenizer says of its own counts, where there is one."""
    ids = {f"tokenizer.ggml.{key}_token_id": config.get(name) for name, key in _TOKENS.items()}
    ends = config.get("eos_token_id")
    if isinstance(ends, list) and ends:
        ids |= {"tokenizer.ggml.eos_token_id": ends[0], "tokenizer.ggml.eot_token_id": ends[-1]}
    return {key: Value("u32", number) for key, number in ids.items() if type(number) is int and number >= 0}


def _tokens(metadata: Metadata, vocabulary: int) -> dict[str, Any]:
    """Ids of tokens that generation asks for: where a text begins, where it ends (or a turn of a chat), and padding."""
    ids: dict[str, Any] = dict.fromkeys(_TOKENS)
    for name, key in _TOKENS.items():
        number = metadata.integer(f"tokenizer.ggml.{key}_token_id", -1)
        if 0 <= number < vocabulary:
            ids[name] = number
    turn = metadata.integer("tokenizer.ggml.eot_token_id", -1)
    if 0 <= turn < vocabulary and ids["eos_token_id"] not in (None, turn):
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids
