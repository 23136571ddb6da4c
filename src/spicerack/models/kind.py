"""What a model is for: a decoder predicts tokens, an encoder embeds text; and how many positions it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from spicerack.errors import UsageError

Kind = Literal["decoder", "encoder"]
MODULES = "modules.json"
POOLING = "1_Pooling"
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def kind_of(config: dict[str, Any], folder: Path) -> Kind:
    """Whether a model folder holds a decoder (it predicts tokens) or an encoder (it embeds text). Raises UsageError."""
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{folder} is an encoder-decoder model", "only decoders and encoders can be compared so far")
    if (folder / MODULES).is_file() or (folder / POOLING).is_dir():
        return "encoder"
    declared = config.get("architectures")
    name = str(declared[0]) if isinstance(declared, list) and declared else ""
    return "decoder" if name.endswith(_DECODERS) else "encoder"


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None if it has no limit of its own (state spaces, ALiBi)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
