"""Why a solver cannot choose the codes of a scheme: the reasons that several solvers share.

Each function takes a Scheme and returns the reason, as an event of the ledger quotes it, or None where the scheme is
not like that; a solver's `obstacle` is the first reason of those that hold for it.
"""

from __future__ import annotations

from spicerack.numerics.scheme import IntLevels, Scheme


def of_scales(scheme: Scheme) -> str | None:
    """Scales that a solver could not store as it computes them (nvfp4, q4_k), and minima beside them (q4_k)."""
    if scheme.min is not None:
        return "its blocks have minima"
    return "its scales are quantized themselves" if isinstance(scheme.scale, Scheme) else None


def of_rows(scheme: Scheme) -> str | None:
    """Scales of several rows that are not the whole tensor's: rows could no longer be solved one by one."""
    return None if scheme.block[0] in (1, None) else "rows of a block share a scale"


def of_levels(scheme: Scheme) -> str | None:
    """Levels that are not evenly spaced (nf4, fp8, mxfp4): w / s + z does not tell the place of a weight among them."""
    return None if isinstance(scheme.levels, IntLevels) else "its levels are a table"
