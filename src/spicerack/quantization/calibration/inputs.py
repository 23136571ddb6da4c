"""What the layers of a block get: in which order they run, how much of the text reaches them, and its moments.

Experts of a mixture do not wait for each other, so those of one stack go together. The router sends each of them a part
of the text; one that gets fewer tokens than a quarter of its columns is also shown some that went elsewhere, as many as
it has columns, spread over the text. Where the family's code cannot be asked for that, it is rounded to nearest,
weighted by the second moments of all experts of its stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from spicerack.algorithms.stats import CHUNK, Accumulator, add_product, products
from spicerack.machine.ranks import ALONE
from spicerack.models import blocks
from spicerack.quantization.calibration.block import Work
from spicerack.quantization.memory import STATISTICS

Group = tuple[str, ...]
"""Paths of layers that share an input."""

FEW = 0.25
"""Tokens of a column below which an expert has too few."""


@dataclass(slots=True)
class Moments:
    """mean x x^T, and mean (x' - x) x^T, [K, K]: x what a layer gets now, x' in the float model.

    shift: None where the float model calls the layer with other rows, so that nothing can be compared. gram: None where
    there are too few tokens; importance, [K], is then what is known of the columns. events: what was done about that.
    """

    gram: torch.Tensor | None
    shift: torch.Tensor | None
    importance: torch.Tensor
    events: tuple[str, ...] = ()

    def pull(self, w: torch.Tensor) -> torch.Tensor | None:
        """W shift, float32 [N, K], for a weight W [N, K]."""
        return None if self.shift is None else w @ self.shift.to(w.dtype)


def stages(work: Work) -> list[list[Group]]:
    """All layers that the text reaches, in the order of their calls; groups of a stage do not wait for each other."""
    missing = {layer.path for layer in work.layers}
    stacks = _stacks(work)
    found: list[list[Group]] = []
    for number, _, arguments in work.calls(ALONE):
        if not missing:
            break
        seen: list[tuple[str, torch.Tensor]] = []
        with blocks.watched(work.exact, sorted(missing), seen.append):
            work.run(work.exact, work.states.read(work.index, number)[1], arguments)
        for group in blocks.shared_inputs([(path, x) for path, x in seen if len(x)]):
            if group[0] in missing:
                stage = stacks.get(group[0], [group])
                found.append(stage)
                missing.difference_update(*stage)
    return found


def _stacks(work: Work) -> dict[str, list[Group]]:
    """For each layer of an expert the groups of its stack: the layers of one expert."""
    found: dict[str, dict[str, list[str]]] = {}
    for layer in work.layers:
        if layer.stack:
            found.setdefault(layer.stack, {}).setdefault(layer.expert, []).append(layer.path)
    stages = ([tuple(paths) for paths in experts.values()] for experts in found.values())
    return {path: stage for stage in stages for group in stage for path in group}


def rounds(work: Work, stage: Sequence[Group]) -> Iterator[list[Group]]:
    """The stage, in parts whose statistics fit in memory."""
    part: list[Group] = []
    nbytes = 0
    for group in stage:
        needed = 8 * work.columns(group[0]) ** 2
        if part and nbytes + needed > STATISTICS:
            yield part
            part, nbytes = [], 0
        part.append(group)
        nbytes += needed
    yield part


def moments(work: Work, groups: Sequence[Group]) -> dict[Group, Moments]:
    """Of groups of one stage, over the whole text. Raises ActivationError."""
    if any(layer.stack for layer in work.layers if layer.path == groups[0][0]):
        return _of_experts(work, groups)
    return {group: _of_layers(work, group[0]) for group in groups}


def _of_layers(work: Work, path: str) -> Moments:
    seen = Accumulator(["gram"], work.columns(path), device=work.device)
    shift = products(seen.columns, work.device)
    comparable = True
    for number, chunk, arguments in work.calls():
        quantized, exact = work.states.read(work.index, number)
        x = work.input(work.block, path, quantized, arguments, chunk)
        before = work.input(work.exact, path, exact, arguments, chunk)
        comparable &= x.shape == before.shape
        work.add(seen, path, number, x)
        if comparable:
            for now, moved in zip(x.split(CHUNK), (before - x).split(CHUNK), strict=True):
                add_product(shift, moved, now)
    found = work.result(seen)
    shift = work.ranks.total(shift)
    apart = bool(work.ranks.largest(torch.tensor(not comparable)))
    assert found.gram is not None
    return Moments(found.gram, None if apart or not found.tokens else shift.div_(found.tokens), found.gram.diagonal())


def _of_experts(work: Work, groups: Sequence[Group]) -> dict[Group, Moments]:
    """Without shifts: the float model's router sends an expert other tokens."""
    paths = [group[0] for group in groups]
    seen = {path: Accumulator(["gram"], work.columns(path), device=work.device) for path in paths}
    for number, chunk, arguments in work.calls():
        hidden, _ = work.states.read(work.index, number)
        for path, x in work.inputs(work.block, paths, hidden, arguments, chunk).items():
            work.add(seen[path], path, number, x[x.any(1)])  # Llama 4 sends all tokens to all experts, most as zeros
    counts = {path: int(work.ranks.total(seen[path].count.clone())) for path in paths}
    few = [path for path, count in counts.items() if count < FEW * work.columns(path)]
    shown = _shown(work, few, seen) if few else {}
    found = {path: work.result(one) for path, one in seen.items()}
    pooled = torch.zeros(work.columns(paths[0]), device=work.device)
    for path, count in counts.items():
        gram = found[path].gram
        assert gram is not None
        pooled += gram.diagonal() * (count / max(sum(counts.values()), 1))
    return {group: _expert(group[0], found[group[0]].gram, counts, shown, few, pooled) for group in groups}


def _expert(
    path: str,
    gram: torch.Tensor | None,
    counts: Mapping[str, int],
    shown: Mapping[str, int],
    few: Sequence[str],
    pooled: torch.Tensor,
) -> Moments:
    assert gram is not None
    if path not in few:
        return Moments(gram, None, gram.diagonal())
    if shown[path]:
        event = f"{counts[path]} tokens of its own: solved with {shown[path]} more that were sent elsewhere"
        return Moments(gram, None, gram.diagonal(), (event,))
    event = f"{counts[path]} tokens: rounded to nearest, weighted by what all experts get"
    return Moments(None, None, pooled, (event,))


def _shown(work: Work, paths: Sequence[str], seen: Mapping[str, Accumulator]) -> dict[str, int]:
    """Let these experts' layers see tokens that are sent to each of them, whatever the router says -> how many."""
    spread = {x: -(-work.columns(x.path) // work.text.count) for x in work.layers if x.path in paths}
    before = {path: int(seen[path].count) for path in paths}
    for number, chunk, arguments in work.calls():
        hidden, _ = work.states.read(work.index, number)
        for layer, x in work.routed(spread, hidden, arguments, chunk).items():
            work.add(seen[layer.path], layer.path, number, x)
    return {path: int(work.ranks.total(seen[path].count - before[path])) for path in paths}
