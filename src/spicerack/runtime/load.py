"""`load`: a model folder, quantized or not, as the ordinary transformers model; packed weights stay packed.

How a folder is opened:

    Folder.open       config.json and headers: which tensors are packed, in which format, and the float model's config
    hf.build          transformers makes the model on the meta device: every name, and no memory
      make_slots      it asks its quantizer to prepare the model, and that is us: slots take the place of packed layers
      ...             it fills in what is float, mapped from the files, and renames, ties, casts and initializes as ever
    Ahead             in a thread beside it, packed tensors are read and laid out for the kernels that run them
    fill              slots become packed layers of these
    fuse              attention goes native, and an encoder of the usual parts becomes one call as a whole

So names, ties and types are transformers' business, and nothing of it is replaced or patched: whatever family it knows
is loaded, and is the class that its own users expect. Memory is that of the packed model and one batch of tensors.

What is given up. transformers' renaming of tensors is followed, its other conversions are not: a packed tensor that
they would change is refused, but for experts, which stay apart in an `ExpertStack` instead of being merged. Packing is
a pass over each weight on the CPU, wherever the model will run, and is done again at each load, because no folder
depends on a processor. Floats that are neither cast nor moved stay mapped: the files must not change while the model
lives. A model is loaded whole, onto one device.

With `into` there is no such seam: the names in the module are those in the folder, slots are made in it as it stands,
and its own `load_state_dict` fills in the floats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.arguments import checked
from spicerack.errors import CheckpointError, LoadError, UsageError, listed
from spicerack.kernels import kernel
from spicerack.kernels.kernel import Compute
from spicerack.machine import devices
from spicerack.models import census
from spicerack.nn import kinds
from spicerack.nn.cache_segments import CacheScheme
from spicerack.nn.fused import fuse
from spicerack.runtime import hf
from spicerack.runtime.ahead import Ahead, Way
from spicerack.runtime.cache import use_quantized_cache
from spicerack.runtime.folder import Folder
from spicerack.runtime.places import make_slots
from spicerack.runtime.slots import Expert, experts_in_slots, fill, make_slot
from spicerack.storage.reader import Checkpoint

_Module = TypeVar("_Module", bound=nn.Module)
_OTHER_MODULE = "build the module as it was when it was saved"


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
@checked
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
    `ExpertStack` of them; float folders load as they are.

    folder   a path, or a hub id
    into     your own module, for folders written by `spicerack.save`; it is changed in place and returned, in its mode
    device   where the model goes, which decides the kernels
    compute  "int8" rounds activations on the fly, in spans of 32, "float" does not; None is int8 on processors with
             vector instructions for it
    engine   the instruction set that quantized layers and attention compute with, one of `spicerack kernels`' that this
             processor has; None is the fastest
    dtype    of the float parameters; None keeps the stored one
    cache    bits, 8 or 4, that keys and values of attention are kept in while generating; None keeps them as they are
    trust_remote_code  run Python code that came with the model, where transformers does not know its architecture

    Raises CheckpointError, LoadError (the tensors do not fit the model, named), UntrustedCodeError, for `cache`
    SchemeError (other widths) and UsageError (a model without such a cache), and UsageError for a device that torch
    cannot compute on, and an `engine` that this processor has not, or that is named for another device.
    """
    kernel.check_engine(engine, device)  # before weights are read, as all that can be refused
    devices.find(device, torch.float32)
    if cache is not None:
        CacheScheme(cache)
        if into is not None:
            raise UsageError("cache is for transformers models, and into is a module of your own", "leave one out")
    opened, way = Folder.open(folder), Way(device, compute, engine)
    with Ahead(opened, way) as ahead:
        if into is not None:
            return _into(into, opened, way, ahead)
        model, expert_floats = _with_slots(opened, dtype, trust_remote_code=trust_remote_code)
        nn.Module.to(model, device)  # floats only: what is packed is packed where it will run
        if opened.format is not None:
            fill(model, opened, expert_floats, way, ahead.result())
            fuse(model, engine)
    if cache is not None:
        use_quantized_cache(model, cache)
    return model


def load_apart(checkpoint: Checkpoint) -> tuple[PreTrainedModel, dict[str, Expert]]:
    """A float model on the CPU, mapped from its files, with the experts of mixtures as stacks of linear layers; and for
    each of those layers, by path, what it is in the folder.

    Merged into one parameter, as transformers has them, experts would have to be copied. Raises as `load` does.
    """
    folder = Folder(checkpoint.held(), None, {})
    model, expert_floats = _with_slots(folder, None, apart=True)
    experts = experts_in_slots(model)
    fill(model, folder, expert_floats, Way("cpu"))
    return model, experts


def _with_slots(
    folder: Folder, dtype: torch.dtype | None, *, apart: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model with slots for what `fill` will put there, its floats in place; and the float tensors for these slots.

    apart: slots for stacks of experts whether any of them is packed or not.
    """
    where = folder.checkpoint.folder
    if not folder.config:
        raise CheckpointError(f"{where} holds a plain module", "pass it: load(folder, into=module)")
    config, model_class = hf.config_and_class(folder.config, where, trust_remote_code=trust_remote_code)
    tensors = folder.floats()
    withheld: dict[str, torch.Tensor] = {}

    def prepare(model: PreTrainedModel) -> None:
        transposed = _transposed(folder.checkpoint, tensors) if apart else dict.fromkeys(tensors, False)
        for name in make_slots(model, folder.contents, transposed, apart=apart):
            withheld[name] = tensors.pop(name)

    model, unused = hf.build(
        model_class, config, tensors, where, dtype=dtype, prepare=prepare if folder.contents or apart else None
    )
    if unused:
        warnings.warn(f"{where}: {model_class.__name__} has no use for {listed(unused, 3, 'tensors')}", stacklevel=4)
    return model, withheld


def _transposed(checkpoint: Checkpoint, floats: Iterable[str]) -> dict[str, bool]:
    """Float tensor -> whether it is stored [..., K, N]."""
    entries = census.take(checkpoint).entries
    return {name: entries[name].transposed for name in floats}


def _into(module: nn.Module, folder: Folder, way: Way, ahead: Ahead) -> nn.Module:
    """Fill a module whose own names are the folder's; layers that are tied in it share what one of them has there."""
    weights = {
        name: kinds.weight_of(layer)
        for name, layer in module.named_modules(remove_duplicate=False)
        if kinds.may_be_tied(layer)
    }
    packed = {id(weights[name]): stored for name, stored in folder.contents.items() if name in weights}
    tied = {name: packed[id(weight)] for name, weight in weights.items() if id(weight) in packed}
    for name, stored in {**tied, **folder.contents}.items():
        make_slot(module, name, stored)
    tensors = folder.floats()
    _check_names(module, tensors, folder)
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise LoadError(f"{folder.checkpoint.folder}: {error}", _OTHER_MODULE) from error
    module.to(way.device)
    if folder.format is not None:
        fill(module, folder, {}, way, ahead.result())
        fuse(module, way.engine)
    return module


def _check_names(module: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Folder) -> None:
    """Raise LoadError unless the tensors are those of the module's state, of which tied ones are stored once."""
    state = module.state_dict(keep_vars=True)
    shared = {id(state[name]) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if name not in tensors and id(tensor) not in shared]
    unexpected = [name for name in tensors if name not in state]
    for names, problem in (
        (missing, "has no value in the folder"),
        (unexpected, "is in the folder and not in the module"),
    ):
        if names:
            raise LoadError(f"{folder.checkpoint.folder}: {listed(names, 3, 'tensors')} {problem}", _OTHER_MODULE)
