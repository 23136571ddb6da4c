"""`Observer`: what finds the range of static int8 activations, one scale for all inputs of a layer; observers by name.

    scale = T / 127,  codes -127 ... 127,  code 0 is exactly 0

A file in `observers/` says what T is, the largest magnitude that still has a code of its own, and declares OBSERVER: a
class, or a function without arguments, that begins to observe one layer. What it keeps does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from spicerack import plugins
from spicerack.errors import ActivationError
from spicerack.machine.ranks import Ranks
from spicerack.numerics.scales import SMALLEST

LARGEST_CODE = 127
"""The range of codes is symmetric, as kernels want it: -128 is not used."""

_FOLDER = "quantization.calibration.observers"


class Observer(Protocol):
    """Sees a layer's inputs, then tells their scale.

    in_order: it has to see all of them, and in the order of the text; of others, several ranks may each see some.
    """

    @property
    def in_order(self) -> bool:
        """Whether it has to see all inputs, in the order of the text: then no rank can see a part for it."""

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take in x [..., K]; mask [...]: 0 where a token is padding.

        Raises ActivationError for a value that is not finite, with its token and column.
        """

    def share(self, ranks: Ranks) -> None:
        """Take in what the other ranks saw, unless it sees all in order."""

    def scale(self) -> float:
        """What a code counts for; 1 if all was zero. Raises ActivationError if there was no token."""


def names() -> tuple[str, ...]:
    """Names of all observers, sorted; none is imported."""
    return plugins.names(_FOLDER)


def begin(name: str) -> Observer:
    """A new observer of this name, which has seen nothing. Raises KeyError if there is no such file."""
    make: Callable[[], Observer] = plugins.get(_FOLDER, name, "OBSERVER")
    return make()


def scale_for(largest: float | None) -> float:
    """The scale, T / 127, for T = `largest`; 1 for T = 0, and never too small to be divided by.

    Raises ActivationError for None: there was no token.
    """
    if largest is None:
        raise ActivationError("the layer has seen no token", "calibrate with more text, or use dynamic activations")
    return max(largest / LARGEST_CODE, SMALLEST) if largest else 1.0
