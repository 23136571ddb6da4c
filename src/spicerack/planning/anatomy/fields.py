"""config.json asked for the sizes of a model: what is missing, or no number, is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.errors import CheckpointError

_TEXT = ("text_config", "llm_config", "language_config")
"""Where a model of several kinds of input keeps the config of its language model."""


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: nested, or the config itself."""
    return next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), config)


MOST_LAYERS = 4096
"""Of a model: a config.json that asks for more is somebody's joke, or worse."""


class Fields:
    """config.json of one model, asked for what is needed; what is missing is named."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config, self._family = config, family

    def size(self, *names: str, default: int | None = None, most: int = 1 << 32) -> int:
        """The whole number from 1 to `most` under the first of these names that is there.

        Raises CheckpointError for none, unless there is a default, and for anything else.
        """
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(
                    f"config.json: {name} is {value!r}, not a number from 1 to {most:,}",
                    "is it the model's own config.json?",
                )
            return value
        if default is None:
            raise CheckpointError(
                f"config.json of the family {self._family} has no {' or '.join(names)}",
                "what its layers are and keep cannot be told without; is it the model's own config.json?",
            )
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """Whether it says so; `default` where it says nothing."""
        value = self._config.get(name)
        return default if value is None else bool(value)

    def get(self, name: str) -> Any:
        """Whatever is there; None for nothing."""
        return self._config.get(name)

    @property
    def hidden(self) -> int:
        """Channels between blocks; of stages that get wider as they get fewer tokens, those of the first."""
        stages = self.get("hidden_sizes")
        if isinstance(stages, list) and stages:
            return Fields({"hidden_sizes": stages[0]}, self._family).size("hidden_sizes")
        staged = ("embed_dim",) if isinstance(self.get("depths"), list) else ()
        return self.size(*staged, "hidden_size", "d_model", "n_embd", "dim")

    @property
    def layers(self) -> int:
        """Blocks."""
        return self.size("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", most=MOST_LAYERS)

    def marks(self, name: str) -> list[Any]:
        """The list of words or numbers, one for each layer, that is there; empty where there is none.

        Raises CheckpointError for anything else, and for more than a model has layers.
        """
        value = self._config.get(name) or []
        value = list(value) if isinstance(value, str) else value
        sound = isinstance(value, list) and all(type(mark) in (str, int) for mark in value)
        if not sound or len(value) > MOST_LAYERS:
            raise CheckpointError(
                f"config.json: {name} is no list with a word or number for each layer",
                "is it the model's own config.json?",
            )
        return value

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.size("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Of keys and values."""
        return self.size("num_key_value_heads", "num_kv_heads", default=self.heads)

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.size("head_dim", default=self.hidden // self.heads)

    @property
    def inner(self) -> int:
        """Channels inside a block's MLP."""
        return self.size("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "decoder_ffn_dim")

    @property
    def vocabulary(self) -> int:
        """Rows of the table."""
        return self.size("vocab_size")
