"""The repeated blocks of a transformers model, found by their shape, and what the model's own code calls them with.

How it works. No family's forward is written anew here: the model runs its own code, and what is asked for is caught on
the way. Blocks whose forward is replaced by a recorder show with what arguments each is called; hooks in front of
layers show their inputs; an exception that never leaves this module ends a forward whose rest nobody needs.

Before anything is made of it, `find` runs the model once on a few tokens, and its blocks one by one: what does not come
out the same is refused there, by name, and not after hours. What blocks leave for later ones in a dict that all of them
are given (keys and values in Gemma 3n and 4) travels with the hidden states, as more columns of them.

What is given up. A block is taken to turn hidden states into hidden states, once in each forward, and its other
arguments to depend on the model's inputs alone. An architecture that calls a block twice, or without hidden states, or
whose blocks share weights, is refused; so are encoder-decoders, which have two stacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.models.inputs import limits, text_part

Inputs = Mapping[str, torch.Tensor]
"""What a model is called with: input_ids [B, L], and attention_mask where there is padding."""
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


@dataclass(frozen=True, slots=True)
class Left:
    """What earlier blocks left for later ones, in a dict that is an argument of all of them.

    argument   its name
    kind       its class, which is made without arguments
    keys       key -> shapes [heads, D] of the tensors [B, heads, L, D] that are under it, in their order
    """

    argument: str
    kind: type[MutableMapping[Any, Any]]
    keys: tuple[tuple[Any, tuple[tuple[int, int], ...]], ...]

    @property
    def width(self) -> int:
        """Columns that all of it takes behind the hidden states of a token."""
        return sum(heads * size for _, shapes in self.keys for heads, size in shapes)

    def unpacked(self, columns: torch.Tensor) -> MutableMapping[Any, Any]:
        """The dict, of columns [B, L, width]."""
        rows, length = columns.shape[:2]
        widths = [heads * size for _, shapes in self.keys for heads, size in shapes]
        parts = iter(columns.split(widths, dim=-1) if widths else ())
        shared = self.kind()
        for key, shapes in self.keys:
            shared[key] = tuple(next(parts).reshape(rows, length, *shape).transpose(1, 2) for shape in shapes)
        return shared


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a block is called with beside its hidden states, which come first or are called `hidden_states`.

    positional   in their order, the hidden states left out
    named        by name, the hidden states left out: masks, positions, rotary angles ...
    left         what blocks before it left; None in models whose blocks leave nothing
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    left: Left | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What a block returns: hidden states alone (kind None), or first in a tuple or list of so many things."""

    kind: type[Any] | None
    count: int

    @classmethod
    def of(cls, output: object) -> Results:
        """How a block's output is made up."""
        return cls(type(output), len(output)) if isinstance(output, (tuple, list)) else cls(None, 1)

    def around(self, hidden: torch.Tensor, others: Sequence[Any]) -> Any:
        """Hidden states as a block would return them, with `others` behind them, or None where there is nothing."""
        if self.kind is None:
            return hidden
        return self.kind((hidden, *others, *[None] * (self.count - 1 - len(others))))


@dataclass(frozen=True, slots=True)
class Stack:
    """The blocks of a model, in the order in which they run.

    model     whose they are; it is called to find out what blocks are called with
    path      of their list in the model
    blocks    the modules themselves
    results   what each of them returns
    left      what is there in front of each of them of what earlier ones left; empty where blocks leave nothing
    handed    whether all hand on what the first one returns beside its hidden states (T5's biases of positions)
    streams   how many hidden states a token has, where they come first, [streams, B, L, H] (Gemma 3n); 0 of all others.
              Outside of blocks they are columns of one, [B, L, streams * H]
    """

    model: PreTrainedModel
    path: str
    blocks: tuple[nn.Module, ...]
    results: tuple[Results, ...]
    left: tuple[Left, ...] = ()
    handed: bool = False
    streams: int = 0

    def name(self, index: int) -> str:
        """The path in the model of block number `index`, from 0: `model.layers.3`."""
        return f"{self.path}.{index}"

    @torch.no_grad()
    def calls(self, inputs: Inputs) -> tuple[torch.Tensor, list[Arguments]]:
        """The first block's hidden states [B, L, H] and each block's arguments, for these inputs; no block computes,
        but for the first one where the others need what it returns beside them.

        Raises UsageError for a model that does not call each of its blocks once, in order, with hidden states.
        """
        first: list[torch.Tensor] = []
        calls: list[Arguments] = []
        order: list[int] = []
        others: list[Any] = []
        compute = self.blocks[0].forward

        def record(*positional: Any, number: int, **named: Any) -> Any:
            """In place of a block's forward: hands the hidden states on as they are."""
            hidden = _hidden(positional, named)
            first.append(hidden)
            order.append(number)
            left = self.left[number] if self.left else None
            dropped = ("hidden_states", None if left is None else left.argument)
            rest = {name: value for name, value in named.items() if name not in dropped}
            calls.append(Arguments(positional[1:] if positional else (), rest, left))
            if self.handed and not number:
                others.extend(compute(*positional, **named)[1:])
            return self.results[number].around(hidden, others)

        for number, block in enumerate(self.blocks):
            block.forward = functools.partial(record, number=number)  # the instance's own, before the class's
        try:
            _call(self.model, inputs)
        finally:
            for block in self.blocks:
                del block.forward
        if order != list(range(len(self.blocks))):
            raise UsageError(
                f"{type(self.model).__name__} called its {len(self.blocks)} blocks {len(calls)} times",
                "this architecture cannot be calibrated block by block",
            )
        return side_by_side(first[0], inputs["input_ids"]), calls

    def run(self, block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The hidden states [B, L, H] that `block` makes of `hidden` [B, L, H], called as the model would call it.

        block: one of the stack's, or a copy of one; arguments: of its call, as `calls` has them. Where blocks leave
        something for later ones, H counts its columns, too, on both sides.
        """
        left = arguments.left
        if left is None:
            return self._of_block(block, hidden, arguments.positional, arguments.named)
        width = hidden.shape[-1] - left.width
        shared = left.unpacked(hidden[..., width:])
        named = {**arguments.named, left.argument: shared}
        out = self._of_block(block, hidden[..., :width], arguments.positional, named)
        return torch.cat([out, *map(_columns, _held(shared))], dim=-1)

    def _of_block(
        self, block: nn.Module, hidden: torch.Tensor, positional: Sequence[Any], named: Mapping[str, Any]
    ) -> torch.Tensor:
        """The hidden states that `block` itself makes of such, streams side by side on both sides."""
        if not self.streams or hidden.ndim != 3:
            return _first(block(hidden, *positional, **named))
        streams = hidden.unflatten(-1, (self.streams, -1)).permute(2, 0, 1, 3)
        return _side_by_side(_first(block(streams, *positional, **named)))


def side_by_side(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of a model with sequences first: of several for each token, [S, B, L, H], the columns of one.

    ids: the model's, [B, L], which tell that from other axes.
    """
    return _side_by_side(hidden) if _has_streams(hidden, ids) else hidden


def _has_streams(hidden: torch.Tensor, ids: torch.Tensor) -> bool:
    return hidden.ndim == 4 and hidden.shape[:2] != ids.shape and hidden.shape[1:3] == ids.shape


def _side_by_side(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.permute(1, 2, 0, 3).flatten(2)


def _first(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _held(shared: Mapping[Any, Any]) -> Iterator[torch.Tensor]:
    """The tensors in what blocks leave for others, in their order."""
    for value in shared.values():
        yield from value


def _columns(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, D] as columns of tokens, [B, L, heads * D]."""
    return x.transpose(1, 2).flatten(2)


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
    streams = len(_first(outputs[0])) if _has_streams(_first(outputs[0]), ids) else 0
    stack = Stack(model, path, blocks, tuple(map(Results.of, outputs)), left, _handed(outputs), streams)
    try:
        hidden, calls = stack.calls(inputs)
        if stack.handed and not _depends_on_inputs_alone(blocks[0], hidden, calls[0], outputs[0][1:]):
            raise UsageError(f"{name}: what {stack.name(0)} hands on depends on hidden states", _WITHOUT)
        for number, (arguments, output) in enumerate(zip(calls, outputs, strict=True)):
            hidden = stack.run(blocks[number], hidden, arguments)
            expected = side_by_side(_first(output), ids)
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
        _call(model, inputs)
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


def shared_inputs(calls: Sequence[tuple[str, torch.Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Layers in the order of their calls, grouped by the tensor that they were called with.

    calls: (path, input), as `watched` hands them over. The same memory is the same tensor: a layer's reshaped view of
    it counts as it.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for name, x in calls:
        groups.setdefault((x.data_ptr(), x.numel()), []).append(name)
    return tuple(map(tuple, groups.values()))


@contextmanager
def watched(block: nn.Module, paths: Sequence[str], look: Callable[[tuple[str, torch.Tensor]], None]) -> Iterator[None]:
    """Within, `look` is called with (path, input) of each of these layers of `block`, whenever the layer is called.

    The input is the layer's own tensor, not a copy: what `look` keeps of it stays in memory.
    """
    hooks = [
        block.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: look((path, inputs[0])))
        for path in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(
    paths: Sequence[str], stack: Stack, block: nn.Module, hidden: torch.Tensor, arguments: Arguments
) -> dict[str, torch.Tensor]:
    """What layers of `block` are called with, first; nothing behind the last of them is computed.

    paths       of the layers, in the block
    stack       that the block is of
    block       one of the stack's, or a copy of one
    hidden      hidden states [B, L, H] that it is called with
    arguments   of its call, as `Stack.calls` has them

    Those that are not called at all are left out, as experts of a mixture may be. The tensors are the layers' own.
    """
    inputs: dict[str, torch.Tensor] = {}

    def look(call: tuple[str, torch.Tensor]) -> None:
        inputs.setdefault(*call)
        if len(inputs) == len(paths):
            raise _EnoughError

    with watched(block, paths, look), suppress(_EnoughError):
        stack.run(block, hidden, arguments)
    return inputs


def arguments_of(
    path: str, stack: Stack, block: nn.Module, hidden: torch.Tensor, arguments: Arguments
) -> tuple[Any, ...]:
    """What a module in `block` is called with, keywords behind the rest; nothing is computed from there on.

    path: of the module, in the block; the other arguments are those of `inputs_of`. Empty where it is not called.
    """
    caught: list[Any] = []

    def look(_: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        caught.extend((*positional, *named.values()))
        raise _EnoughError

    hook = block.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with suppress(_EnoughError):
            stack.run(block, hidden, arguments)
    finally:
        hook.remove()
    return tuple(caught)


@torch.no_grad()
def output_of(model: PreTrainedModel, path: str, inputs: Inputs) -> torch.Tensor:
    """The hidden states [B, L, H] that the block at `path` makes of these inputs; nothing behind it is computed."""
    caught: list[torch.Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(side_by_side(_first(output), inputs["input_ids"]))
        raise _EnoughError

    hook = model.get_submodule(path).register_forward_hook(look)
    try:
        with suppress(_EnoughError):
            _call(model, inputs)
    finally:
        hook.remove()
    return caught[0]


class _EnoughError(Exception):
    """Ends a forward whose rest is not needed; never leaves this module."""


def _call(model: PreTrainedModel, inputs: Inputs) -> None:
    """Run the model without its head, which nothing is needed of, and without a cache."""
    extra = {"use_cache": False} if model.can_generate() else {}
    model.base_model(**inputs, **extra)


def _hidden(positional: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among a block's arguments. Raises UsageError where there are none."""
    hidden = positional[0] if positional else named.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise UsageError("a block is not called with hidden states", "this architecture cannot be calibrated")
    return hidden
