"""The exact opinion on what each tensor is: transformers' own model class, built without weights.

`census` goes by names; this asks the module that will read the tensor. The model is built on torch's meta device, so
that nothing is allocated, and from classes inside transformers only: code that came with a model is never run.

What is given up. transformers must know the family; where it does not, or a config makes its constructor fail, there is
no second opinion, and names decide alone. Importing transformers and building the model take time, which `inspect` does
without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from spicerack.models.config import nested
from spicerack.models.families import names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_UNSAFE_KEYS = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "_name_or_path")
"""Dropped from a stranger's config: they can name kernels and code on the hub, or change the layers' classes."""
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 100_000
"""Blocks, and experts in each, that a config may ask for: each takes time and memory to build, even without weights.

Experts are one tensor in most families, so that a great many are cheap (Doge has 16,384)."""
_COUNTS = re.compile(r"(num|n)_\w*(layer|expert|depth|block)\w*(?<!_size)|\w*(layers|depths?|blocks)")
"""Keys of config.json whose values are numbers of modules; `vocab_size_per_layer_input` and the like are sizes."""
_BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
"""What constructors in transformers raise where a config makes no sense to them; none of them is a fault of ours."""


def modules_of(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str] | None:
    """Checkpoint module name (no `.weight`) -> class of the module that reads it, for a folder with these tensors.

    config: its config.json, of a float model; tensors: names in its files.
    "Linear", "Embedding", "Conv1D", "LayerNorm" ... are exact classes: a subclass that computes something else has its
    own name (`Gemma3TextScaledWordEmbedding`). "experts" is a fused expert tensor or becomes part of one; "Linear via
    Chunk" is a tensor that transformers converts on loading, by more than renaming. A tied head that is absent from the
    folder is listed under its parameter's name. Tensors that the model has no use for are not listed.

    None if transformers does not know the architecture, or cannot build it: then names are all there is to go by.
    """
    model = on_meta(config)
    return None if model is None else classes_of(model, tensors)


def on_meta(config: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model that `config` names, on the meta device: shapes and classes, and no numbers.

    config: of a float model, from whoever. None if transformers does not know it or cannot build it, or if it asks for
    more modules than any model has.
    """
    try:
        return _build(config)
    except _BUILD_ERRORS:  # whatever else a stranger's config can make a constructor raise
        return None


def _build(config: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model, from classes of transformers only; None where it has none for it.

    The class is the first that the config declares, else the family's own without a head. Raises what constructors
    raise.
    """
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel
    from transformers.initialization import no_init_weights

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not _plausible(config):
        return None
    built = CONFIG_MAPPING[model_type].from_dict(harmless(config))
    declared = config.get("architectures")
    known = getattr(transformers, declared[0], None) if declared else MODEL_MAPPING[type(built)]
    if not isinstance(known, type) or not issubclass(known, PreTrainedModel):
        return None
    with torch.device("meta"), no_init_weights():
        return known(built)


def harmless(value: Any) -> Any:
    """`value`, as JSON holds it, without unsafe keys, and with the infinities that transformers writes as {"__float__":
    "Infinity"}; a copy, all the way down."""
    if isinstance(value, list):
        return [harmless(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: harmless(item) for key, item in value.items() if not any(unsafe in key for unsafe in _UNSAFE_KEYS)}


def _plausible(config: Mapping[str, Any]) -> bool:
    """Whether the model has a number of modules that can be built in a moment: numbers of layers and of experts, lists
    of such and nested configs too, are at most `_MOST_LAYERS` and `_MOST_EXPERTS`."""
    for part in nested(config):
        for key, value in part.items():
            most = _MOST_EXPERTS if "expert" in key else _MOST_LAYERS
            counts = value if isinstance(value, list) else [value]
            if _COUNTS.fullmatch(key) and any(isinstance(count, int) and count > most for count in counts):
                return False
    return True


@dataclass(frozen=True, slots=True)
class Destination:
    """The parameter of a model that a checkpoint's tensor becomes, or becomes a part of.

    parameter    its name in the model
    operations   what transformers does to it beyond renaming, as class names; empty if nothing
    part         which of the parts that are put together: 0 for gate, 1 for up ...
    stacked      one expert's matrix: the experts are stacked, and the parts of each concatenated by rows
    expert       its number, if stacked
    others       more parameters that the same tensor becomes parts of: of query, key and value in one, the last two
    """

    parameter: str
    operations: tuple[str, ...] = ()
    part: int = 0
    stacked: bool = False
    expert: int = 0
    others: tuple[str, ...] = ()


def destinations(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, Destination]:
    """Where each tensor of a checkpoint goes: tensor -> parameter, through transformers' own conversion mapping.

    model: on the meta device is enough. A tensor that the mapping would rename, but whose own name is a parameter's,
    keeps it. Those that lead nowhere are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    places: dict[str, Destination] = {}
    for tensor in tensors:
        target, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if target not in state and tensor in state:  # a file whose names are the model's own already
            target, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if target not in state:
            continue
        if pattern is None:
            places[tensor] = Destination(target)
            continue
        converter = by_pattern[pattern]
        operations = tuple(type(operation).__name__ for operation in converter.operations)
        # experts one by one become one tensor [experts, out, in], whose rows may be gate and up together; what is done
        # in any other way is not undone here, and its tensors stay as they are
        axes = [vars(operation).get("dim") for operation in converter.operations]
        stacked = (operations, axes) in ((("MergeModulelist",), [0]), (("MergeModulelist", "Concatenate"), [0, 1]))
        expert = re.search(r"\d+", tensor.rpartition("experts")[2]) if stacked else None
        part = converter.source_patterns.index(pattern)
        number = int(expert[0]) if expert else 0
        others = tuple(name for name in _others(target, converter.target_patterns) if name in state)
        places[tensor] = Destination(target, operations, part, stacked, number, others)
    return places


def _others(target: str, patterns: Sequence[str]) -> list[str]:
    """The other parameters that a conversion fills from one tensor, of which `target` was named by the first pattern.

    patterns: transformers' own, in which `\\1` stands for what was captured.
    """
    found = re.search(re.escape(patterns[0]).replace(r"\\1", "(.+?)"), target)
    if found is None:
        return []
    captured = found[1] if found.re.groups else ""
    return [target[: found.start()] + p.replace(r"\1", captured) + target[found.end() :] for p in patterns[1:]]


def is_stack(model: PreTrainedModel, place: Destination) -> bool:
    """Whether a tensor that goes to `place` unchanged is one of all experts, whose code takes one matrix at a time."""
    owner, _, parameter = place.parameter.rpartition(".")
    axes = model.get_parameter_or_buffer(place.parameter).ndim
    return axes == 3 and not place.operations and _class_of(model.get_submodule(owner), parameter, axes) == "experts"


def classes_of(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """The class of the module that reads each tensor, as `modules_of` has it, of a model on the meta device.

    Parameters that no tensor of the folder reaches, a tied head's say, are listed under their own names.
    """
    state = model.state_dict()
    modules = dict(model.named_modules())
    classes: dict[str, str] = {}
    reached: set[str] = set()
    for tensor, destination in destinations(model, tensors).items():
        reached.add(destination.parameter)
        owner, _, parameter = destination.parameter.rpartition(".")
        name = _class_of(modules[owner], parameter, state[destination.parameter].ndim)
        if destination.operations and not (name == "experts" and destination.stacked):
            name = f"{name} via {', '.join(destination.operations)}"
        classes[tensor.removesuffix(".weight")] = name
    for target in state.keys() - reached:  # tied, or missing and made anew by transformers
        owner, _, parameter = target.rpartition(".")
        if parameter == "weight":
            classes.setdefault(owner, _class_of(modules[owner], parameter, state[target].ndim))
    return classes


def _class_of(module: nn.Module, parameter: str, axes: int) -> str:
    """What the parameter of a module is called here: its class, with the parameter's name where it is not `weight`."""
    name = type(module).__name__
    if "Expert" in name and axes > 1 and not parameter.endswith("bias"):
        # decorated by transformers, there is an eager loop that takes one expert's matrix at a time
        one_by_one = "is_transposed" in vars(module) or name in names.EXPERTS_ONE_BY_ONE
        return "experts" if one_by_one else name
    if name in names.PLAIN_LINEAR:
        return "Linear"
    return name if parameter == "weight" else f"{name}.{parameter}"
