"""The exact opinion on what each tensor is: transformers' own model class, built without weights.

`census` goes by names; this asks the module that will read the tensor. The model is built on torch's meta device, so
that nothing is allocated, and from classes inside transformers only: code that came with a model is never run.

What is given up. transformers must know the family; where it does not, or a config makes its constructor fail, there is
no second opinion, and names decide alone. Importing transformers and building the model take time, which `inspect` does
without.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from spicerack.models.families import names
from spicerack.storage.format import Contents, Host, Layout

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_UNSAFE_KEYS = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "_name_or_path")
"""Dropped from a stranger's config: they can name kernels and code on the hub, or change the layers' classes."""
_LAYER_COUNTS = re.compile(r"(?!.*per_layer)(num_|n_)?(\w+_)?(layers?|blocks)|depths?")
"""Keys of configs that count blocks: `num_hidden_layers`, `n_layer`, `encoder_layers`, `depths` ... All of a key must
match: `vocab_size_per_layer_input` is a size, and `num_experts` of a table of experts no number of modules."""
_MOST_LAYERS = 10_000
"""Blocks that a config may ask for: more than any model has."""
_MOST_TENSORS = 300_000
"""Calls of torch for which a model may ask while it is built, where every parameter is at least one. Mixtures of a
trillion parameters whose experts are modules of their own make 210,000; as many take some seconds and a gigabyte."""
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
        return _build(json.dumps(config, sort_keys=True))
    except _BUILD_ERRORS:  # whatever else a stranger's config can make a constructor raise
        return None


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Why transformers makes no model of `config` although it knows its class; None if it does, or does not.

    config: of a float model, from whoever. What is missing on this machine, a library say, is no reason: another may
    have it.
    """
    try:
        _build(json.dumps(config, sort_keys=True))
    except (ImportError, OSError):
        return None
    except RuntimeError as error:  # of a model that is given up for its size, or that the meta device does not make
        return f"{type(error).__name__}: {error}" if "negative dimension" in str(error) else None
    except _BUILD_ERRORS as error:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


def stranger(model_class: type[PreTrainedModel], built: PreTrainedConfig) -> str | None:
    """Why a class does not take a config: that is another family's, by its `model_type`. None if it takes it.

    transformers goes by `model_type` and we by `architectures`: where the two disagree, one of us reads another model.
    Some families have no classes of their own: transformers' tables of classes say whose they use.
    """
    from transformers.models.auto import modeling_auto

    takes, name = model_class.config_class, model_class.__name__
    if takes is None or isinstance(built, takes):
        return None
    tables = (table for key, table in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES"))
    classes = (table.get(built.model_type, ()) for table in tables)
    if any(name == entry if isinstance(entry, str) else name in entry for entry in classes):
        return None
    return f"its model_type {built.model_type!r} is not that of {name}, which is {takes.model_type!r}"


@functools.lru_cache(maxsize=1)  # several ask for the same model, one after the other, and none of them changes it
def _build(text: str) -> PreTrainedModel | None:
    """The model, from classes of transformers only; None where it has none for it.

    text: its config, as JSON. The class is the first that the config declares, else the family's own without a head.
    Raises what constructors raise.
    """
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel
    from transformers.initialization import no_init_weights

    config = json.loads(text)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not _plausible(config):
        return None
    built = CONFIG_MAPPING[model_type].from_dict(harmless(config))
    declared = config.get("architectures")
    known = getattr(transformers, declared[0], None) if declared else MODEL_MAPPING[type(built)]
    if not isinstance(known, type) or not issubclass(known, PreTrainedModel):
        return None
    if (reason := stranger(known, built)) is not None:
        raise ValueError(reason)
    with torch.device("meta"), no_init_weights(), _bounded():
        return known(built)


def _bounded() -> AbstractContextManager[Any]:
    """Within it torch is called `_MOST_TENSORS` times at most, and then raises RuntimeError: a config that asks for
    millions of modules is given up, whatever it calls them."""
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            if self.calls > _MOST_TENSORS:
                raise RuntimeError(f"more than {_MOST_TENSORS:,} tensors")
            return func(*args, **(kwargs or {}))

    return Bounded()


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
    """Whether the model has a number of blocks that can be built in a moment, by every key that counts some, in nested
    configs too."""
    counts = (value for key, value in config.items() if _LAYER_COUNTS.fullmatch(key))
    numbers = (number for count in counts for number in (count if isinstance(count, list) else [count]))
    return all(not isinstance(number, int) or number <= _MOST_LAYERS for number in numbers) and all(
        _plausible(value) for value in config.values() if isinstance(value, dict)
    )


def transposed_stacks(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, bool]:
    """Checkpoint module -> whether its tensor of all experts is stored [experts, in, out], as the module says that
    reads it; only of modules that say so, and of none where transformers does not know the architecture."""
    model = on_meta(config)
    if model is None:
        return {}
    told = {}
    for tensor, place in destinations(model, tensors).items():
        own = vars(model.get_submodule(place.parameter.rpartition(".")[0]))
        if "is_transposed" in own and is_stack(model, place):
            told[tensor.removesuffix(".weight")] = bool(own["is_transposed"])
    return told


def host_of(config: Mapping[str, Any], tensors: Layout, contents: Contents, linears: Sequence[str]) -> Host:
    """The model that is quantized, as transformers would build it, and where in it the packed weights go.

    config: of the float model. tensors: what its folder holds. contents: what is quantized of it. linears: modules of
    the checkpoint that are linear layers and stay float.
    """
    model = on_meta(config)
    if model is None:
        return Host(linears, tensors)
    paths = {}
    for tensor, place in destinations(model, tensors).items():
        owner, _, parameter = place.parameter.rpartition(".")
        module = tensor.removesuffix(".weight")
        if module in contents and parameter == "weight" and not place.operations:
            paths[module] = owner
    return Host(linears, tensors, model, paths)


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


def cuts(model: PreTrainedModel | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Tensors that transformers cuts into equal rows while loading, and nothing else -> the parameters made of them.

    Each of these could be a tensor of its own under its name: nomic-bert's, GTE's and Jina's queries, keys and values.
    model: None where transformers knows none. shapes: of a checkpoint's tensors. Names that transformers would change
    again are left alone: nobody would find them.
    """
    if model is None:
        return {}
    state = model.state_dict()
    wholes: dict[str, tuple[str, ...]] = {}
    for name, place in destinations(model, shapes).items():
        names, shape = (place.parameter, *place.others), shapes[name]
        if place.operations != ("Chunk",) or len(names) < 2 or not shape or shape[0] % len(names):
            continue
        rows = (shape[0] // len(names), *shape[1:])
        fits = all(own not in shapes and tuple(state[own].shape) == rows for own in names)
        kept = destinations(model, names)
        if fits and all(kept.get(own) == Destination(own) for own in names):
            wholes[name] = names
    return wholes


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
    for target in state:  # those that are tied, or missing and made anew by transformers; in the model's order
        owner, _, parameter = target.rpartition(".")
        if target not in reached and parameter == "weight":
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
    if name in names.SCALED_EMBEDDING:
        return "Embedding"
    return name if parameter == "weight" else f"{name}.{parameter}"
