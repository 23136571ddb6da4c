"""Everything spicerack raises on purpose.

    SpicerackError                  exit code 1
    ├── UsageError                  exit code 2: knowable before any weight is read
    │   ├── SchemeError             a scheme's name or parts make no sense
    │   ├── RecipeError             a rule matches nothing, or contradicts itself
    │   ├── ShapeError              a block does not divide a tensor
    │   ├── CheckpointError         a model folder is missing, broken or of a kind we do not read
    │   ├── UntrustedCodeError      reading on would execute somebody's code
    │   ├── OutputError             the output folder is taken, or the disk is too small
    │   └── TextError               a text to evaluate or calibrate on is missing, broken or too short
    ├── WeightError                 a weight is NaN, infinite, or outside what its scale can hold
    ├── ActivationError             an activation is NaN, infinite, or too large to be squared
    ├── TrainingError               a loss or a gradient is NaN or infinite
    └── LoadError                   a quantized folder does not fit the model it names

Each carries a `hint`: the remedy, in one sentence. The command line prints both and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence


class SpicerackError(Exception):
    """Base of all deliberate errors: a message that names the thing, and a hint that names the remedy.

    message   what is wrong, naming tensor, file, value or option
    hint      what helps, in one sentence; "" where nothing general can be said

    exit_code: of the command line. str() has both, the hint in brackets, so that a traceback in a notebook tells as
    much as the command line does.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SpicerackError):
    """Wrong in a way that is knowable before weights are read."""

    exit_code = 2


class SchemeError(UsageError):
    """A scheme's name or parts make no sense."""


class RecipeError(UsageError):
    """A rule matches nothing, or the rules contradict each other."""


class ShapeError(UsageError):
    """A block does not divide a tensor."""


class CheckpointError(UsageError):
    """A model folder is missing, broken, or of a kind that is not read."""


class UntrustedCodeError(UsageError):
    """Reading on would execute code that came with the model."""


class OutputError(UsageError):
    """The output folder is taken by something else, or the disk is too small."""


class TextError(UsageError):
    """A text to evaluate or calibrate on is missing, broken, or shorter than one window."""


class WeightError(SpicerackError):
    """A weight is NaN or infinite, or its block's scale does not fit the type it is stored in."""


class ActivationError(SpicerackError):
    """An activation is NaN, infinite, or too large to be squared; the message names token and column."""


class TrainingError(SpicerackError):
    """A loss or a gradient is NaN or infinite; the message names the step, the hint the last good checkpoint."""


class LoadError(SpicerackError):
    """A quantized folder does not fit the model that it names."""


def listed(items: Sequence[str], most: int, noun: str = "", *, between: str = ", ") -> str:
    """The first `most` of the items, and how many more there are, for messages: "a, b, c and 4 more layers".

    items     what is named, in order
    most      how many are named before the rest is counted
    noun      what the items are, where the sentence does not say it
    between   what stands between two of them; a line break and what each line begins with for items that have a line
              each; then the rest has a line, too
    """
    left = len(items) - most
    if left <= 0:
        return between.join(items)
    of = f" {noun.removesuffix('s') if left == 1 else noun}" if noun else ""
    return f"{between.join(items[:most])}{' ' if between == ', ' else between}and {left} more{of}"


def counted(count: int, noun: str) -> str:
    """A number of things, for people: "1 layer", "2,048 tokens". noun: of one of them, whose plural has an s more."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
