"""Which sequences are learned from, and which judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from descents import linear_case

from spicerack.algorithms.solvers import blockap, signround
from spicerack.numerics import codec

SOLVERS = [signround.solve, blockap.solve]


@pytest.mark.parametrize("solve", SOLVERS)
def test_sequences_that_judge_are_not_learned_from(solve: Any) -> None:
    _, layer, forward, _ = linear_case("w3g8")
    learned: set[int] = set()
    judged: set[int] = set()

    def watched(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        (learned if torch.is_grad_enabled() else judged).update(numbers)
        return forward(numbers)

    with torch.no_grad():
        solve({"layer": layer}, watched, 16, steps=40)
    assert judged == {0, 10} and learned and not learned & judged


@pytest.mark.parametrize("solve", SOLVERS)
def test_what_is_learned_by_heart_is_not_kept(solve: Any) -> None:
    """The sequences that judge want exactly what there is at the beginning, and all others something else."""
    module, layer, forward, x = linear_case("w3g8")
    start = layer.start

    def torn(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = codec.decode(start) if numbers[0] % 10 == 0 else -layer.weight
        return forward(numbers)[0], x[list(numbers)].flatten(0, 1) @ wanted.t() + module.bias

    with torch.no_grad():
        q = solve({"layer": layer}, torn, 16, steps=40)["layer"].q
    assert torch.equal(q.codes, start.codes) and torch.equal(q.plain_scale, start.plain_scale)
