"""What stays in float although it is a matrix, and what a person is told of it: the same of folders and of modules.

A layer that cannot be quantized is no fault, but a model of which half stays as it was is smaller than somebody
believes. So above a twentieth of the weights it is said which kinds of layers those are, and the true reason of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spicerack.errors import listed
from spicerack.models.overview import pattern_of

SHARE = 0.05
"""Of the weights in matrices, from which on it is told what stays in float: less hardly changes what a model weighs."""
_LISTED = 4
"""Kinds of layers that are named before the rest is counted."""
_TABLES = ("embed", "pos", "token", "query", "queries", "latent", "prompt", "mask", "codebook")
"""Parts of names of parameters that are looked up in or added, and not multiplied with."""


@dataclass(frozen=True, slots=True)
class Staying:
    """A matrix that stays in float.

    name   of its module, or of the parameter itself
    numel  numbers in it
    why    the reason, as the end of a sentence
    """

    name: str
    numel: int
    why: str


def reasons(left: Iterable[Staying]) -> list[str]:
    """Kinds of matrices by the reason for which they stay, that with the most weights first, each as a line:
    `3 x layers.*.Wqkv, 3 x layers.*.Wo (transformers splits them)`."""
    names: dict[str, dict[str, list[str]]] = {}
    weights: dict[str, int] = {}
    for matrix in left:
        names.setdefault(matrix.why, {}).setdefault(pattern_of(matrix.name), []).append(matrix.name or "the layer")
        weights[matrix.why] = weights.get(matrix.why, 0) + matrix.numel
    lines = []
    for why in sorted(names, key=lambda why: -weights[why]):
        kinds = [f"{len(them)} x {kind}" if len(them) > 1 else them[0] for kind, them in names[why].items()]
        lines.append(f"{listed(kinds, _LISTED, 'kinds')} ({why})")
    return lines


def told(left: Sequence[Staying], total: int) -> str | None:
    """What a person is told of the matrices that stay in float, of `total` numbers in all; None where it is too little
    to tell."""
    share = sum(matrix.numel for matrix in left) / max(total, 1)
    if share <= SHARE:
        return None
    return f"{share:.0%} of the weights in matrices stay in float: " + listed(reasons(left), _LISTED, between="; ")


def is_table(name: str) -> bool:
    """Whether the last part of a name says that the parameter is looked up in or added."""
    return any(word in name.rsplit(".", 1)[-1].lower() for word in _TABLES)
