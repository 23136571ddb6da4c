"""`Work`: the block that is being calibrated next to a float copy of it, and what flows through both, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.stats import Accumulator, Need, Stats
from spicerack.errors import ActivationError
from spicerack.machine.devices import CPU
from spicerack.machine.ranks import Ranks
from spicerack.models import blocks
from spicerack.models.blocks import Arguments, Stack
from spicerack.numerics import rounding
from spicerack.numerics.activations import quantize_fixed, quantize_tokens
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.quantization.calibration.chunks import Text, tokens
from spicerack.quantization.calibration.layers import Inside, Layer
from spicerack.quantization.calibration.states import States
from spicerack.quantization.calibration.weights import float_copy
from spicerack.quantization.job import Job
from spicerack.quantization.rotation import Rotated


class Rounding:
    """The hook that rounds a layer's inputs to int8, as its kernel will; gradients pass straight through.

    static: by `scale` [1], and not at all until that is known; else per token. factors: [K], what inputs are divided by
    before and multiplied by after; None: nothing.
    """

    factors: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def __init__(self, *, static: bool) -> None:
        self.static = static

    def __call__(self, _layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.static and self.scale is None:
            return inputs
        x = inputs[0]
        scaled = (x if self.factors is None else x / self.factors).detach()
        if self.scale is not None:
            codes, scale = quantize_fixed(scaled, self.scale), self.scale
        else:
            codes, scale = quantize_tokens(scaled)
        rounded = codes * scale if self.factors is None else codes * scale * self.factors
        return (x + (rounded - x).detach(), *inputs[1:])


class Work:
    """Block `index`: `block`, whose layers get their codes in the end, and `exact`, which stays.

    Both, and all that flows through them, are on `device`; solutions are on the CPU.
    """

    def __init__(
        self,
        stack: Stack,
        index: int,
        inside: Inside,
        text: Text,
        states: States,
        job: Job,
        ranks: Ranks,
        threads: int,
        device: torch.device,
    ) -> None:
        self.stack, self.index, self.text, self.states = stack, index, text, states
        self.layers, self.others = inside.layers, inside.others
        self.job, self.ranks, self.threads, self.device = job, ranks, threads, device
        original = stack.blocks[index]
        self.types = {path: parameter.dtype for path, parameter in original.named_parameters()}
        self.exact, self._exact = float_copy(original, device)
        self.block, self._block = float_copy(original, device)
        if isinstance(job.source, Rotated):  # the model that runs is the original; nothing else is in the block
            names = {f"{layer.path}.weight": layer.tensor for layer in self.layers} | dict(self.others)
            for path, tensor in names.items():
                self._exact_is(path, job.source.read(tensor))
        self._here: dict[str, tuple[QTensor, Solved]] = {}
        self.roundings: dict[str, Rounding] = {}
        for layer in self.layers:
            if layer.planned.scheme.activations is not None:
                self.roundings[layer.path] = Rounding(static=layer.planned.scheme.activations == "static")
                self.block.get_submodule(layer.path).register_forward_pre_hook(self.roundings[layer.path])

    def _exact_is(self, path: str, value: torch.Tensor) -> None:
        layer = path.removesuffix(".weight")
        if layer in self._exact and path != layer:
            self._exact[layer].source = value
        else:
            with torch.no_grad():
                self.exact.get_parameter(path).copy_(value)
        self.follow(path)

    @property
    def name(self) -> str:
        """The block's path in the model."""
        return self.stack.name(self.index)

    def calls(self, ranks: Ranks | None = None) -> Iterator[tuple[int, dict[str, torch.Tensor], Arguments]]:
        """This rank's chunks, by number, each with the block's arguments in float32. ranks: ALONE gives all of them."""
        for number, some in self.text.chunks(ranks or self.ranks):
            yield number, *self.call(some)

    def call(self, some: slice | Sequence[int]) -> tuple[dict[str, torch.Tensor], Arguments]:
        """The same of some sequences."""
        chunk = self.text.inputs(some)
        arguments = self.stack.calls(chunk)[1][self.index]  # by the model, which stays on the CPU
        positional, named = moved((arguments.positional, arguments.named), self.device)
        return moved(chunk, self.device), Arguments(_to_float(positional), _to_float(named))

    def run(self, block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The block's result, hidden states [B, L, H]."""
        return self.stack.run(block, hidden, arguments)

    def inputs(
        self,
        block: nn.Module,
        paths: Sequence[str],
        hidden: torch.Tensor,
        arguments: Arguments,
        chunk: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """For each layer that is called [tokens, K], what it is called with."""
        found = blocks.inputs_of(paths, self.stack, block, hidden, arguments)
        return {path: tokens(x, chunk) for path, x in found.items()}

    def routed(
        self,
        layers: Mapping[Layer, int],
        hidden: torch.Tensor,
        arguments: Arguments,
        chunk: Mapping[str, torch.Tensor],
    ) -> dict[Layer, torch.Tensor]:
        """For layers of experts of one stack [count, K], what each would get, were the first tokens all sent to it.

        layers: with their counts. Empty where the owner of the stack is not called with hidden states [T, H], the
        experts of each token [T, E'] and their weights.
        """
        owner = next(iter(layers)).stack.rpartition(".")[0]
        given = blocks.arguments_of(owner, self.stack, self.block, hidden, arguments)
        if len(given) != 3 or not all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in given):
            return {}
        x, chosen, weights = given
        if chosen.is_floating_point() or not weights.is_floating_point() or not len(x) == len(chosen) == len(weights):
            return {}
        module = self.block.get_submodule(owner)
        found = {}
        for layer, count in layers.items():
            some = tokens(x, chunk)[:count]
            choice = torch.full((len(some), 1), int(layer.expert), dtype=chosen.dtype, device=chosen.device)
            called = Arguments((choice, weights.new_ones(len(some), 1)), {})
            path = layer.path.removeprefix(f"{owner}.")
            found[layer] = blocks.inputs_of([path], self.stack, module, some, called)[path]
        return found

    def input(
        self, block: nn.Module, path: str, hidden: torch.Tensor, arguments: Arguments, chunk: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """[tokens, K], what a layer is called with, none where it is not called."""
        found = self.inputs(block, [path], hidden, arguments, chunk)
        return found.get(path, hidden.new_empty((0, self.columns(path))))

    def columns(self, path: str) -> int:
        """Of the layer's input."""
        shape = self.block.get_parameter(f"{path}.weight").shape
        return shape[0] if isinstance(self.block.get_submodule(path), Conv1D) else shape[1]

    def stats(self, path: str, needs: Sequence[Need]) -> Stats:
        """Of what the layer gets now, over the whole text. Raises ActivationError."""
        seen = Accumulator(needs, self.columns(path), device=self.device)
        for number, chunk, arguments in self.calls():
            hidden, _ = self.states.read(self.index, number)
            self.add(seen, path, number, self.input(self.block, path, hidden, arguments, chunk))
        return self.result(seen)

    def result(self, seen: Accumulator) -> Stats:
        """Of what all ranks saw."""
        for value, reduction in seen.state():
            value.copy_(self.ranks.total(value) if reduction == "sum" else self.ranks.largest(value))
        return seen.result()

    def add(self, seen: Accumulator, path: str, chunk: int, x: torch.Tensor) -> None:
        """Take in what a layer gets. Raises ActivationError naming it."""
        try:
            seen.add(x)
        except ActivationError as error:
            raise ActivationError(f"{self.name}.{path}, chunk {chunk}: {error.message}", error.hint) from error

    def start(self, layer: Layer, importance: torch.Tensor | None, w: torch.Tensor | None = None) -> QTensor:
        """Rounded to nearest, on the CPU, where the search is: the layer's weight, or `w` in its place."""
        importance = moved(importance, CPU) if importance is not None and bool(importance.any()) else None
        q = rounding.to_nearest(
            moved(self.weight(layer) if w is None else w, CPU), layer.planned.scheme, range_=self.job.recipe.range_,
            name=layer.tensor, importance=importance, source=layer.planned.source_dtype, threads=self.threads,
        )  # fmt: skip
        of_input = self.roundings.get(layer.path)
        return q if of_input is None else dataclasses.replace(q, input_scale=moved(of_input.scale, CPU))

    def weight(self, layer: Layer) -> torch.Tensor:
        """float32 [N, K], not quantized."""
        weight = self._exact[layer.path].weight()
        return weight.t().contiguous() if layer.planned.transposed else weight

    def hand_over(self, layer: Layer, start: QTensor, solved: Solved) -> None:
        """To all ranks: how the layer is rounded to nearest, and its solution, wherever that was found."""
        solved = dataclasses.replace(solved, q=moved(solved.q, CPU))
        self._here[layer.path] = start, solved
        if self.ranks.count > 1:
            self.states.write_part(layer.path, start, solved)

    def take(self, layer: Layer) -> tuple[QTensor, Solved]:
        """What some rank has handed over, once."""
        return self._here.pop(layer.path, None) or self.states.read_part(layer.path, layer.planned)

    def put(self, layer: Layer, w: QTensor | torch.Tensor) -> None:
        """In place of the layer's weight, [N, K]."""
        if isinstance(w, torch.Tensor) and layer.planned.transposed:
            w = w.t()
        self._block[layer.path].source = moved(w, self.device)

    def follow(self, path: str) -> None:
        """A parameter of the block is again what it is in the exact one."""
        layer = path.removesuffix(".weight")
        if layer in self._block and path != layer:
            self._block[layer].source = self._exact[layer].source
        else:
            self.block.get_parameter(path).copy_(self.exact.get_parameter(path))

    def own(self, paths: Collection[str]) -> None:
        """These parameters of the exact block will be written to: they are float32 and its own from now on."""
        for path, layer in self._exact.items():
            if f"{path}.weight" in paths:
                layer.own()


def _to_float(arguments: Any) -> Any:
    return tree_map(lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, arguments)
