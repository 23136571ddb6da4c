"""`Transform`: all that a file in `transforms/` says of itself in its one constant, TRANSFORM, and transforms by name.

A transform changes the float model so that it computes what it did, and its weights are easier to round. There are two
kinds of them:

    Scaling    columns of weights times factors, and what makes their inputs divided by the same; block by block, where
               the family's structure allows it, with the factors for which the rounded block does best
    Rotation   the residual stream of the whole model times an orthogonal matrix, before any block is looked at
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from spicerack import plugins
from spicerack.algorithms.stats import Need, Stats

Memory = Callable[[int, int], int]
"""Weights of a block, and bytes of one as the checkpoint stores it -> bytes that its transformed weights take in memory
while the block is at work; weights that are not transformed are mapped from their files, and take none."""

_FOLDER = "algorithms.transforms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """A transform that moves a factor for each input channel of some layers into what makes their inputs.

    candidates   statistics of the inputs, and max |W_:j| over all layers that read them, float32 [K] -> factors that
                 are worth a trial, float32 [K]; no factors at all are tried anyway
    needs        statistics of the layers' inputs that `candidates` asks for
    memory       what a block's scaled weights take

    Several of one method share one copy of the block's weights, and so the most memory that one of them takes.
    """

    candidates: Callable[[Stats, torch.Tensor], Iterator[torch.Tensor]]
    needs: tuple[Need, ...]
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A transform of the whole model, which comes first in a method, needs no calibration text, and moves no factors.

    rotate   x [..., n] -> x R, float32, for the same orthogonal R [n, n] each time
    memory   what a block's rotated weights take
    """

    rotate: Callable[[torch.Tensor], torch.Tensor]
    memory: Memory


Transform = Scaling | Rotation


def names() -> tuple[str, ...]:
    """Names of all transforms, sorted; none is imported."""
    return plugins.names(_FOLDER)


def get(name: str) -> Transform:
    """The transform of this name. Raises KeyError if there is no such file."""
    transform = plugins.get(_FOLDER, name, "TRANSFORM")
    assert isinstance(transform, Scaling | Rotation)
    return transform


def scalings(names: tuple[str, ...]) -> dict[str, Scaling]:
    """Those of the named transforms that work on blocks, in the same order."""
    named = {name: get(name) for name in names}
    return {name: transform for name, transform in named.items() if isinstance(transform, Scaling)}
