"""`Target`: a layer to quantize of a block; `tensors_of` tells from the job and the model which a block has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from spicerack.models.architecture import destinations
from spicerack.models.blocks.stack import Stack
from spicerack.nn import kinds
from spicerack.quantization.calibration.states import solution_name
from spicerack.quantization.job import Action, Job
from spicerack.runtime.slots import Expert
from spicerack.storage.format import StoredTensor


@dataclass(frozen=True, slots=True)
class Target:
    """A layer to quantize of a block, which is a source tensor or, if the layer is an expert's, a matrix of one.

    path      of the layer, in the block
    tensor    name of the source tensor
    stored    what was decided for the matrix [N, K]
    stack     path of the stack of experts that the layer is in; empty for others
    number    of the matrix in a tensor of all experts; None where it is the tensor
    """

    path: str
    tensor: str
    stored: StoredTensor
    stack: str = ""
    number: int | None = None

    @property
    def key(self) -> str:
        """What it is called among solutions."""
        return solution_name(self.tensor, self.number)

    @property
    def expert(self) -> str:
        """The expert's number in the stack."""
        return self.path.removeprefix(self.stack).split(".")[1]


@dataclass(frozen=True, slots=True)
class BlockTensors:
    """What a block has of the model's tensors.

    targets  its layers to quantize: experts first, then in the order of its parameters
    others   path of every other parameter -> name of its tensor; what transformers made of several is in neither
    """

    targets: tuple[Target, ...]
    others: Mapping[str, str]


def tensors_of(stack: Stack, experts: Mapping[str, Expert], job: Job) -> list[BlockTensors]:
    """What is in each block of the stack, in their order; experts: of `load_apart`.

    Tensors that transformers changes on loading, beyond renaming, are left out.
    """
    actions: dict[str, Action] = {a.info.name: a for a in job.actions}
    names = {
        place.parameter: tensor
        for tensor, place in destinations(stack.model, actions).items()
        if not place.operations
    }  # fmt: skip
    tensors = []
    for i, block in enumerate(stack.blocks):
        inside = {path: names.get(f"{stack.name(i)}.{path}") for path, _ in block.named_parameters()}
        tensor_of = {path: tensor for path, tensor in inside.items() if tensor is not None}
        linear = {f"{path}.weight": path for path in kinds.linear_layers(block)}
        stored_as = {path: actions[tensor].stored for path, tensor in tensor_of.items()}
        targets = [
            Target(linear[path], tensor_of[path], stored)
            for path, stored in stored_as.items()
            if stored is not None and path in linear
        ]
        others = {path: tensor for path, tensor in tensor_of.items() if stored_as[path] is None}
        tensors.append(BlockTensors((*_experts(block, stack.name(i), experts, actions), *targets), others))
    return tensors


def _experts(
    block: nn.Module, name: str, experts: Mapping[str, Expert], actions: Mapping[str, Action]
) -> Iterator[Target]:
    """The targets of a block, called `name` in the model, that are matrices of experts."""
    for path in kinds.linear_layers(block):
        expert = experts.get(f"{name}.{path}")
        stored = None if expert is None or not isinstance(expert.source, str) else actions[expert.source].stored
        if expert is None or stored is None:
            continue
        if expert.number is not None:
            stored = dataclasses.replace(stored, shape=stored.shape[1:], transposed=False)
        assert isinstance(expert.source, str)
        yield Target(path, expert.source, stored, path.rsplit(".", 2)[0], expert.number)
