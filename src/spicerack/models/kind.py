"""What a model is for: a decoder predicts tokens, an encoder embeds text; others are given something else than text.

Whatever is asked here is asked of config.json and of transformers' classes, before weights are read. What only a run
can tell (a class that wants pictures beside the text) is `inputs.check_text`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from spicerack.errors import UsageError

Kind = Literal["decoder", "encoder"]
MODULES = "modules.json"
"""sentence-transformers' list of what an encoder's folder computes, one step after the other."""
POOLING = "1_Pooling"
"""The folder of the step that makes one vector of a sentence, where `MODULES` says nothing else."""
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How names of transformers' classes that predict the next token end."""
_SENSES = {"image": "pictures", "video": "videos", "audio": "sound", "time": "series of numbers"}
"""What transformers calls a model's kinds of input -> what people call them."""
_WRITERS = {
    *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}  # fmt: skip
"""Families with a model that writes text, whatever else it reads."""
_REMEDY = "text is for language models and text encoders; quantize and load take this one all the same"
"""Of every model that is something else."""


def kind_of(config: Mapping[str, Any], folder: Path) -> Kind:
    """Whether a model folder holds a decoder (it predicts tokens) or an encoder (it embeds text).

    config: its config.json. sentence-transformers' files say that it is an encoder, even of a decoder's class; else the
    class decides. Raises UsageError, naming the folder, for what `obstacle` names.
    """
    if reason := obstacle(config):
        raise UsageError(f"{folder} {reason}", _REMEDY)
    return _kind(config, folder)


def _kind(config: Mapping[str, Any], folder: Path | None) -> Kind:
    """As `kind_of`, of a model that is one of both."""
    if folder is not None and ((folder / MODULES).is_file() or (folder / POOLING).is_dir()):
        return "encoder"
    return "decoder" if _class_name(config).endswith(_DECODERS) else "encoder"


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Why a model is neither a decoder nor an encoder of text, as what follows its name in a sentence; None if it is.

    config: its config.json. Encoder-decoders are both at once; `unreadable` names those that are given something else;
    and what compares pictures or sound with texts (CLIP) has two towers, of which text reaches one.
    """
    if config.get("is_encoder_decoder"):
        return "is an encoder-decoder model"
    if reason := unreadable(config):
        return reason
    model_class = _class(config)
    if model_class is None or _kind(config, None) == "decoder":
        return None
    towers = [key for key in ("vision_config", "audio_config") if key in config and "text_config" in config]
    if towers and config.get("model_type") not in _WRITERS:
        others = [_SENSES.get(sense, sense) for sense in senses(model_class) if sense != "text"]
        return f"is a {model_class.__name__}, which compares {' and '.join(others)} with text"
    return None


def unreadable(config: Mapping[str, Any]) -> str | None:
    """Why a model cannot be given text at all, as what follows its name in a sentence; None if it can, or is unknown.

    config: its config.json. transformers' class says what its first argument is, and what it makes of text.
    """
    model_class = _class(config)
    if model_class is None:
        return None
    name, given = model_class.__name__, model_class.main_input_name
    if given != "input_ids":
        others = [_SENSES.get(sense, sense) for sense in senses(model_class) if sense != "text"]
        return f"is a {name}, which reads {' and '.join(others) or given}, not text"
    if config.get("model_type") in modeling_auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES:
        return f"is a {name}, which makes sound of text"
    return None


def senses(model_class: type[PreTrainedModel]) -> tuple[str, ...]:
    """The kinds of input that a class takes, as transformers calls them: "text", "image" ..."""
    senses = model_class.input_modalities
    return (senses,) if isinstance(senses, str) else tuple(senses)


def _class_name(config: Mapping[str, Any]) -> str:
    """The first class that config.json declares; "" where it declares none."""
    declared = config.get("architectures")
    return str(declared[0]) if isinstance(declared, list) and declared else ""


def _class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """transformers' class for a config.json: the declared one, else the family's own without a head; None if it has
    none."""
    name, model_type = _class_name(config), config.get("model_type")
    if not name and isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        names: Any = modeling_auto.MODEL_MAPPING_NAMES.get(model_type, "")
        name = names if isinstance(names, str) else names[0]
    known = vars(transformers).get(name) or getattr(transformers, name, None) if name.isidentifier() else None
    return known if isinstance(known, type) and issubclass(known, PreTrainedModel) else None
