"""The exact opinion on what each tensor is: transformers' own model class, built without weights.

`census` goes by names; this asks the module that will read the tensor. The model is built on torch's meta device, so
that nothing is allocated, and from classes inside transformers only: code that came with a model is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from spicerack.checkpoint.reader import Checkpoint
from spicerack.models import names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_UNSAFE_KEYS = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "_name_or_path")
"""Dropped from a stranger's config: they can name kernels and code on the hub, or change the layers' classes."""
_MOST_LAYERS = 10_000
_BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


def modules_of(config: Mapping[str, Any], folder: Path) -> dict[str, str] | None:
    """Checkpoint module name (no `.weight`) -> class of the module that reads it, for the model folder `folder`.

    "Linear", "Embedding", "Conv1D", "LayerNorm" ... are exact classes: a subclass that computes something else has its
    own name (`Gemma3TextScaledWordEmbedding`). "experts" is a fused expert tensor or becomes part of one; "Linear via
    Chunk" is a tensor that transformers converts on loading, by more than renaming. A tied head that is absent from the
    folder is listed under its parameter's name. Tensors that the model has no use for are not listed.

    None if transformers does not know the architecture, or cannot build it: then names are all there is to go by.
    """
    try:
        model = _build(config)
    except _BUILD_ERRORS:  # whatever else a stranger's config can make a constructor raise
        return None
    if model is None:
        return None
    return _by_checkpoint_name(model, Checkpoint.open(folder).tensors)


def _build(config: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model that `config` names, on the meta device."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel
    from transformers.initialization import no_init_weights

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not _plausible(config):
        return None
    built = CONFIG_MAPPING[model_type].from_dict(_harmless(config))
    declared = config.get("architectures")
    known = getattr(transformers, declared[0], None) if declared else MODEL_MAPPING[type(built)]
    if not isinstance(known, type) or not issubclass(known, PreTrainedModel):
        return None
    with torch.device("meta"), no_init_weights():
        return known(built)


def _harmless(value: Any) -> Any:
    """`value` without unsafe keys, and with the infinities that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _harmless(item) for key, item in value.items() if not any(unsafe in key for unsafe in _UNSAFE_KEYS)}


def _plausible(config: Mapping[str, Any]) -> bool:
    """Whether the model has a number of modules that can be built in a moment."""
    counts = (value for key, value in config.items() if "layer" in key or "expert" in key or "depth" in key)
    return all(not isinstance(count, int) or count <= _MOST_LAYERS for count in counts) and all(
        _plausible(value) for value in config.values() if isinstance(value, dict)
    )


def _by_checkpoint_name(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Follow every tensor through transformers' renaming to its module."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    operations = {pattern: converter.operations for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    reached: set[str] = set()
    for tensor in tensors:
        target, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if target not in state and tensor in state:
            target, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if target not in state:
            continue
        reached.add(target)
        owner, _, parameter = target.rpartition(".")
        kind = _kind(modules[owner], parameter, state[target].ndim)
        if pattern is not None and kind != "experts":
            kind = f"{kind} via {', '.join(type(operation).__name__ for operation in operations[pattern])}"
        found[tensor.removesuffix(".weight")] = kind
    for target in state.keys() - reached:  # tied, or missing and made anew by transformers
        owner, _, parameter = target.rpartition(".")
        if parameter == "weight":
            found.setdefault(owner, _kind(modules[owner], parameter, state[target].ndim))
    return found


def _kind(module: nn.Module, parameter: str, axes: int) -> str:
    name = type(module).__name__
    if "Expert" in name and axes > 1 and not parameter.endswith("bias"):
        return "experts"
    if name in names.PLAIN_LINEAR:
        return "Linear"
    return name if parameter == "weight" else f"{name}.{parameter}"
