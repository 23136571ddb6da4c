"""Transforms of a block before its layers are solved: factors are tried, and the ones with which the block does best
are moved into what makes the layers' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spicerack.algorithms.stats import Stats
from spicerack.algorithms.transforms import awq, smoothquant
from spicerack.machine.devices import CPU
from spicerack.numerics import codec
from spicerack.numerics.qtensor import moved
from spicerack.quantization.calibration import folding
from spicerack.quantization.calibration.block import Work
from spicerack.quantization.calibration.chunks import tokens
from spicerack.quantization.calibration.folding import Site
from spicerack.quantization.calibration.layers import Layer
from spicerack.quantization.calibration.static import on_trial

_TRANSFORMS = {"awq": awq, "smoothquant": smoothquant}
_TOKENS = 2048
"""On which candidates are judged, in sequences spread over the text."""
_SAME = 1e-3
"""How far a block's output may be off, relatively, once factors are moved: float32 arithmetic, and gains as stored."""


@dataclass
class Changes:
    """tensors: parameters beside the layers, by tensor, as they are stored now. events: what happened -> to which
    layers, as tensors."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    events: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, tensor: str) -> tuple[str, ...]:
        """What happened to a layer."""
        return tuple(event for event, tensors in self.events.items() if tensor in tensors)


def transform(work: Work) -> Changes:
    """Apply the recipe's transforms, in order, to both copies of the block."""
    changes = Changes()
    method = work.job.recipe.method
    names = [name for name in method.transforms if name in _TRANSFORMS] if method is not None else []
    if not names:
        return changes
    layers = {layer.path: layer for layer in work.layers}
    sites = list(folding.sites(work.exact, work.stack.model.config, layers))
    if not sites:
        changes.events[f"{'+'.join(names)}: no place to move factors to is known"] = tuple(x.key for x in work.layers)
        return changes
    judge = _Judge(work)
    for name in names:
        for site in sites:
            _one(work, name, site, [layers[reader] for reader in site.readers], judge, changes)
    return changes


def _one(work: Work, name: str, site: Site, layers: Sequence[Layer], judge: _Judge, changes: Changes) -> None:
    plugin = _TRANSFORMS[name]
    seen = work.stats(layers[0].path, ("second_moment", *plugin.NEEDS))
    if not seen.tokens:
        return
    largest = torch.stack([work.weight(layer).abs().amax(0) for layer in layers]).amax(0)
    ones = torch.ones(work.columns(layers[0].path), device=work.device)
    judge.look(layers)
    best, least = None, judge.loss(layers, ones, seen)
    for candidate in plugin.candidates(seen, largest):
        factors = moved(site.tied(moved(candidate, CPU)), work.device)  # a GPU may add in any order
        loss = judge.loss(layers, factors, seen)
        if loss < least:
            best, least = factors, loss
    if best is not None and not _moved(work, site, best, judge, changes):
        event = f"{name}: {site.source} left as it is, moving factors there would change the block"
        changes.events[event] = tuple(layer.key for layer in layers)


def _moved(work: Work, site: Site, factors: torch.Tensor, judge: _Judge, changes: Changes) -> bool:
    """Move them, unless that changes what the block computes."""
    touched = {f"{site.source}.bias", *(f"{path}.weight" for path in (site.source, *site.readers))}
    work.own(touched)
    before = {path: value.clone() for path, value in work.exact.named_parameters() if path in touched}
    dtype = work.types[f"{site.source}.weight"]
    _, changed = folding.move(work.exact, site, factors, dtype)
    if not set(changed) <= set(work.others) or judge.difference() > _SAME:
        for path, value in before.items():
            work.exact.get_parameter(path).copy_(value)
        return False
    for path in before:
        work.follow(path)
    stored = {work.others[path]: work.exact.get_parameter(path).to(work.types[path]) for path in changed}
    changes.tensors |= moved(stored, CPU)
    return True


class _Judge:
    """What the block makes of a few sequences as they reach it: before anything is quantized, and with candidates."""

    def __init__(self, work: Work) -> None:
        self.work = work
        count, length = work.text.calibration.ids.shape
        numbers = range(0, count, max(count * length // _TOKENS, 1))
        self.chunk, self.arguments = work.call(numbers)
        self.hidden = work.states.sequences(work.index, numbers)[0]
        self.wanted = self._run(work.exact)
        self.static: list[str] = []
        self.x = self.hidden

    def _run(self, block: torch.nn.Module) -> torch.Tensor:
        return tokens(self.work.run(block, self.hidden, self.arguments), self.chunk)

    def look(self, layers: Sequence[Layer]) -> None:
        """At what the static ones of these layers, which share an input, get, before they are judged."""
        roundings = self.work.roundings
        self.static = [layer.path for layer in layers if layer.path in roundings and roundings[layer.path].static]
        if self.static:
            self.x = self.work.input(self.work.block, self.static[0], self.hidden, self.arguments, self.chunk)

    def difference(self) -> float:
        """||out - wanted|| / ||wanted|| of the exact block, as it is now."""
        return self._agreed((self._run(self.work.exact) - self.wanted).norm() / self.wanted.norm().clamp(min=1e-30))

    def _agreed(self, value: torch.Tensor) -> float:
        """The same for all ranks, whose GPUs may differ in the last bit: what is chosen by it must not."""
        return float(self.work.ranks.largest(value))

    def loss(self, layers: Sequence[Layer], factors: torch.Tensor, seen: Stats) -> float:
        """Squared error of the output with these layers, and their activations, rounded behind `factors`."""
        work = self.work
        assert seen.second_moment is not None
        if self.static:
            scale = on_trial(work, self.static[0], self.x / factors)
            for path in self.static:
                work.roundings[path].scale = scale
        for layer in layers:
            q = work.start(layer, seen.second_moment / factors.square(), work.weight(layer) * factors)
            work.put(layer, codec.decode(moved(q, work.device)) / factors)
            if layer.path in work.roundings:
                work.roundings[layer.path].factors = factors
        error = self._run(work.block) - self.wanted
        for layer in layers:
            work.follow(f"{layer.path}.weight")
            if layer.path in work.roundings:
                work.roundings[layer.path].factors = work.roundings[layer.path].scale = None
        return self._agreed(error.square().sum(dtype=torch.float64))
