"""Packed layers into a model: first empty slots where float layers were, then, when the floats are in, the layers.

Neither step ever holds more than one float weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spicerack.errors import LoadError
from spicerack.kernels.kernel import Compute
from spicerack.models.families import names
from spicerack.nn import experts
from spicerack.nn.conv import Geometry, QConv2d
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.experts import ExpertStack
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.storage.format import Format, StoredTensor
from spicerack.storage.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Expert:
    """One matrix in a stack of experts: packed, or the name of a float tensor. number: in a tensor of all experts."""

    source: StoredTensor | str
    number: int | None = None


class Slot(nn.Module):
    """Where a layer with packed weights will be. Keeps the bias, which is loaded as always."""

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Embedding | nn.Conv2d | Conv1D, planned: StoredTensor) -> None:
        super().__init__()
        self.planned, self.dtype, self.training = planned, layer.weight.dtype, layer.training
        self.out_features, self.in_features = planned.shape  # initializers look at these, and at weight
        self.is_embedding = isinstance(layer, nn.Embedding)
        self.geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
        self.padding_idx = layer.padding_idx if isinstance(layer, nn.Embedding) else None
        self.register_parameter("bias", dict(layer.named_parameters(recurse=False)).get("bias"))
        self.weight = torch.empty(0, device="meta")
        vars(self.weight)["_is_hf_initialized"] = vars(self)["_is_hf_initialized"] = True


class StackSlot(nn.Module):
    """Where a stack of experts will be: experts[e] are the matrices of expert e, in order."""

    def __init__(self, experts: list[list[Expert]], parameter: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.experts, self.shape, self.dtype, self.transposed = experts, parameter.shape, parameter.dtype, transposed
        vars(self)["_is_hf_initialized"] = True


def make_slot(model: nn.Module, name: str, planned: StoredTensor) -> None:
    """Replace the layer `name` of `model` by a slot. Raises LoadError if it is not a layer that `planned` fits."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise LoadError(f"{planned.module}: the model has no layer {name}", "is config.json the model's own?") from None
    plain = type(layer) in (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D) or type(layer).__name__ in names.PLAIN_LINEAR
    if not plain or not isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)):
        raise LoadError(
            f"{planned.module}: {name} is a {type(layer).__name__}, which has no packed form",
            "quantize again and skip it",
        )
    shape = tuple(layer.weight.shape)
    rows_first = shape[::-1] if isinstance(layer, Conv1D) else (shape[0], math.prod(shape[1:]))
    if rows_first != planned.shape or isinstance(layer, Conv1D) != planned.transposed:
        raise LoadError(
            f"{planned.module}: packed {list(planned.shape)}, but {name} is {type(layer).__name__} {list(shape)}",
            "is config.json the model's own?",
        )
    model.set_submodule(name, Slot(layer, planned))


def make_stack_slot(model: nn.Module, parameter: str, parts: list[list[Expert]], *, transposed: bool) -> None:
    """Replace a 3-D parameter by a slot. Raises LoadError unless whole experts fill it."""
    owner_name, _, attribute = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner.get_parameter(attribute)
    if len(parts) != old.shape[0] or len({len(some) for some in parts}) != 1:
        raise LoadError(f"{parameter}: {old.shape[0]} experts, {len(parts)} in the folder", "the folder is incomplete")
    experts.put(owner, attribute, StackSlot(parts, old, transposed))
    vars(owner)["_is_hf_initialized"] = True  # its initializer would look for the parameter


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    fmt: Format | None,
    floats: Mapping[str, torch.Tensor],
    device: str | torch.device,
    compute: Compute | None = None,
    engine: str | None = None,
) -> None:
    """Put the packed layers into all slots of `model`; what is tied shares one PackedWeight. floats: of experts."""
    done: dict[tuple[str, int | None], PackedWeight] = {}

    def packed(planned: StoredTensor, dtype: torch.dtype, number: int | None = None) -> PackedWeight:
        assert fmt is not None, "slots of packed layers come from a folder that has them"
        if (planned.module, number) not in done:
            tensors = {name: checkpoint.read(name) for name in fmt.layout(planned)}
            q = fmt.decode(planned, tensors)
            for which, matrix in [(None, q)] if number is None else enumerate(q.matrices()):
                done[planned.module, which] = PackedWeight(matrix, dtype, device, compute, engine)
        return done[planned.module, number]

    def layer(expert: Expert, slot: StackSlot) -> nn.Module:
        if isinstance(expert.source, StoredTensor):
            return QLinear(packed(expert.source, slot.dtype, expert.number))
        weight = floats[expert.source]
        weight = weight if expert.number is None else weight[expert.number]
        return experts.linear((weight.t() if slot.transposed else weight).to(device, slot.dtype))

    for name, slot in list(model.named_modules(remove_duplicate=False)):
        if isinstance(slot, Slot) and slot.is_embedding:
            model.set_submodule(
                name, QEmbedding(packed(slot.planned, slot.dtype), slot.padding_idx).train(slot.training)
            )
        elif isinstance(slot, Slot) and slot.geometry is not None:
            weight = packed(slot.planned, slot.dtype)
            model.set_submodule(name, QConv2d(weight, slot.geometry, slot.bias).train(slot.training))
        elif isinstance(slot, Slot):
            model.set_submodule(name, QLinear(packed(slot.planned, slot.dtype), slot.bias).train(slot.training))
        elif isinstance(slot, StackSlot):
            layers = [[layer(one, slot) for one in parts] for parts in slot.experts]
            model.set_submodule(name, ExpertStack(layers, slot.shape, transposed=slot.transposed))


def experts_in_slots(model: nn.Module) -> dict[str, Expert]:
    """Path of the layer that an expert's matrix will be -> what will be in it."""
    return {
        f"{name}.{number}.{place}": expert
        for name, slot in model.named_modules() if isinstance(slot, StackSlot)
        for number, parts in enumerate(slot.experts) for place, expert in enumerate(parts)
    }  # fmt: skip


def float_names(checkpoint: Checkpoint, fmt: Format | None, plan: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors that are no part of a packed one."""
    packed = {name for planned in plan.values() for name in fmt.layout(planned)} if fmt is not None else set()
    return [name for name in checkpoint.tensors if name not in packed]


def read_floats(checkpoint: Checkpoint, tensors: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors, mapped from their files rather than copied; each file is opened once."""
    from safetensors import safe_open

    wanted: dict[str, list[str]] = {}
    for name in tensors:
        wanted.setdefault(checkpoint.tensors[name].file, []).append(name)
    found = {}
    for file, inside in wanted.items():
        with safe_open(checkpoint.folder / file, framework="pt") as shard:
            found.update({name: shard.get_tensor(name) for name in inside})
    return found
