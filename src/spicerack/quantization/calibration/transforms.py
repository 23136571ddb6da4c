"""Transforms of a block before its layers are solved: factors are tried, and the ones with which the block does best
are moved into what makes the layers' inputs.

A trial rounds the layers that read one input to nearest, behind the factors, runs the quantized block on a few
sequences and compares what comes out with the exact block's. So a transform is judged by what rounding costs the block,
and not by a measure of its own; no factors at all are the first candidate. What wins is moved, in both copies of the
block, and the exact one is run once more: if it no longer computes the same, the family's list of places was wrong, or
the gains cannot be stored, and all is undone and said.

What is given up: places are decided one after the other, each with those before it moved and those behind it not, and
rounding to nearest stands for whatever solver comes later. A trial of every combination would cost their product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spicerack.algorithms import transform
from spicerack.algorithms.transform import Scaling
from spicerack.machine.devices import CPU
from spicerack.numerics import codec
from spicerack.numerics.qtensor import moved
from spicerack.quantization.calibration import folding
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.folding import Site
from spicerack.quantization.calibration.pair import Pair
from spicerack.quantization.calibration.static import on_trial
from spicerack.quantization.calibration.targets import Target
from spicerack.quantization.watch import Doing

_TOKENS = 2048
"""On which candidates are judged, in sequences spread over the text."""
_SAME = 1e-3
"""How far a block's output may be off, relatively, once factors are moved: float32 arithmetic, and gains as stored."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What transforms did to a block.

    tensors   parameters beside its targets, by tensor, as they are stored now
    events    what happened -> to which targets, by key
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    events: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def then(self, later: Changes) -> Changes:
        """These changes, and behind them later ones."""
        return Changes({**self.tensors, **later.tensors}, {**self.events, **later.events})

    def of(self, key: str) -> tuple[str, ...]:
        """What happened to a target."""
        return tuple(event for event, keys in self.events.items() if key in keys)


def apply(pair: Pair, flow: Flow, names: tuple[str, ...], observer: str | None, doing: Doing) -> Changes:
    """Apply a method's transforms of blocks, in order, to both copies of the block.

    names: of all the method's transforms. observer: finds the scales of static activations. doing: is
    told of each place where factors are tried.
    """
    scalings = transform.scalings(names)
    changes = Changes()
    if not scalings:
        return changes
    targets = {target.path: target for target in pair.targets}
    sites = list(folding.sites(pair.exact, flow.stack.model.config, targets))
    if not sites:
        event = f"{'+'.join(scalings)}: no place to move factors to is known"
        return Changes(events={event: tuple(target.key for target in pair.targets)})
    judge = _Judge(pair, flow, observer)
    for name, scaling in scalings.items():
        for number, site in enumerate(sites):
            doing(f"{name}: factors of {site.source}, {number + 1} of {len(sites)}", number / len(sites))
            readers = [targets[reader] for reader in site.readers]
            factors = _best(pair, flow, scaling, site, readers, judge)
            if factors is None:
                continue
            tensors = pair.move(site, factors, lambda: judge.difference() <= _SAME)
            event = f"{name}: {site.source} left as it is, moving factors there would change the block"
            undone = Changes(events={event: tuple(target.key for target in readers)})
            changes = changes.then(undone if tensors is None else Changes(tensors))
    return changes


def _best(
    pair: Pair, flow: Flow, scaling: Scaling, site: Site, readers: Sequence[Target], judge: _Judge
) -> torch.Tensor | None:
    """The factors [K] of a site, of the transform's candidates, with which the block's output is nearest.

    pair, flow   the block, and what runs through it
    scaling      the transform
    site         where its factors would go
    readers      the targets that read the site's output, one at least
    judge        runs the block with candidates

    None where that is without any, or where no token comes.
    """
    stats = flow.stats(pair.quantized, readers[0].path, ("second_moment", *scaling.needs))
    if not stats.tokens:
        return None
    assert stats.second_moment is not None
    largest = torch.stack([pair.weight(target).abs().amax(0) for target in readers]).amax(0)
    ones = torch.ones(pair.columns(readers[0].path), device=flow.device, dtype=torch.float32)
    x = judge.static_input(readers)
    best, least = None, judge.loss(readers, ones, stats.second_moment, x)
    for candidate in scaling.candidates(stats, largest):
        factors = moved(site.tied(moved(candidate, CPU)), flow.device)  # a GPU may add in any order
        loss = judge.loss(readers, factors, stats.second_moment, x)
        if loss < least:
            best, least = factors, loss
    return best


class _Judge:
    """What the block makes of a few sequences as they reach it: before anything is quantized, and with candidates."""

    def __init__(self, pair: Pair, flow: Flow, observer: str | None) -> None:
        self.pair, self.flow, self.observer = pair, flow, observer
        count, length = flow.text.calibration.ids.shape
        numbers = range(0, count, max(count * length // _TOKENS, 1))
        self.call = flow.call(numbers)
        self.hidden = flow.states.sequences(flow.index, numbers)[0]
        self.target = self._run(pair.exact)

    def _run(self, block: torch.nn.Module) -> torch.Tensor:
        """What a copy of the block makes of the sequences, [tokens, H]."""
        return self.call.tokens(self.flow.run(block, self.hidden, self.call))

    def static_input(self, readers: Sequence[Target]) -> torch.Tensor | None:
        """What the static ones of these targets, which share an input, get, [tokens, K]; None if none is static."""
        static = self.pair.static(target.path for target in readers)
        return self.flow.input(self.pair.quantized, static[0], self.hidden, self.call) if static else None

    def difference(self) -> float:
        """||out - target|| / ||target|| of the exact block, as it is now."""
        # a block that makes zeros is the same as itself: 0 / 0 would compare as changed
        return self._agreed((self._run(self.pair.exact) - self.target).norm() / self.target.norm().clamp(min=1e-30))

    def _agreed(self, value: torch.Tensor) -> float:
        """The same for all ranks, whose GPUs may differ in the last bit: what is chosen by it must not."""
        return float(self.flow.ranks.largest(value))

    def loss(
        self, readers: Sequence[Target], factors: torch.Tensor, second_moment: torch.Tensor, x: torch.Tensor | None
    ) -> float:
        """Squared error of the output with these targets, and their activations, rounded behind factors [K].

        second_moment: of their inputs, [K]. x: of `static_input`.
        """
        pair = self.pair
        scale = None
        if x is not None:
            static = pair.static(target.path for target in readers)
            scale = on_trial(pair, static[0], x / factors, self.observer)
        with pair.trial(readers, factors, scale):
            for target in readers:
                q = pair.nearest(target, second_moment / factors.square(), pair.weight(target) * factors)
                pair.put(target, codec.decode(moved(q, pair.device)) / factors)
            error = self._run(pair.quantized) - self.target
        return self._agreed(error.square().sum(dtype=torch.float64))
