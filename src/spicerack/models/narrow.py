"""The scheme of the same kind that fits a layer which no whole groups of a scheme tile:

    K below the group      one scale per row, which is then over fewer weights than was asked for
    else                   the largest usual group that tiles K and costs at most one more bit a weight
    else                   one scale per row

Number systems of their own (nf4, mxfp4, q4_k ...) have one group each; the nearest is integers of as many bits.
"""

from __future__ import annotations

from spicerack.numerics.scheme import Scheme, parse

_GROUPS = (256, 128, 64, 32, 16, 8)
"""Groups that are offered: those that kernels and other engines have. Of 4 the scales alone are 4 bits a weight."""
_DEARER = 1.0
"""Bits a weight that a smaller group may cost more than was asked for; beyond it more bits a code would do better."""


def nearest(scheme: Scheme, shape: tuple[int, ...]) -> Scheme | None:
    """The scheme of the same kind that tiles [..., N, K] and is nearest to `scheme`, see the module; None where the
    shape is no matrix."""
    if len(shape) < 2 or 0 in shape:
        return None
    columns, group = shape[-1], scheme.group_columns or shape[-1]
    most = _bits(scheme, group) + _DEARER
    for smaller in (g for g in _GROUPS if g < min(group, columns) and columns % g == 0 and columns >= group):
        fitting = _like(scheme, smaller)
        if _bits(fitting, smaller) <= most:
            return fitting
    return _like(scheme, None)


def _like(scheme: Scheme, group: int | None) -> Scheme:
    """Integers of as many bits, with groups of so many columns (None: rows), and all else as `scheme` has it."""
    integers = scheme.levels.integers
    kind = "z" if scheme.zero else "h" if integers is not None and integers.half else ""
    activations = {None: "", "token": "a8", "static": "a8s"}[scheme.activations]
    return parse(f"w{min(max(scheme.bits, 2), 8)}{'' if group is None else f'g{group}'}{kind}{activations}")


def _bits(scheme: Scheme, group: int) -> float:
    """Bits a weight, scales and zero points among them, where so many columns share a scale."""
    rows = 64  # enough for a scale of the whole tensor to weigh nothing
    return scheme.stored_bits((rows, group)) / (rows * group)
