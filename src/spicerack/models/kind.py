"""What a model is for: a decoder predicts tokens, an encoder embeds text; and how many positions it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from spicerack.errors import UsageError

Kind = Literal["decoder", "encoder"]
MODULES = "modules.json"
"""sentence-transformers' list of what an encoder's folder computes, one step after the other."""
POOLING = "1_Pooling"
"""The folder of the step that makes one vector of a sentence, where `MODULES` says nothing else."""
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How names of transformers' classes that predict the next token end."""


def kind_of(config: Mapping[str, Any], folder: Path) -> Kind:
    """Whether a model folder holds a decoder (it predicts tokens) or an encoder (it embeds text).

    config: its config.json. sentence-transformers' files say that it is an encoder, even of a decoder's class; else the
    class decides. Raises UsageError for models that are both.
    """
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{folder} is an encoder-decoder model", "only decoders and encoders can be compared so far")
    if (folder / MODULES).is_file() or (folder / POOLING).is_dir():
        return "encoder"
    declared = config.get("architectures")
    name = str(declared[0]) if isinstance(declared, list) and declared else ""
    return "decoder" if name.endswith(_DECODERS) else "encoder"


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, which is the longest text it can read; None if it has no limit of its own.

    State spaces and ALiBi have none. config: transformers' object; of a model of text and images, the text's counts.
    """
    # getattr, not vars: GPT-2's config and others answer by this name what they store under one of their own
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
