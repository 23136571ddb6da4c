"""`Stack`: the repeated blocks of a model, what its own code calls them with, and how one of them is run alone.

Blocks whose forward is replaced by a recorder show with what arguments each is called. What blocks leave for later ones
in a dict that all of them are given (keys and values in Gemma 3n and 4) travels with the hidden states, as more columns
of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spicerack.errors import UsageError

Inputs = Mapping[str, torch.Tensor]
"""What a model is called with: input_ids [B, L], and attention_mask where there is padding."""


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
            call_body(self.model, inputs)
        finally:
            for block in self.blocks:
                del block.forward
        if order != list(range(len(self.blocks))):
            raise UsageError(
                f"{type(self.model).__name__} called its {len(self.blocks)} blocks {len(calls)} times",
                "this architecture cannot be calibrated block by block",
            )
        return side_by_side(first[0], inputs["input_ids"]), calls

    def behind(self, inputs: Inputs, hidden: torch.Tensor, *, head: bool) -> Any:
        """What the model returns for these inputs where its last block gives `hidden` [B, L, H]; gradients flow.

        head: by the whole model; else by its body alone. No block computes, but for the first one as in `calls`. Raises
        UsageError for a model whose tokens have several hidden states.
        """
        if self.streams:
            raise UsageError(
                f"{type(self.model).__name__} has {self.streams} hidden states for a token", "name a scheme instead"
            )
        others: list[Any] = []
        compute = self.blocks[0].forward

        def answer(*positional: Any, number: int, **named: Any) -> Any:
            """In place of a block's forward."""
            given = _hidden(positional, named)
            if self.handed and not number:
                with torch.no_grad():
                    others.extend(compute(*positional, **named)[1:])
            last = number == len(self.blocks) - 1
            given = hidden[..., : given.shape[-1]].to(given.dtype) if last else given
            return self.results[number].around(given, others)

        for number, block in enumerate(self.blocks):
            block.forward = functools.partial(answer, number=number)
        try:
            whole = self.model if head else self.model.base_model
            return whole(**inputs, **({"use_cache": False} if self.model.can_generate() else {}))
        finally:
            for block in self.blocks:
                del block.forward

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
            return hidden_of(block(hidden, *positional, **named))
        streams = hidden.unflatten(-1, (self.streams, -1)).permute(2, 0, 1, 3)
        return _side_by_side(hidden_of(block(streams, *positional, **named)))


def side_by_side(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of a model with sequences first: of several for each token, [S, B, L, H], the columns of one.

    ids: the model's, [B, L], which tell that from other axes.
    """
    return _side_by_side(hidden) if has_streams(hidden, ids) else hidden


def has_streams(hidden: torch.Tensor, ids: torch.Tensor) -> bool:
    return hidden.ndim == 4 and hidden.shape[:2] != ids.shape and hidden.shape[1:3] == ids.shape


def _side_by_side(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.permute(1, 2, 0, 3).flatten(2)


def hidden_of(output: Any) -> torch.Tensor:
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


def call_body(model: PreTrainedModel, inputs: Inputs) -> None:
    """Run the model without its head, which nothing is needed of, and without a cache."""
    extra = {"use_cache": False} if model.can_generate() else {}
    model.base_model(**inputs, **extra)


def _hidden(positional: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among a block's arguments. Raises UsageError where there are none."""
    hidden = positional[0] if positional else named.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise UsageError("a block is not called with hidden states", "this architecture cannot be calibrated")
    return hidden
