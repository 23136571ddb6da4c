"""`Watch`: whoever looks on while a folder is quantized, and may ask for an end; and the reports that it is given.

One object with a method for each instead of as many callbacks through every stage: a stage that has something new to
tell gets a method here that does nothing by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Doing = Callable[[str, float], None]
"""Called with what is being done inside a block, for people, and the share of the work that is done, 0 to 1."""


def within(doing: Doing, begin: float, end: float) -> Doing:
    """Who is told of a part of the work, from the share `begin` of all of it to `end`."""
    return lambda what, share: doing(what, begin + share * (end - begin))


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of the model's first blocks, which were quantized, written and loaded again before the rest was.

    blocks      how many were tried
    count       how many the model has
    difference  ||loaded - computed|| / ||computed||, of the loaded folder's output and what was computed while it was
                quantized: 0 but for roundings of activations that fall the other way
    error       the same of the computed output and the float model's
    seconds     what the trial took
    solver      that the first block was timed with: the method's, or the one that it starts from
    expected    seconds that the whole run takes with this solver; None where that could not be timed
    rounded     the same, were layers only rounded to nearest, without text
    """

    blocks: int
    count: int
    difference: float
    error: float
    seconds: float
    solver: str
    expected: float | None
    rounded: float


@dataclass(frozen=True, slots=True)
class Working:
    """A moment inside a block that is being calibrated.

    number, count  which block it is, from 0 on, and how many there are
    doing          for people: "solving mlp.up_proj, 3 of 7", "learning, step 40 of 200"
    share          of the block's work that is done, 0 to 1, by what its parts usually take
    """

    number: int
    count: int
    doing: str
    share: float


@dataclass(frozen=True, slots=True)
class Finished:
    """One calibrated block of the model, whose file is on disk.

    block           its path in the model
    number, count   which it is, from 0 on, and how many there are
    layers          how many of its layers have codes now
    bits            of a quantized weight, scales and zero points included
    rounded         the error below, were its layers only rounded to nearest; estimated from the first chunk of text
    error           ||out - out_float|| / ||out_float|| of its hidden states against the float model's, what earlier
                    blocks lost included
    seconds         what the block took
    peak_rss_bytes  the most memory that the process had so far
    events          what a person should know of single layers, or of transforms
    """

    block: str
    number: int
    count: int
    layers: int
    bits: float
    rounded: float
    error: float
    seconds: float
    peak_rss_bytes: int
    events: tuple[str, ...]


class Watch:
    """Told how a quantization gets on. Its methods do nothing; a subclass has those that its owner cares for."""

    def tried(self, trial: Trial) -> None:
        """The first blocks were tried, before the rest is calibrated."""

    def working(self, at: Working) -> None:
        """Something begins inside a block. Each rank is told of what it does itself."""

    def finished(self, block: Finished) -> None:
        """A block is calibrated, and its file is on disk."""

    def stopping(self) -> bool:
        """Asked behind each block, on every rank: whether the run ends there, with KeyboardInterrupt."""
        return False

    def progress(self, nbytes: int) -> None:
        """So many more bytes of the source's tensors are written, or dropped, or were found done."""
