"""Slots: what stands in a model for its packed layers while transformers builds and fills it.

transformers fills a model by the names of its parameters, and makes up those for which a folder has no tensor. A layer
whose weight is packed must therefore not have a parameter `weight` by then, nor may one be allocated: what does not fit
in memory as floats is the reason to pack it. The packed layer cannot be there either: its buffers have names that no
folder has, and would count as missing. So there are two steps, and neither holds more than one float weight:

    make_slot, make_stack_slot    before any weight is read: a `Slot` takes the layer's place; it has the layer's bias,
                                  which is loaded as always, and remembers what the layer was
    fill                          when the floats are in: each slot becomes the packed layer of its kind (`kinds`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from spicerack.errors import LoadError
from spicerack.nn import experts, kinds
from spicerack.nn.experts import ExpertStack
from spicerack.nn.kinds import LayerKind
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.runtime.ahead import Choices, Ready, Way
from spicerack.runtime.folder import Folder
from spicerack.storage.format import StoredTensor


@dataclass(frozen=True, slots=True)
class Expert:
    """One matrix in a stack of experts.

    source   the packed tensor that it is or is in, or the name of a float one
    number   which of that tensor's matrices, where it holds all experts; None where it is this one alone
    """

    source: StoredTensor | str
    number: int | None = None


class Slot(nn.Module):
    """Where a layer with packed weights will be: its bias, its mode, and what `fill` makes the packed layer from.

    To whatever looks at it until then it is that layer: initializers ask for shapes, and ties cut a head's bias to the
    length of the weight. It has the layer's sizes, and a weight of its shape and type without values, on meta.

    kind, options   of the layer that was here (`nn/kinds.py`)
    stored         the packed tensor that its weight is
    dtype           of its weight
    bias            its own, a parameter like any other while the model is filled
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, kind: LayerKind, stored: StoredTensor) -> None:
        super().__init__()
        sizes = {
            key: value for key, value in vars(layer).items() if isinstance(value, int | float | str | tuple | None)
        }
        vars(self).update(sizes)
        self.kind, self.options, self.stored = kind, kind.options(layer), stored
        weight = kinds.weight_of(layer)
        self.dtype = weight.dtype
        self.register_parameter("bias", kinds.bias_of(layer))
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        # Initializers ask both: neither needs values.
        vars(self.weight)["_is_hf_initialized"] = vars(self)["_is_hf_initialized"] = True


class StackSlot(nn.Module):
    """Where an `ExpertStack` will be, in place of a parameter [E, N, K], or [E, K, N] if transposed.

    experts      experts[e]: the matrices of expert e, in the order of their rows
    parameter    that it takes the place of, whose shape and type it remembers
    transposed   the parameter is [E, K, N]
    """

    def __init__(self, experts: list[list[Expert]], parameter: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.experts, self.shape, self.dtype, self.transposed = experts, parameter.shape, parameter.dtype, transposed
        vars(self)["_is_hf_initialized"] = True


def make_slot(model: nn.Module, name: str, stored: StoredTensor) -> None:
    """Replace the layer `name` of `model` by a slot.

    Raises LoadError unless there is a layer of a kind that has a packed form, whose weight has the stored shape.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise LoadError(f"{stored.module}: the model has no layer {name}", "is config.json the model's own?") from None
    kind = kinds.find(layer)
    if kind is None:
        raise LoadError(
            f"{stored.module}: {name} is a {type(layer).__name__}, which has no packed form",
            "quantize again and skip it",
        )
    if reason := kinds.obstacle(layer):
        raise LoadError(f"{stored.module}: {name}: {reason}", "quantize again and skip it")
    weight, cls = kinds.weight_of(layer), type(layer).__name__
    if kind.matrix(weight).shape != stored.shape or kind.transposed != stored.transposed:
        raise LoadError(
            f"{stored.module}: packed {list(stored.shape)}, but {name} is {cls} {list(weight.shape)}",
            "is config.json the model's own?",
        )
    model.set_submodule(name, Slot(layer, kind, stored))


def make_stack_slot(model: nn.Module, parameter: str, matrices: list[list[Expert]], *, transposed: bool) -> None:
    """Replace a 3-D parameter of `model` by a slot for these matrices, [expert][part].

    parameter: its path. transposed: it is [E, K, N]. Raises LoadError unless whole experts fill it: as many as it has,
    all of the same number of parts; and if its module says that it is stored the other way round.
    """
    owner_name, _, attribute = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner.get_parameter(attribute)
    if len(matrices) != old.shape[0] or len({len(parts) for parts in matrices}) != 1:
        raise LoadError(
            f"{parameter}: {old.shape[0]} experts, {len(matrices)} in the folder", "the folder is incomplete"
        )
    if vars(owner).get("is_transposed", transposed) != transposed:
        axes, cls = "in, out" if transposed else "out, in", type(owner).__name__
        raise LoadError(
            f"{parameter}: packed as [experts, {axes}], and {cls} has it the other way round",
            "quantize the model again",
        )
    experts.put(owner, attribute, StackSlot(matrices, old, transposed))
    vars(owner)["_is_hf_initialized"] = True  # its initializer would look for the parameter


def experts_in_slots(model: nn.Module) -> dict[str, Expert]:
    """Path of the layer that an expert's matrix will be -> what will be in it."""
    return {
        f"{name}.{number}.{place}": expert
        for name, slot in model.named_modules() if isinstance(slot, StackSlot)
        for number, parts in enumerate(slot.experts) for place, expert in enumerate(parts)
    }  # fmt: skip


@dataclass(slots=True)
class _Packing:
    """Packed weights of a folder, each read and packed once; what is tied shares it.

    folder   that they are read from
    floats   tensors of experts that stay in float
    way      how they will run
    ready    weights that are laid out already, by module
    choices  of kernels
    packed   (module, number of the matrix or None) -> what is packed already
    """

    folder: Folder
    floats: Mapping[str, torch.Tensor]
    way: Way
    ready: Mapping[str, Ready]
    choices: Choices
    packed: dict[tuple[str, int | None], PackedWeight] = field(default_factory=dict)

    def weight(self, stored: StoredTensor, dtype: torch.dtype, number: int | None = None) -> PackedWeight:
        """The tensor, or one matrix of a tensor of all experts. dtype: of the float weight that it replaces."""
        if (stored.module, number) not in self.packed and (weight := self._ready(stored, dtype)) is not None:
            self.packed[stored.module, number] = weight
        elif (stored.module, number) not in self.packed:
            q = self.folder.packed(stored)
            for place, matrix in [(None, q)] if number is None else enumerate(q.matrices()):
                way = self.way
                weight = PackedWeight(matrix, dtype, way.device, way.compute, way.engine)
                self.packed[stored.module, place] = weight
            self.folder.release(stored)
        return self.packed[stored.module, number]

    def _ready(self, stored: StoredTensor, dtype: torch.dtype) -> PackedWeight | None:
        """A matrix that is laid out for the very kernel that its layer's type asks for; else None."""
        ready = self.ready.get(stored.module)
        if ready is None:
            return None
        rows, columns = stored.shape
        choice = self.choices.pick(stored.scheme, (rows, columns), dtype)
        if choice.kernel is not ready.kernel:
            return None
        shape, tensors = (rows, columns), ready.tensors
        return PackedWeight.of_packed(stored.scheme, shape, choice, tensors, dtype, transposed=stored.transposed)

    def layer(self, slot: Slot) -> nn.Module:
        """The packed layer that a slot becomes, with the slot's bias and mode."""
        weight = self.weight(slot.stored, slot.dtype)
        return slot.kind.pack(weight, slot.options, slot.bias).train(slot.training)

    def stack(self, slot: StackSlot) -> ExpertStack:
        """The stack of layers, packed and float ones, that a stack's slot becomes."""
        layers = [[self._expert(expert, slot) for expert in parts] for parts in slot.experts]
        return ExpertStack(layers, slot.shape, transposed=slot.transposed)

    def _expert(self, expert: Expert, slot: StackSlot) -> nn.Module:
        """The layer of one expert's matrix."""
        if isinstance(expert.source, StoredTensor):
            return QLinear(self.weight(expert.source, slot.dtype, expert.number))
        weight = self.floats[expert.source]
        weight = weight if expert.number is None else weight[expert.number]
        return experts.linear((weight.t() if slot.transposed else weight).to(self.way.device, slot.dtype))


def fill(
    model: nn.Module,
    folder: Folder,
    floats: Mapping[str, torch.Tensor],
    way: Way,
    ready: Mapping[str, Ready] | None = None,
) -> None:
    """Put the packed layers into all slots of `model`, in place; layers that are tied share one PackedWeight.

    model    has slots, and all its floats
    folder   that packed tensors are read from, one at a time
    floats   tensors of experts that stay in float, in stacks with packed ones
    way      how the layers will run
    ready    weights that are laid out already (`Ahead`); None for none

    Raises CheckpointError for codes or scales that no folder of ours has, SchemeError where no kernel runs a scheme.
    """
    packing = _Packing(folder, floats, way, ready or {}, Choices(way))
    for name, slot in list(model.named_modules(remove_duplicate=False)):
        if isinstance(slot, Slot):
            model.set_submodule(name, packing.layer(slot))
        elif isinstance(slot, StackSlot):
            model.set_submodule(name, packing.stack(slot))
