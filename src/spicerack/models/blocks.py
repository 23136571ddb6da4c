"""The repeated blocks of a transformers model, found by their shape, and what the model's own code calls them with.

How it works. No family's forward is written anew here: the model runs its own code, and what is asked for is caught on
the way. Blocks whose forward is replaced by a recorder show with what arguments each is called; hooks in front of
layers show their inputs; an exception that never leaves this module ends a forward whose rest nobody needs.

What is given up. A block is taken to turn hidden states into hidden states, once in each forward, and its other
arguments to depend on the model's inputs alone. An architecture that calls a block twice, or without hidden states, is
refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.errors import UsageError

Inputs = Mapping[str, torch.Tensor]
"""What a model is called with: input_ids [B, L], and attention_mask where there is padding."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a block is called with beside its hidden states, which come first or are called `hidden_states`.

    positional   in their order, the hidden states left out
    named        by name, the hidden states left out: masks, positions, rotary angles ...
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stack:
    """The blocks of a model, in the order in which they run.

    model     whose they are; it is called to find out what blocks are called with
    path      of their list in the model
    blocks    the modules themselves
    results   how many a block returns, hidden states first, in a tuple; 0: it returns them alone
    """

    model: PreTrainedModel
    path: str
    blocks: tuple[nn.Module, ...]
    results: int

    def name(self, index: int) -> str:
        """The path in the model of block number `index`, from 0: `model.layers.3`."""
        return f"{self.path}.{index}"

    @torch.no_grad()
    def calls(self, inputs: Inputs) -> tuple[torch.Tensor, list[Arguments]]:
        """The first block's hidden states [B, L, H] and each block's arguments, for these inputs; no block computes.

        Raises UsageError for a model that does not call each of its blocks once, with hidden states.
        """
        first: list[torch.Tensor] = []
        calls: list[Arguments] = []

        def record(*positional: Any, **named: Any) -> Any:
            """In place of a block's forward: hands the hidden states on as they are."""
            hidden = _hidden(positional, named)
            first.append(hidden)
            rest = {name: value for name, value in named.items() if name != "hidden_states"}
            calls.append(Arguments(positional[1:] if positional else (), rest))
            return (hidden, *[None] * (self.results - 1)) if self.results else hidden

        for block in self.blocks:
            block.forward = record  # the instance's own, before the class's
        try:
            _call(self.model, inputs)
        finally:
            for block in self.blocks:
                del block.forward
        if len(calls) != len(self.blocks):
            raise UsageError(
                f"{type(self.model).__name__} called its {len(self.blocks)} blocks {len(calls)} times",
                "this architecture cannot be calibrated block by block",
            )
        return first[0], calls

    def run(self, block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The hidden states [B, L, H] that `block` makes of `hidden` [B, L, H], called as the model would call it.

        block: one of the stack's, or a copy of one; arguments: of its call, as `calls` has them.
        """
        result = block(hidden, *arguments.positional, **arguments.named)
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out


def find(model: PreTrainedModel) -> Stack:
    """The blocks of `repeated`, with what they return, found out by two tokens through the first of them.

    model: on any device that it runs on. Raises UsageError where there are none that run.
    """
    path, blocks = repeated(model)
    return Stack(model, path, blocks, _results(model, blocks[0]))


def repeated(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """The path of the list of blocks of one type that has the most parameters, and the blocks.

    Raises UsageError where there is none, and for a model of two stacks.
    """
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder model", "only decoders and encoders are calibrated so far"
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
        and any(map(_multiplies, module.modules()))
    ]  # fmt: skip
    if not lists:
        raise UsageError(f"{type(model).__name__} has no repeated blocks", "quantize it without --calib")
    path, blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
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
        caught.append(output[0] if isinstance(output, tuple) else output)
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


@torch.no_grad()
def _results(model: PreTrainedModel, block: nn.Module) -> int:
    """How many things the first block returns in a tuple, for two tokens; 0 where it is a tensor alone.

    The model is not run any further. Raises UsageError where the block is not run at all.
    """
    counts: list[int] = []
    original = block.forward

    @functools.wraps(original)
    def counted(*positional: Any, **named: Any) -> Any:
        output = original(*positional, **named)
        counts.append(len(output) if isinstance(output, tuple) else 0)
        raise _EnoughError

    block.forward = counted
    try:
        with suppress(_EnoughError):
            _call(model, {"input_ids": torch.zeros((1, 2), dtype=torch.long, device="cpu")})
    finally:
        del block.forward
    if not counts:
        raise UsageError(f"{type(model).__name__} does not run its blocks", "quantize it without --calib")
    return counts[0]


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
