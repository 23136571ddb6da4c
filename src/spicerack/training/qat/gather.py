"""Models that train in several processes, for `freeze`: out of their wrapper, and together again if they are sharded.

FSDP2 (`fully_shard`) leaves each process a piece of every parameter. What is copied here is gathered one parameter at a
time, so that no process ever holds the float weights of all layers. All processes must call these functions together.

It also makes each module one of a class of its own, hangs hooks on it and keeps its state in attributes. A copy must
have none of that, and torch has no way to take it off: so copies are made attribute by attribute, of the class that was
there before, and what torch.distributed put there is told by its names and by where its hooks were defined.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _WrappedHook
from torch.nn.parallel import DistributedDataParallel

from spicerack.errors import UsageError

T = TypeVar("T", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel, or the model itself. Raises UsageError for FSDP's first version."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise UsageError(
            "FullyShardedDataParallel makes one flat parameter of many", "shard with torch.distributed.fsdp.fully_shard"
        )
    return model


def resharded(model: nn.Module) -> bool:
    """Whether `model` is sharded by FSDP2; then each parameter is a piece now, also those kept whole since a forward.

    Raises UsageError if something else shards it.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.reshard()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not parts:
            raise UsageError(
                f"{name} is sharded over processes, and not by fully_shard",
                "gather the state dict, and load it into a prepared model",
            )
    return bool(parts)


def whole(layer: T) -> T:
    """A layer like this one, with its parameters gathered, on their device. All processes must call this together."""
    new: Any = _new(layer)
    vars(new).update(vars(layer))
    parameters = layer._parameters.items()
    new._parameters = {
        name: None if p is None else nn.Parameter(_gathered(p), p.requires_grad) for name, p in parameters
    }
    gathered: T = new
    return gathered


def copied(model: nn.Module, known: Mapping[int, Any]) -> nn.Module:
    """A deep copy of a sharded `model`, in one piece on the CPU, without what torch.distributed put into it.

    known: id of an object -> what takes its place in the copy, as in `copy.deepcopy`: pieces of large weights, say,
    that will leave the copy anyway and are not gathered for it. Buffers are copied as this process has them.
    """
    memo = dict(known)
    for parameter in model.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(_gathered(parameter).to("cpu", copy=True), parameter.requires_grad)
    parts = list(model.modules())
    memo |= {id(part): _new(part) for part in parts}
    for part in parts:
        vars(memo[id(part)]).update(copy.deepcopy(_without_hooks(part), memo))
    small: nn.Module = memo[id(model)]
    for part in small.modules():
        part._buffers = {name: None if b is None else b.cpu() for name, b in part._buffers.items()}
    return small


@torch.no_grad()
def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter of which each process has a piece."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _new(part: nn.Module) -> nn.Module:
    """An empty module of the class that `part` had before fully_shard; its constructor does not run."""
    cls = next(cls for cls in type(part).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, FSDPModule))
    return cls.__new__(cls)


def _without_hooks(part: nn.Module) -> dict[str, Any]:
    """The attributes of `part`, without the hooks and the state of torch.distributed."""
    kept: dict[str, Any] = {}
    for key, value in vars(part).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            kept[key] = type(value)((n, hook) for n, hook in value.items() if not _is_distributed(hook))
        elif not key.startswith(("__composable_api_state_key", "_is_fsdp", "_fsdp")):
            kept[key] = value
    return kept


def _is_distributed(hook: Any) -> bool:
    """Whether torch.distributed registered the hook, for a model that is sharded."""
    function = hook.hook if isinstance(hook, _WrappedHook) else hook
    return str(function.__module__).startswith("torch.distributed.")
