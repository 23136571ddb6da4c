"""`Flow`: what runs through the block that is being calibrated: the text, chunk by chunk, and statistics over all of
it.

Hidden states are read from disk, where every chunk is twice: behind the blocks that are quantized already, and as the
float model has them. The block's other arguments (masks, positions) are made anew for each chunk by the model itself:
they are small to make and large to keep, and only its own code knows what they are in a new family. Each rank goes
through the chunks that are its own; statistics are those of all ranks.

A flow holds no block: whoever runs something says which copy of the block it is to run through. Whatever asks for
inputs of a layer runs the block up to that layer and no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from spicerack.algorithms.stats import Accumulator, Need, Stats
from spicerack.errors import ActivationError
from spicerack.machine.memory import steady
from spicerack.machine.ranks import Ranks
from spicerack.models.blocks.look import arguments_of, inputs_of
from spicerack.models.blocks.stack import Arguments, Stack
from spicerack.numerics.qtensor import moved
from spicerack.quantization.calibration.chunks import Text, tokens
from spicerack.quantization.calibration.states import States
from spicerack.quantization.calibration.targets import Target
from spicerack.quantization.calibration.weights import columns_of


@dataclass(frozen=True, slots=True)
class Call:
    """A few sequences on their way through the block, on the device: all that it is called with but hidden states.

    number     of the chunk that they are; -1 for sequences that are no chunk
    inputs     what the model is called with: input_ids [B, L], attention_mask if there is padding
    arguments  what the model calls the block with, floats in float32
    """

    number: int
    inputs: Mapping[str, torch.Tensor]
    arguments: Arguments

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of x [..., K], [tokens, K], without padding."""
        return tokens(x, self.inputs)


@dataclass(frozen=True, slots=True)
class Flow:
    """The text in front of a block, hidden states on their way through it, and who shares the work.

    stack   the model's blocks; it makes their arguments, and stays on the CPU
    index   which block it is
    text    the calibration text, in chunks
    states  hidden states on disk
    ranks   processes that share the chunks
    """

    stack: Stack
    index: int
    text: Text
    states: States
    ranks: Ranks

    @property
    def name(self) -> str:
        """The block's path in the model."""
        return self.stack.name(self.index)

    @property
    def device(self) -> torch.device:
        """Where hidden states go, and blocks compute."""
        return self.states.device

    # ---- chunks and hidden states ------------------------------------------------------------------------------------

    def calls(self, ranks: Ranks | None = None) -> Iterator[Call]:
        """This rank's chunks, in the order of the text. ranks: other ones to share by; ALONE gives all chunks."""
        for number, sequences in steady(self.text.chunks(ranks or self.ranks)):
            yield self._call(number, sequences)

    def call(self, sequences: Sequence[int]) -> Call:
        """Some sequences of the text, whatever their chunks."""
        return self._call(-1, sequences)

    def _call(self, number: int, sequences: slice | Sequence[int]) -> Call:
        inputs = self.text.inputs(sequences)
        arguments = self.stack.calls(inputs)[1][self.index]  # by the model, which stays on the CPU
        positional, named = moved((arguments.positional, arguments.named), self.device)
        given = Arguments(_to_float(positional), _to_float(named), arguments.left)
        return Call(number, moved(inputs, self.device), given)

    def hidden(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of a chunk in front of the block, float32 [B, L, H]: behind quantized blocks, and exact."""
        return self.states.read(self.index, call.number)

    def results(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """The same behind the block, as they were kept last."""
        return self.states.read(self.index + 1, call.number)

    def keep(self, call: Call, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Hidden states of a chunk behind the block, for the next one."""
        self.states.write(self.index + 1, call.number, quantized, exact)

    # ---- a block, with a few sequences -------------------------------------------------------------------------------

    def run(self, block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What the block, either copy of it, makes of hidden states [B, L, H]: hidden states again."""
        return self.stack.run(block, hidden, call.arguments)

    def inputs(
        self, block: nn.Module, paths: Sequence[str], hidden: torch.Tensor, call: Call
    ) -> dict[str, torch.Tensor]:
        """What each of these layers of a block is called with, [tokens, K]; those that are not called are left out."""
        raw = inputs_of(paths, self.stack, block, hidden, call.arguments)
        return {path: call.tokens(x) for path, x in raw.items()}

    def input(self, block: nn.Module, path: str, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What a layer of the block is called with, [tokens, K]; no rows where it is not called."""
        inputs = self.inputs(block, [path], hidden, call)
        return inputs.get(path, hidden.new_empty((0, columns_of(block.get_submodule(path)))))

    def routed(
        self, block: nn.Module, counts: Mapping[Target, int], hidden: torch.Tensor, call: Call
    ) -> dict[Target, torch.Tensor]:
        """What experts of one stack would get, [count, K], were the first tokens all sent to each of them.

        counts: for each target of theirs how many tokens. Empty where the owner of the stack is not called with hidden
        states [T, H], the experts of each token [T, E'] and their weights.
        """
        owner = next(iter(counts)).stack.rpartition(".")[0]
        given = arguments_of(owner, self.stack, block, hidden, call.arguments)
        if len(given) != 3 or not all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in given):
            return {}
        x, chosen, weights = given
        if chosen.is_floating_point() or not weights.is_floating_point() or not len(x) == len(chosen) == len(weights):
            return {}
        module = block.get_submodule(owner)
        inputs = {}
        for target, count in counts.items():
            first = call.tokens(x)[:count]
            choice = torch.full((len(first), 1), int(target.expert), dtype=chosen.dtype, device=chosen.device)
            arguments = Arguments((choice, weights.new_ones(len(first), 1)), {})
            path = target.path.removeprefix(f"{owner}.")
            inputs[target] = inputs_of([path], self.stack, module, first, arguments)[path]
        return inputs

    # ---- statistics over the text ------------------------------------------------------------------------------------

    def stats(self, block: nn.Module, path: str, needs: Sequence[Need]) -> Stats:
        """Statistics of what a layer of the block gets behind quantized blocks, over the whole text of all ranks.

        Raises ActivationError naming block, layer and chunk.
        """
        accumulator = Accumulator(needs, columns_of(block.get_submodule(path)), device=self.device)
        for call in self.calls():
            self.collect(accumulator, path, call, self.input(block, path, self.hidden(call)[0], call))
        return self.total(accumulator)

    def collect(self, accumulator: Accumulator, path: str, call: Call, x: torch.Tensor) -> None:
        """Take in what a layer gets, [tokens, K]. Raises ActivationError naming block, layer and chunk."""
        try:
            accumulator.add(x)
        except ActivationError as error:
            raise ActivationError(f"{self.name}.{path}, chunk {call.number}: {error.message}", error.hint) from error

    def total(self, accumulator: Accumulator) -> Stats:
        """The statistics of all ranks together."""
        for value, reduction in accumulator.state():
            value.copy_(self.ranks.total(value) if reduction == "sum" else self.ranks.largest(value))
        return accumulator.result()


def _to_float(arguments: Any) -> Any:
    """The same arguments with float tensors, in whatever containers, in float32."""
    return tree_map(lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, arguments)
