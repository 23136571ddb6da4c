"""A copy of a module with other layers in some places; everything else as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.nn import kinds
from spicerack.nn.fused import fuse
from spicerack.nn.kinds import LayerKind
from spicerack.nn.weight import PackedWeight
from spicerack.runtime.hf import tell_transformers


def with_packed(
    model: nn.Module,
    packed: Mapping[str, PackedWeight],
    kind_of: Callable[[nn.Module], LayerKind],
    leaving: Iterable[torch.Tensor],
    copied: Callable[[nn.Module, dict[int, Any]], nn.Module] = copy.deepcopy,
) -> nn.Module:
    """A copy of `model` with packed layers in its places, which are one where layers are one.

    packed   path of a layer -> the weight that takes its place; a model that is such a layer itself is at ""
    kind_of  such a layer -> its kind
    leaving  tensors of the model that leave it with those layers: they are not copied, so are never there twice
    copied   makes the copy, as `copy.deepcopy` does, with a memo of what is shared
    """
    small = _copy(model, {id(tensor): tensor for tensor in leaving}, copied)
    places = {name: small.get_submodule(name) for name in packed}
    new: dict[int, nn.Module] = {}
    for name, layer in places.items():
        if id(layer) not in new:
            kind = kind_of(layer)
            new[id(layer)] = as_before(kind.pack(packed[name], kind.options(layer), kinds.bias_of(layer)), layer)
        if not name:
            return new[id(layer)]
        small.set_submodule(name, new[id(layer)])
    fuse(small)
    for part in small.modules():
        if isinstance(part, PreTrainedModel):
            tell_transformers(part)
    return small


class _WithoutHistory(TorchFunctionMode):
    """Within this, copies of tensors that were computed are of their numbers alone.

    torch refuses to copy a tensor with a history, which a module holds that keeps its last output or loss, say.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch calls it, in place of any function of tensors."""
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copy(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[nn.Module, dict[int, Any]], nn.Module]
) -> nn.Module:
    """A copy of `model`, by `copied`; what is in `memo` is shared with it.

    Raises UsageError that names the attribute that cannot be copied: a generator, a lock, an open file.
    """
    try:
        with _WithoutHistory():
            return copied(model, dict(memo))
    except (TypeError, RuntimeError) as error:
        for path, part in model.named_modules():
            for key, value in vars(part).items():
                if key in ("_parameters", "_buffers", "_modules"):
                    continue
                try:
                    copy.deepcopy(value, {**memo, id(model): model})
                except (TypeError, RuntimeError):
                    name = f"{path}.{key}" if path else key
                    raise UsageError(
                        f"{name} of {type(part).__name__} is a {type(value).__name__}, which cannot be copied: {error}",
                        "remove it, quantize, and put it back",
                    ) from error
        raise


def as_before(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new`, changed in place to have the mode and the hooks of `old`, whose place it takes."""
    for key, value in vars(old).items():
        if key.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):
            vars(new)[key] = value
    return new.train(old.training)
