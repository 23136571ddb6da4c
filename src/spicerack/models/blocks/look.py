"""What happens inside of a block while it runs: what its layers are called with, and what comes out of it.

Hooks in front of layers show their inputs; an exception that never leaves this module ends a forward whose rest nobody
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.models.blocks.reads import Reads
from spicerack.models.blocks.stack import Arguments, Inputs, Stack, call_body, hidden_of, side_by_side


class _EnoughError(Exception):
    """Ends a forward whose rest is not needed; never leaves this module."""


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
def multiplied(path: str, stack: Stack, block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> bool:
    """Whether code of `block` computes with the weight of a layer that is never called: Mamba's with that of `dt_proj`.

    path: of the layer, in the block; the other arguments are those of `inputs_of`.
    """
    weight = block.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor), "a layer that is calibrated has a weight"
    with Reads({path: weight}) as reads:
        stack.run(block, hidden, arguments)
    return path in reads.given


@torch.no_grad()
def output_of(model: PreTrainedModel, path: str, inputs: Inputs) -> torch.Tensor:
    """The hidden states [B, L, H] that the block at `path` makes of these inputs; nothing behind it is computed."""
    caught: list[torch.Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(side_by_side(hidden_of(output), inputs["input_ids"]))
        raise _EnoughError

    hook = model.get_submodule(path).register_forward_hook(look)
    try:
        with suppress(_EnoughError):
            call_body(model, inputs)
    finally:
        hook.remove()
    return caught[0]
