"""What every unit loses in every scheme, estimated: Fisher information of outputs, gram of inputs, error of codes.

    loss = sum over tensors of 1/2 sum_o F_o (dW H dW^T)_oo,     dW = decoded codes - W,   H = mean x x^T

The codes are those of the method's own solver, given the same H as it would have in a run, so that what it makes up for
is not counted as lost; learners are judged by the solver that they begin with. Inputs are those of the float model:
what errors of earlier layers do to later ones is left to the rounds, which measure it.

How it works. The calibration text runs through the float model once more, block by block as when it is calibrated; a
block that is done is a file, so that a run that is killed goes on behind it. Everything else about a unit is known from
headers.

What is given up. Errors of outputs are taken for independent, and of layers, too: sums of single losses are a few per
cent to a third too low, by a factor that hardly depends on the mix. The order of schemes and units, which is all that a
mix is chosen by, is not touched by a common factor, and rounds put it right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from spicerack.algorithms import solver as solvers
from spicerack.machine.memory import steady
from spicerack.machine.ranks import ALONE
from spicerack.models.blocks.stack import Stack
from spicerack.numerics import codec
from spicerack.numerics.qtensor import moved
from spicerack.numerics.scheme import Scheme
from spicerack.planning.mix.fisher import Fisher
from spicerack.planning.mix.units import Choice
from spicerack.quantization.calibration.chunks import Text
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.inputs import Moments, moments, rounds, stages
from spicerack.quantization.calibration.pair import Pair
from spicerack.quantization.calibration.states import States
from spicerack.quantization.calibration.targets import BlockTensors, Target
from spicerack.quantization.job import Job
from spicerack.quantization.watch import Watch, Working
from spicerack.storage.durable import json_bytes, read_json, write_atomically

Losses = dict[str, dict[str, float]]
"""Tensor -> scheme -> loss; of a tensor of all experts, the sum over them."""


def estimate(
    job: Job,
    stack: Stack,
    tensors: Sequence[BlockTensors],
    units: Sequence[Choice],
    fishers: Sequence[Fisher],
    text: Text,
    folder: Path,
    device: torch.device,
    threads: int,
    watch: Watch,
) -> Losses:
    """Losses of all tensors of units, in the schemes of their unit.

    job       a listing of what would be quantized; its recipe has the method
    stack     the float model's blocks
    tensors   what is a target in each
    units     what has a choice
    fishers   for each block, see `fisher`
    text      the calibration text, in chunks
    folder    where finished blocks and hidden states lie; what is there is continued
    device    where blocks compute
    threads   of the CPU, for rounding
    watch     told of each block, and asked behind it whether to raise KeyboardInterrupt there

    Raises ActivationError naming block, layer and token.
    """
    schemes = {tensor: unit.schemes for unit in units for tensor in unit.tensors}
    states = States(folder, text.rows, device)
    files = [folder / f"losses-{i:05d}.json" for i in range(len(stack.blocks))]
    done = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    if done == 0:
        for number, sequences in text.chunks(ALONE):
            hidden = stack.calls(text.inputs(sequences))[0].float()
            states.write(0, number, hidden, hidden)
    for i in steady(range(done, len(files))):
        mine = tuple(target for target in tensors[i].targets if target.tensor in schemes)
        tensors_here = dataclasses.replace(tensors[i], targets=mine)
        pair = Pair(stack.blocks[i], tensors_here, job.source, device, job.recipe.range_, threads)
        flow = Flow(stack, i, text, states, ALONE)
        at = _Place(watch, i, len(files))
        losses = _of_block(pair, flow, schemes, fishers[i], job, at)
        with torch.no_grad():
            for call in flow.calls():
                out = flow.run(pair.exact, flow.hidden(call)[1], call)
                flow.keep(call, out, out)
        write_atomically(files[i], json_bytes(losses))
        states.drop(i)
        if watch.stopping():
            raise KeyboardInterrupt
    return _added([read_json(file) for file in files])


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Who is told of what is done in a block, and which that is."""

    watch: Watch
    number: int
    count: int

    def tell(self, what: str, share: float) -> None:
        """Something begins."""
        self.watch.working(Working(self.number, self.count, what, share))


@torch.no_grad()
def _of_block(
    pair: Pair, flow: Flow, schemes: Mapping[str, Sequence[Scheme]], fisher: Fisher, job: Job, at: _Place
) -> Losses:
    """Losses of a block's tensors."""
    assert job.recipe.method is not None, "decided before work starts"
    solver = solvers.opening_name(job.recipe.method.solver)
    by_path = {target.path: target for target in pair.targets}
    losses: Losses = {}
    for part in (part for stage in stages(pair, flow) for part in rounds(pair, stage)):
        known = moments(pair, flow, part)
        for path, inputs in [(path, readers) for readers in part for path in readers]:
            at.tell(f"what {path} loses", len(losses) / len(by_path))
            target = by_path[path]
            one = _of_target(pair, target, schemes[target.tensor], known[inputs], fisher.get(path), solver)
            sums = losses.setdefault(target.tensor, dict.fromkeys(one, 0.0))
            for scheme, loss in one.items():
                sums[scheme] += loss
    for target in pair.targets:  # what no token reaches loses nothing that anybody would see
        losses.setdefault(target.tensor, {scheme.name: 0.0 for scheme in schemes[target.tensor]})
    return losses


def _of_target(
    pair: Pair, target: Target, schemes: Sequence[Scheme], known: Moments, fisher: torch.Tensor | None, solver: str
) -> dict[str, float]:
    """Scheme -> loss of one matrix."""
    if fisher is None:
        return {scheme.name: 0.0 for scheme in schemes}
    w, importance = pair.weight(target), known.importance
    weights = moved(fisher, pair.device).double()
    losses = {}
    for scheme in schemes:
        tried = dataclasses.replace(target, stored=dataclasses.replace(target.stored, scheme=scheme))
        start = pair.nearest(tried, importance)
        q = solvers.solve_weight(solver, w, moved(start, pair.device), known.gram).q
        wrong = codec.decode(q).to(w.device) - w
        squares = (wrong.square() @ importance) if known.gram is None else ((wrong @ known.gram) * wrong).sum(1)
        losses[scheme.name] = 0.5 * float(squares.clamp_min(0).double() @ weights)
    return losses


def _added(blocks: Sequence[Losses]) -> Losses:
    """All blocks' together; a tensor that lies in several is added up."""
    losses: Losses = {}
    for block in blocks:
        for tensor, one in block.items():
            before = losses.get(tensor, {})
            losses[tensor] = {scheme: before.get(scheme, 0.0) + loss for scheme, loss in one.items()}
    return losses
