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
from spicerack.models.blocks.look import shared_inputs, watched
from spicerack.quantization.calibration.flow import Flow
from spicerack.quantization.calibration.pair import Pair
from spicerack.quantization.memory import STATISTICS

Readers = tuple[str, ...]
"""Paths of layers that read one input."""

FEW = 0.25
"""Tokens of a column below which an expert has too few: its gram would have a rank of a quarter of its columns or
less."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What is known of the inputs of layers that read one: x what they get now, x' in the float model.

    gram        H = mean x x^T, float32 [K, K]; None where there are too few tokens
    shift       C = mean (x' - x) x^T, float [K, K]; None where the float model calls the layers with other rows, so
                that nothing can be compared
    importance  what is known of the columns, [K]: the gram's diagonal, or that of all experts
    events      what was done about too few tokens
    """

    gram: torch.Tensor | None
    shift: torch.Tensor | None
    importance: torch.Tensor
    events: tuple[str, ...] = ()

    def pull(self, w: torch.Tensor) -> torch.Tensor | None:
        """W C, float32 [N, K], for a weight W [N, K]."""
        return None if self.shift is None else w @ self.shift.to(w.dtype)


# ---- who goes together -----------------------------------------------------------------------------------------------


def stages(pair: Pair, flow: Flow) -> list[list[Readers]]:
    """All targets that the text reaches, by the inputs that they read, in the order of their calls.

    Those of one stage do not wait for each other. The exact block is run chunk by chunk until all were called.
    """
    missing = {target.path for target in pair.targets}
    stacks = _stacks(pair)
    order: list[list[Readers]] = []
    for call in flow.calls(ALONE):
        if not missing:
            break
        called: list[tuple[str, torch.Tensor]] = []
        with watched(pair.exact, sorted(missing), called.append):
            flow.run(pair.exact, flow.hidden(call)[1], call)
        for readers in shared_inputs([(path, x) for path, x in called if len(x)]):
            if readers[0] in missing:
                stage = stacks.get(readers[0], [readers])
                order.append(stage)
                missing.difference_update(*stage)
    return order


def _stacks(pair: Pair) -> dict[str, list[Readers]]:
    """For each layer of an expert the stage that its stack is: the layers of each expert, which read its tokens."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for target in pair.targets:
        if target.stack:
            stacks.setdefault(target.stack, {}).setdefault(target.expert, []).append(target.path)
    stages = ([tuple(paths) for paths in experts.values()] for experts in stacks.values())
    return {path: stage for stage in stages for readers in stage for path in readers}


def rounds(pair: Pair, stage: Sequence[Readers]) -> Iterator[list[Readers]]:
    """A stage in parts whose statistics fit in STATISTICS bytes, or which are the readers of a single input."""
    part: list[Readers] = []
    nbytes = 0
    for readers in stage:
        needed = 8 * pair.columns(readers[0]) ** 2
        if part and nbytes + needed > STATISTICS:
            yield part
            part, nbytes = [], 0
        part.append(readers)
        nbytes += needed
    yield part


# ---- moments ---------------------------------------------------------------------------------------------------------


def moments(pair: Pair, flow: Flow, part: Sequence[Readers]) -> dict[Readers, Moments]:
    """The moments of inputs of one stage, over the whole text. Raises ActivationError naming block, layer and chunk."""
    if any(target.stack for target in pair.targets if target.path == part[0][0]):
        return _of_experts(pair, flow, part)
    return {readers: _of_layers(pair, flow, readers[0]) for readers in part}


def _of_layers(pair: Pair, flow: Flow, path: str) -> Moments:
    """The moments of layers that share the inputs of the one at `path`, which every token reaches."""
    accumulator = Accumulator(["gram"], pair.columns(path), device=flow.device)
    shift = products(accumulator.columns, flow.device)
    comparable = True
    for call in flow.calls():
        quantized, exact = flow.hidden(call)
        x = flow.input(pair.quantized, path, quantized, call)
        before = flow.input(pair.exact, path, exact, call)
        comparable &= x.shape == before.shape
        flow.collect(accumulator, path, call, x)
        if comparable:
            for some, difference in zip(x.split(CHUNK), (before - x).split(CHUNK), strict=True):
                add_product(shift, difference, some)
    stats = flow.total(accumulator)
    shift = flow.ranks.total(shift)
    apart = bool(flow.ranks.largest(torch.tensor(not comparable, dtype=torch.bool, device="cpu")))
    assert stats.gram is not None
    return Moments(stats.gram, None if apart or not stats.tokens else shift.div_(stats.tokens), stats.gram.diagonal())


def _of_experts(pair: Pair, flow: Flow, part: Sequence[Readers]) -> dict[Readers, Moments]:
    """The moments of experts of one stack; without shifts: the float model's router sends an expert other tokens."""
    paths = [readers[0] for readers in part]
    accumulators = {path: Accumulator(["gram"], pair.columns(path), device=flow.device) for path in paths}
    for call in flow.calls():
        for path, x in flow.inputs(pair.quantized, paths, flow.hidden(call)[0], call).items():
            routed = x[x.any(1)]  # Llama 4 sends all tokens to all experts, most as zeros
            flow.collect(accumulators[path], path, call, routed)
    counts = {path: int(flow.ranks.total(accumulators[path].count.clone())) for path in paths}
    few = [path for path, count in counts.items() if count < FEW * pair.columns(path)]
    shown = _show(pair, flow, few, accumulators) if few else {}
    stats = {path: flow.total(accumulator) for path, accumulator in accumulators.items()}
    pooled = torch.zeros(pair.columns(paths[0]), device=flow.device, dtype=torch.float32)
    for path, count in counts.items():
        gram = stats[path].gram
        assert gram is not None
        pooled += gram.diagonal() * (count / max(sum(counts.values()), 1))
    return {
        readers: _of_expert(stats[path].gram, pooled, counts[path], shown.get(path))
        for readers, path in zip(part, paths, strict=True)
    }


def _of_expert(gram: torch.Tensor | None, pooled: torch.Tensor, count: int, shown: int | None) -> Moments:
    """The moments of one expert, whom the router sent `count` tokens.

    gram: of all that it saw. pooled: second moments of what all experts got, [K]. shown: how many tokens it was shown
    besides, because its own were too few; None: they were enough.
    """
    assert gram is not None
    if shown is None:
        return Moments(gram, None, gram.diagonal())
    if shown:
        event = f"{count} tokens of its own: solved with {shown} more that were sent elsewhere"
        return Moments(gram, None, gram.diagonal(), (event,))
    event = f"{count} tokens: rounded to nearest, weighted by what all experts get"
    return Moments(None, None, pooled, (event,))


def _show(pair: Pair, flow: Flow, paths: Sequence[str], accumulators: Mapping[str, Accumulator]) -> dict[str, int]:
    """Show these experts' layers tokens that are sent to each of them, whatever the router says; how many, by path."""
    spread = {x: -(-pair.columns(x.path) // flow.text.count) for x in pair.targets if x.path in paths}
    before = {path: int(accumulators[path].count) for path in paths}
    for call in flow.calls():
        for target, x in flow.routed(pair.quantized, spread, flow.hidden(call)[0], call).items():
            flow.collect(accumulators[target.path], target.path, call, x)
    return {path: int(flow.ranks.total(accumulators[path].count - before[path])) for path in paths}
