"""What config.json says of a model, as far as all families say it: no torch, no transformers.

Families call the same thing by many names, and models nest: one for text inside one for text and images. What is asked
here is asked of all names, and the text model's word counts first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
"""What families call the number of blocks; the other names below are of the same kind."""
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
"""Channels between blocks."""
INNER = ("intermediate_size", "ffn_dim", "d_ff", "n_inner")
"""Channels inside a block's MLP."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Experts of a mixture, in each block that has one."""
VOCABULARY = ("vocab_size", "n_vocab", "padded_vocab_size", "text_vocab_size")
"""Entries of the vocabulary, with what fills it up."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Where a model of several kinds of input keeps the config of its language model."""
_MAX_DEPTH = 6
"""How deep models nest, at most: a stranger's file could nest for ever."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What config.json says of the (text) model; None where it does not.

    model_type   the family's name in transformers
    classes      of the model, as declared
    dtype        float type that the weights are stored in
    layers       blocks
    hidden       channels between them
    heads        of attention, those of queries
    experts      of each mixture
    vocabulary   tokens, with what fills the table up
    """

    model_type: str
    classes: tuple[str, ...]
    dtype: str | None
    layers: int | None
    hidden: int | None
    heads: int | None
    experts: int | None
    vocabulary: int | None


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The facts of config.json, those of a nested text model first. What is of the wrong type counts as not said."""
    text: dict[str, Any] = next((config[key] for key in _TEXT_MODELS if isinstance(config.get(key), dict)), {})
    merged = {**config, **text}
    classes = config.get("architectures")
    dtype = merged.get("dtype") or merged.get("torch_dtype")
    return Architecture(
        model_type=str(config.get("model_type", "unknown")),
        classes=tuple(map(str, classes)) if isinstance(classes, list) else (),
        dtype=dtype if isinstance(dtype, str) else None,
        layers=_first(merged, *LAYERS),
        hidden=_first(merged, *HIDDEN),
        heads=_first(merged, *_HEADS),
        experts=_first(merged, *EXPERTS),
        vocabulary=_first(merged, "vocab_size", "n_vocab"),
    )


_TWINS = frozenset({"llama", "bitnet"})
"""Families whose models become each other's (`train --twin`): more norms, and the same sizes."""
_COMPARED = {"layers": "blocks", "hidden": "hidden states", "vocabulary": "a vocabulary", "experts": "experts"}
"""Numbers of an architecture by which models are told apart, and what people call them."""


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why the second model cannot be what the first one was made from, by their float config.json: what follows the
    first one's name in a sentence ("has 2 blocks, and {other} 4"); None if nothing says so. What one of them does not
    say counts as the same.
    """
    a, b = architecture(one), architecture(other)
    if a.model_type != b.model_type and {a.model_type, b.model_type} != _TWINS:
        return f"is a {a.model_type}, and {{other}} a {b.model_type}"
    numbers_a, numbers_b = asdict(a), asdict(b)
    for name, word in _COMPARED.items():
        x, y = numbers_a[name], numbers_b[name]
        if x is not None and y is not None and x != y:
            counted = f"{word} of {{}}" if name in ("hidden", "vocabulary") else f"{{}} {word}"
            return f"has {counted.format(x)}, and {{other}} {y}"
    return None


def nested(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The config itself, and all objects inside it, to a depth of six: a text model's, a vision model's ...

    depth: of this one; callers leave it at 0.
    """
    yield config
    if depth < _MAX_DEPTH:
        for value in config.values():
            if isinstance(value, dict):
                yield from nested(value, depth + 1)


def sizes(configs: Iterable[Mapping[str, Any]], *keys: str) -> frozenset[int]:
    """All whole numbers above 0 that stand under one of the names `keys` in one of the configs.

    `true` is no number here, as it is for Python.
    """
    return frozenset(c[key] for c in configs for key in keys if type(c.get(key)) is int and c[key] > 0)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    """The whole number under the first of these names that has one; `true` is none. None where no name has one."""
    return next((config[key] for key in keys if type(config.get(key)) is int), None)
