"""How much what a model says minds an error in each output of each layer: one pass forwards and one backwards.

    F_o = sum over tokens of (d l / d y_o)^2, divided by the number of tokens

y are the outputs of a linear layer, l = -log p(label) for labels that are drawn from the model's own predictions, so
that F is the diagonal of the Fisher information in y: an error e in y, of its own for each token, costs about
1/2 sum_o F_o e_o^2 nats of KL per token. For an encoder l is a random direction times the unit vector of a sentence,
and the sum is over sentences: an error then costs as much of 1 - cosine.

How it works. Hidden states in front of every block lie on disk; the model's own code makes what is behind the last
block; then blocks run once more, in reverse, each alone and in float32, and hand the gradient down. So one block is in
memory at a time, and no gradient of a weight is made. A few thousand tokens rank layers as well as all of a text does:
on the project's model this one pass chose mixes as good as those by 96 measured swaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from spicerack.evaluation.encoder import Pooling, pool
from spicerack.machine.memory import steady
from spicerack.machine.ranks import ALONE
from spicerack.models.blocks.stack import Inputs, Stack
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.states import States
from spicerack.quantization.calibration.targets import BlockTensors
from spicerack.quantization.calibration.weights import float_copy
from spicerack.text.calibration import Calibration

TOKENS = 4096
"""Of the calibration text, which is its first sequences: 2,560 chose as well as measuring every swap did."""
_CHUNK = 512
"""Tokens that run through a block at once, one sequence at least: all of a block's activations are kept for the way
back."""

Fisher = dict[str, torch.Tensor]
"""Path of a layer in its block -> F, float32 [N]; layers that no token reached are not in it."""


def fisher(
    stack: Stack,
    tensors: Sequence[BlockTensors],
    calibration: Calibration,
    folder: Path,
    device: torch.device,
    pooling: Pooling | None,
    doing: Callable[[str, float], None],
) -> list[Fisher]:
    """F of every layer that is a target, for each block of the stack.

    stack        the model's blocks, their weights as they are in the float model
    tensors      what is a target in each
    calibration  the text; its beginning is used
    folder       where hidden states lie; what is written there is removed again
    device       where blocks compute
    pooling      how an encoder makes one vector of a sentence; None for a decoder
    doing        is told of each block

    Raises UsageError as `Stack.behind` does.
    """
    length = calibration.ids.shape[1]
    count = max(TOKENS // length, 1)
    mask = None if calibration.mask is None else calibration.mask[:count]
    text = Text(replace(calibration, ids=calibration.ids[:count], mask=mask), max(_CHUNK // length, 1))
    states = States(folder, text.rows, device)
    flows = [Flow(stack, i, text, states, ALONE) for i in range(len(stack.blocks))]
    steps = 2 * len(flows) + 1
    for number, sequences in text.chunks(ALONE):
        hidden = stack.calls(text.inputs(sequences))[0].float()
        states.write(0, number, hidden, hidden)
    for flow in flows:
        doing(f"sensitivity: {flow.name}, forwards", flow.index / steps)
        _forward(flow)
    total = 0
    for number, sequences in steady(text.chunks(ALONE)):
        doing("sensitivity: what the model says", len(flows) / steps)
        total += _begin(stack, states, text.inputs(sequences), number, pooling)
    found: list[Fisher] = []
    for flow in reversed(flows):
        doing(f"sensitivity: {flow.name}, backwards", (steps - flow.index - 1) / steps)
        found.append(_backward(flow, tensors[flow.index], total))
        states.drop(flow.index + 1)
    states.drop(0)
    return found[::-1]


@torch.no_grad()
def _forward(flow: Flow) -> None:
    """Keep what a block makes of every chunk."""
    block, _ = float_copy(flow.stack.blocks[flow.index], flow.device)
    for call in flow.calls():
        out = flow.run(block, flow.hidden(call)[1], call)
        flow.keep(call, out, out)


def _begin(stack: Stack, states: States, inputs: Inputs, number: int, pooling: Pooling | None) -> int:
    """Put the gradient behind the last block in the place of quantized hidden states -> how many tokens, or sentences,
    it is of."""
    hidden = states.read(len(stack.blocks), number)[1].to(stack.model.device).requires_grad_()
    generator = torch.Generator().manual_seed(number)
    with torch.enable_grad():
        output = stack.behind(inputs, hidden, head=pooling is None)
        loss, count = (
            _by_labels(output.logits, generator) if pooling is None else _by_vectors(output, inputs, pooling, generator)
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
    states.write(len(stack.blocks), number, gradient, hidden.detach())
    return count


def _by_labels(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """-log of the probability of labels that are drawn from the model's own predictions, summed; and how many."""
    rows = logits.flatten(0, -2).float()
    labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
    return functional.cross_entropy(rows, labels, reduction="sum"), len(rows)


def _by_vectors(output: Any, inputs: Inputs, pooling: Pooling, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A random direction times the unit vector of each sentence, summed; and how many sentences."""
    hidden = output.last_hidden_state.float()
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device))
    vectors = functional.normalize(pool(hidden, mask.to(hidden.device), pooling), dim=-1)
    directions = torch.randn(vectors.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (vectors * directions.to(vectors.device)).sum(), len(vectors)


def _backward(flow: Flow, tensors: BlockTensors, total: int) -> Fisher:
    """F of a block's targets; the gradient in front of the block is left for the one before."""
    block, _ = float_copy(flow.stack.blocks[flow.index], flow.device)
    sums: Fisher = {}

    def add(path: str, gradient: torch.Tensor) -> None:
        squares = gradient.detach().flatten(0, -2).float().square().sum(0).cpu()
        sums[path] = sums[path] + squares if path in sums else squares

    def watch(path: str) -> Callable[..., None]:
        def look(_layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: add(path, gradient))

        return look

    with ExitStack() as hooks, torch.enable_grad():
        for target in tensors.targets:
            hooks.callback(block.get_submodule(target.path).register_forward_hook(watch(target.path)).remove)
        for call in flow.calls():
            hidden = flow.hidden(call)[1].requires_grad_()
            out = flow.run(block, hidden, call)
            (gradient,) = torch.autograd.grad(out, hidden, flow.results(call)[0])
            flow.states.write(flow.index, call.number, gradient, hidden.detach())
    return {path: squares / total for path, squares in sums.items()}
