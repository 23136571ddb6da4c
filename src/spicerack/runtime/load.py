"""`load`: a model folder, quantized or not, as the ordinary transformers model; packed weights stay packed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeGuard, TypeVar, overload

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spicerack.errors import CheckpointError, LoadError, UsageError, listed
from spicerack.kernels import kernel
from spicerack.kernels.kernel import Compute
from spicerack.models import census
from spicerack.models.architecture import Destination, destinations, is_stack
from spicerack.nn.cache_blocks import CacheScheme
from spicerack.nn.fused import fuse
from spicerack.runtime import hf
from spicerack.runtime.cache import use_quantized_cache
from spicerack.runtime.slots import Expert, experts_in_slots, fill, float_names, make_slot, make_stack_slot, read_floats
from spicerack.storage import format
from spicerack.storage.format import Format, StoredTensor
from spicerack.storage.reader import Checkpoint

_Module = TypeVar("_Module", bound=nn.Module)


@overload
def load(
    folder: str | Path,
    *,
    device: str | torch.device = ...,
    compute: Compute | None = ...,
    engine: str | None = ...,
    dtype: torch.dtype | None = ...,
    cache: int | None = ...,
    trust_remote_code: bool = ...,
) -> PreTrainedModel: ...
@overload
def load(
    folder: str | Path,
    *,
    into: _Module,
    device: str | torch.device = ...,
    compute: Compute | None = ...,
    engine: str | None = ...,
) -> _Module: ...
def load(
    folder: str | Path,
    *,
    into: nn.Module | None = None,
    device: str | torch.device = "cpu",
    compute: Compute | None = None,
    engine: str | None = None,
    dtype: torch.dtype | None = None,
    cache: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model in `folder` (or at a hub id), in eval mode on `device`.

    Quantized layers become `QLinear` and `QEmbedding`, whose weights stay packed in memory, a mixture's experts an
    `ExpertStack` of them; float folders load as they are. compute: "int8" rounds activations on the fly, in blocks of
    32, "float" does not; None is int8 on processors with vector instructions for it. engine: the instruction set that
    quantized layers and attention compute with, one of `spicerack kernels`' that this processor has; None is the
    fastest. dtype: of the float parameters; None keeps the stored one. cache: bits, 8 or 4, that keys and values of
    attention are kept in while generating; None keeps them as they are. into: your own module, for folders written by
    `spicerack.save`; it is changed in place and returned.

    Raises CheckpointError, LoadError (the tensors do not fit the model, named), UntrustedCodeError, for `cache`
    SchemeError (other widths) and UsageError (a model without such a cache), and UsageError for an `engine` that this
    processor has not, or that is named for another device.
    """
    kernel.check_engine(engine, device)  # before weights are read, as all that can be refused
    if cache is not None:
        CacheScheme(cache)
        if into is not None:
            raise UsageError("cache is for transformers models, and into is a module of your own", "leave one out")
    checkpoint = Checkpoint.open(folder)
    fmt = format.of_folder(checkpoint)
    plan = fmt.contents(checkpoint) if fmt is not None else {}
    if into is not None:
        return _into(into, checkpoint, fmt, plan, device, compute, engine)
    model, floats = _with_slots(checkpoint, fmt, plan, dtype, trust_remote_code=trust_remote_code)
    nn.Module.to(model, device)
    if fmt is not None:
        fill(model, checkpoint, fmt, floats, device, compute, engine)
        fuse(model, engine)
    if cache is not None:
        use_quantized_cache(model, cache)
    return model


def load_apart(checkpoint: Checkpoint) -> tuple[PreTrainedModel, dict[str, Expert]]:
    """A float model, mapped from its files, all experts of mixtures as an `ExpertStack` of linear layers; and for these
    layers, by path, what they are in the folder.

    Merged into one parameter, as transformers has them, experts would have to be copied. Raises as `load` does.
    """
    model, floats = _with_slots(checkpoint, None, {}, None, apart=True)
    found = experts_in_slots(model)
    fill(model, checkpoint, None, floats, "cpu")
    return model, found


def _with_slots(
    checkpoint: Checkpoint,
    fmt: Format | None,
    plan: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    *,
    apart: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model with slots for what `fill` will put there, and the float tensors that are for these.

    apart: slots for stacks of experts whether any of them is packed or not.
    """
    config = fmt.float_config(checkpoint.config) if fmt is not None else checkpoint.config
    if not config:
        raise CheckpointError(f"{checkpoint.folder} holds a plain module", "pass it: load(folder, into=module)")
    built, model_class = hf.config_and_class(config, checkpoint.folder, trust_remote_code=trust_remote_code)
    tensors = read_floats(checkpoint, float_names(checkpoint, fmt, plan))

    withheld: dict[str, torch.Tensor] = {}

    def prepare(model: PreTrainedModel) -> None:
        floats = _transposed(checkpoint, tensors) if apart else dict.fromkeys(tensors, False)
        for name in _make_slots(model, plan, floats, apart):
            withheld[name] = tensors.pop(name)

    model, unused = hf.build(
        model_class, built, tensors, checkpoint.folder, dtype=dtype, prepare=prepare if plan or apart else None
    )
    if unused:
        warnings.warn(
            f"{checkpoint.folder}: {model_class.__name__} has no use for {listed(unused, 3, 'tensors')}", stacklevel=2
        )
    return model, withheld


def _transposed(checkpoint: Checkpoint, floats: Iterable[str]) -> dict[str, bool]:
    """Float tensor -> whether it is stored [..., K, N]."""
    entries = census.take(checkpoint).entries
    return {name: entries[name].transposed for name in floats}


def _make_slots(
    model: PreTrainedModel, plan: Mapping[str, StoredTensor], floats: Mapping[str, bool], apart: bool
) -> list[str]:
    """Slots for the whole plan -> float tensors that are experts in a stack with packed ones, or in any if apart.

    floats: tensor -> whether it is stored [..., K, N].
    """
    sources: dict[str, StoredTensor | str] = {name: name for name in floats}
    sources |= {f"{p.module}.weight": p for p in plan.values()}
    sources |= {p.module: p for p in plan.values() if p.role == "experts"}  # named in either way
    places = destinations(model, sources)
    layers: dict[str, StoredTensor] = {}
    whole: dict[str, StoredTensor | str] = {}
    stacks: dict[str, list[tuple[str, Destination]]] = {}
    for name, planned in sources.items():
        place = places.get(name)
        if place is not None and place.stacked:
            stacks.setdefault(place.parameter, []).append((name, place))
        elif isinstance(planned, StoredTensor) and planned.role == "experts":
            if place is not None:
                whole[_parameter_of(planned, place, model)] = planned
        elif isinstance(planned, StoredTensor):
            layers[_parameter_of(planned, place, model)] = planned
        elif apart and place is not None and is_stack(model, place):
            whole[place.parameter] = planned
    _tie(model, layers, {places[name].parameter for name in floats if name in places})
    for parameter, planned in layers.items():
        make_slot(model, parameter.removesuffix(".weight"), planned)
    lost = {p.module: p for p in plan.values() if p.role == "experts" and p not in whole.values()}
    if lost:
        _parameter_of(lost[min(lost)], None, model)
    withheld = []
    for parameter, source in whole.items():
        transposed = source.transposed if isinstance(source, StoredTensor) else floats[source]
        parts = [[Expert(source, number)] for number in range(model.get_parameter(parameter).shape[0])]
        make_stack_slot(model, parameter, parts, transposed=transposed)
        withheld += [source] if isinstance(source, str) else []
    for parameter, some in stacks.items():
        if apart or any(isinstance(sources[name], StoredTensor) for name, _ in some):
            make_stack_slot(model, parameter, _by_expert(some, sources), transposed=False)
            withheld += [name for name, _ in some if name in floats]
    return withheld


def _parameter_of(planned: StoredTensor, place: Destination | None, model: nn.Module) -> str:
    if place is None:
        raise LoadError(
            f"{planned.module}: {type(model).__name__} has no use for it", "is config.json the model's own?"
        )
    if place.operations:
        raise LoadError(f"{planned.module}: transformers changes it by {', '.join(place.operations)}", "skip it")
    return place.parameter


def _tie(model: PreTrainedModel, layers: dict[str, StoredTensor], stored: set[str]) -> None:
    """Give the packed weight of a layer to those tied to it, unless the folder has weights of their own for them.

    transformers must not tie them: there is no parameter any more.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    groups: dict[str, list[str]] = {}
    for alias, source in ties.items():
        groups.setdefault(source, [source]).append(alias)
    for group in groups.values():
        packed = [name for name in group if name in layers]
        if packed:
            layers |= {name: layers[packed[0]] for name in group if name not in layers and name not in stored}
            for name in group:
                ties.pop(name, None)


def _by_expert(
    parts: Iterable[tuple[str, Destination]], sources: Mapping[str, StoredTensor | str]
) -> list[list[Expert]]:
    """[expert][part], from tensors named by the expert's number."""
    experts: dict[int, dict[int, Expert]] = {}
    for name, place in parts:
        experts.setdefault(place.expert, {})[place.part] = Expert(sources[name])
    return [[found[part] for part in sorted(found)] for _, found in sorted(experts.items())]


def _into(
    module: nn.Module,
    checkpoint: Checkpoint,
    fmt: Format | None,
    plan: Mapping[str, StoredTensor],
    device: str | torch.device,
    compute: Compute | None,
    engine: str | None,
) -> nn.Module:
    """Fill a module whose own names are the checkpoint's."""
    layers = {name: layer.weight for name, layer in module.named_modules(remove_duplicate=False) if _has_weight(layer)}
    by_weight = {id(layers[name]): planned for name, planned in plan.items() if name in layers}
    slots = {name: by_weight[id(weight)] for name, weight in layers.items() if id(weight) in by_weight}
    for name, planned in {**slots, **plan}.items():
        make_slot(module, name, planned)
    tensors = read_floats(checkpoint, float_names(checkpoint, fmt, plan))
    state = module.state_dict(keep_vars=True)
    shared = {id(state[name]) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if name not in tensors and id(tensor) not in shared]
    unexpected = [name for name in tensors if name not in state]
    for names, what in (
        (missing, "has no value in the folder"),
        (unexpected, "is in the folder and not in the module"),
    ):
        if names:
            raise LoadError(
                f"{checkpoint.folder}: {listed(names, 3, 'tensors')} {what}",
                "build the module as it was when it was saved",
            )
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise LoadError(f"{checkpoint.folder}: {error}", "build the module as it was when it was saved") from error
    module.to(device)
    if fmt is not None:
        fill(module, checkpoint, fmt, {}, device, compute, engine)
        fuse(module, engine)
    return module


def _has_weight(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    return isinstance(layer, (nn.Linear, nn.Embedding, Conv1D))
