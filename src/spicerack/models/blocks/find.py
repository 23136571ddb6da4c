"""The repeated blocks of a transformers model, found by their shape, and tried before anything is made of it.

How it works. No family's forward is written anew here: the model runs its own code, and what is asked for is caught on
the way. `find` runs the model once on a few tokens, and its blocks one by one: what does not come out the same is
refused there, by name, and not after hours.

What is given up. A block is taken to turn hidden states into hidden states, once in each forward, and its other
arguments to depend on the model's inputs alone. An architecture that calls a block twice, or without hidden states, or
whose blocks share weights, is refused; so are encoder-decoders, which have two stacks.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.models.blocks.stack import (
    Arguments,
    Inputs,
    Left,
    Results,
    Stack,
    call_body,
    has_streams,
    hidden_of,
    side_by_side,
)
from spicerack.models.inputs import limits, text_part

_TOKENS = ((3, 4, 5, 6, 7), (7, 6, 5, 4, 3))
"""What a model is tried with: few, as they pass through all of it, and below what stands for pictures and sound."""
_SAME = 1e-3
"""How far off blocks run one by one may be, of the output's norm: the same operations give the same bits, but for what
sums in another order where tensors lie otherwise in memory."""
_WITHOUT = "quantize it without --calib"
_RUN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What a model's own code raises where it is not called as it expects to be."""


@torch.no_grad()
def find(model: PreTrainedModel) -> Stack:
    """The blocks of `repeated`, with what they return and leave for each other, found out by a few tokens.

    model: on any device that it runs on; it is run once as a whole, and once more block by block. Raises UsageError
    where it does not run, or its blocks one by one do not do what it does.
    """
    path, blocks = repeated(model)
    name = type(model).__name__
    ids = torch.tensor(_TOKENS, dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids % (limits(model, model.config).vocabulary or len(ids))}
    try:
        outputs, left = _whole(model, blocks, inputs)
    except _RUN_ERRORS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(f"{name} cannot be run on text alone: {reason}", _WITHOUT) from error
    if len(outputs) != len(blocks):
        times = f"called its {len(blocks)} blocks {len(outputs)} times" if outputs else "does not run its blocks"
        raise UsageError(f"{name} {times}", _WITHOUT)
    streams = len(hidden_of(outputs[0])) if has_streams(hidden_of(outputs[0]), ids) else 0
    stack = Stack(model, path, blocks, tuple(map(Results.of, outputs)), left, _handed(outputs), streams)
    try:
        hidden, calls = stack.calls(inputs)
        if stack.handed and not _depends_on_inputs_alone(blocks[0], hidden, calls[0], outputs[0][1:]):
            raise UsageError(f"{name}: what {stack.name(0)} hands on depends on hidden states", _WITHOUT)
        for number, (arguments, output) in enumerate(zip(calls, outputs, strict=True)):
            hidden = stack.run(blocks[number], hidden, arguments)
            expected = side_by_side(hidden_of(output), ids)
            computed = hidden[..., : expected.shape[-1]]
            if not bool(expected.isfinite().all()):
                break  # the loop names layer and place of what is not
            if len(expected) != len(ids):  # sequences come first, whatever else there is
                raise UsageError(f"{name}: {stack.name(number)} returns hidden states {list(expected.shape)}", _WITHOUT)
            if not float((computed - expected).float().norm()) <= _SAME * float(expected.float().norm()):
                raise UsageError(
                    f"{name}: {stack.name(number)} alone computes something else than in the model", _WITHOUT
                )
    except _RUN_ERRORS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(f"{name}'s blocks cannot be run one by one: {reason}", _WITHOUT) from error
    return stack


def _whole(model: PreTrainedModel, blocks: Sequence[nn.Module], inputs: Inputs) -> tuple[list[Any], tuple[Left, ...]]:
    """What each call of a block returns when the model runs, and what was left by others in front of it."""
    outputs: list[Any] = []
    before: list[dict[str, Mapping[Any, Any]]] = []
    given: list[Mapping[str, Any]] = []

    def enter(_: nn.Module, __: Any, named: Mapping[str, Any]) -> None:
        shared = {name: value for name, value in named.items() if isinstance(value, MutableMapping)}
        given.append(shared)
        before.append({name: dict(value) for name, value in shared.items()})

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        call_body(model, inputs)
    grew = {
        name for shared, had in zip(given, before, strict=True) for name in shared if len(shared[name]) > len(had[name])
    }
    if not grew:
        return outputs, ()
    name = grew.pop()
    if grew or not all(name in shared for shared in given):
        raise UsageError(f"{type(model).__name__}'s blocks leave things for each other in several ways", _WITHOUT)
    return outputs, tuple(_left(name, type(shared[name]), had[name]) for shared, had in zip(given, before, strict=True))


def _handed(outputs: Sequence[Any]) -> bool:
    """Whether what the first block returns beside hidden states is what all the others return, too."""
    others = [output[1:] if isinstance(output, (tuple, list)) else () for output in outputs]
    tensors = [x for x in others[0] if isinstance(x, torch.Tensor)]
    return len(outputs) > 1 and bool(tensors) and all(
        len(some) == len(others[0]) and all(x is y for x, y in zip(some, others[0], strict=True)) for some in others
    )  # fmt: skip


def _depends_on_inputs_alone(
    block: nn.Module, hidden: torch.Tensor, arguments: Arguments, others: Sequence[Any]
) -> bool:
    """Whether a block returns these `others` beside whatever hidden states it is given."""
    again = block(torch.zeros_like(hidden), *arguments.positional, **arguments.named)[1:]
    pairs = [(x, y) for x, y in zip(again, others, strict=True) if isinstance(x, torch.Tensor)]
    return all(torch.equal(x, y) for x, y in pairs)


def _left(argument: str, kind: type[MutableMapping[Any, Any]], held: Mapping[Any, Any]) -> Left:
    """What is in a dict of tensors [B, heads, L, D]. Raises UsageError for anything else."""
    rows, length = len(_TOKENS), len(_TOKENS[0])
    keys = []
    for key, value in held.items():
        tensors = value if isinstance(value, (tuple, list)) else ()
        if not tensors or any(x.ndim != 4 or (x.shape[0], x.shape[2]) != (rows, length) for x in tensors):
            raise UsageError(f"{argument}[{key!r}], which blocks leave for each other, is no keys and values", _WITHOUT)
        keys.append((key, tuple((int(x.shape[1]), int(x.shape[3])) for x in tensors)))
    return Left(argument, kind, tuple(keys))


def repeated(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """The path of the list of blocks that has the most parameters, and the blocks, in the part that reads text.

    Blocks may be of several classes (attention and state spaces). Raises UsageError where there is none, for a model of
    two stacks, and where blocks share weights, which cannot be solved for two places at once.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UsageError(f"{name} is an encoder-decoder model", "only decoders and encoders are calibrated so far")
    part = text_part(model, model.config)
    inside = {id(module) for module in part.modules()}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module)
        and not any(isinstance(block, (nn.ModuleList, nn.ModuleDict, nn.Identity)) for block in module)
        and any(map(_multiplies, module.modules()))
    ]  # fmt: skip
    if not lists:
        raise UsageError(f"{name} has no repeated blocks", _WITHOUT)
    path, blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    owners: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), number) != number:
                shared = f"{path}.{owners[id(parameter)]} and {path}.{number}"
                raise UsageError(f"{name}: {shared} share weights, which are solved for one place only", _WITHOUT)
    return path, tuple(blocks)


def _multiplies(layer: nn.Module) -> bool:
    """Whether a layer has a matrix, as linear layers of any class have, which is no table of rows to look up."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(layer, nn.Embedding)
