"""What each tensor of a model weighs in a scheme, to the byte: the one answer of `inspect`, `plan` and the dry run.

A size is that of the tensors that the folder's format lays out (`storage.layouts`), so the format is chosen first, as
`quantize` chooses it: the first that holds every tensor. Headers of files are not counted.

What is given up. Roles are told by names, as in `census`; whoever knows better says which tensors stay in float.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from spicerack.errors import ShapeError
from spicerack.models.census import BY_DEFAULT, Census, Entry
from spicerack.models.narrow import nearest
from spicerack.numerics.scheme import Scheme
from spicerack.storage import layouts
from spicerack.storage.layouts import Matrix

FLOATS = ("F32", "F16", "BF16")
"""Stored types that are quantized."""


@dataclass(frozen=True, slots=True)
class Sized:
    """What becomes of one tensor.

    nbytes   of all that it becomes
    scheme   what its numbers are; None for what stays as it is
    remedy   K, and the scheme that fits, where the groups of the one that was asked for do not tile it; else ""
    """

    nbytes: int
    scheme: Scheme | None = None
    remedy: str = ""


def sized(census: Census, scheme: Scheme, kept: Collection[str] = ()) -> dict[str, Sized]:
    """Tensor -> what becomes of it in this scheme, of all that are no other's alias.

    What is quantized by default is, but for `kept`; tensors that the scheme's groups do not tile are counted in the
    nearest one that fits, and stay in float where none does.
    """
    owned = {name: entry for name, entry in census.entries.items() if name not in census.tied}
    asked = [name for name, entry in owned.items() if is_quantized(entry) and name not in kept]
    # by shape: models have few of them, and many layers
    fitting = {shape: _fitting(scheme, shape) for shape in {owned[name].matrix_shape for name in asked}}
    chosen = {}
    for name in asked:
        fits, _ = fitting[owned[name].matrix_shape]
        if fits is not None:
            chosen[name] = _matrix(owned[name], fits, f"{owned[name].module}.bias" in census.entries)
    matrices = set(chosen.values())
    layout = layouts.choose(matrices)
    weights = {matrix: layouts.nbytes(layout(matrix.scheme, matrix.shape, matrix.source)) for matrix in matrices}
    result = {name: Sized(entry.info.nbytes) for name, entry in owned.items()}
    for name in asked:
        fits, remedy = fitting[owned[name].matrix_shape]
        nbytes = weights[chosen[name]] if name in chosen else owned[name].info.nbytes
        result[name] = Sized(nbytes, fits, remedy)
    return result


def is_quantized(entry: Entry) -> bool:
    """Whether a tensor is quantized by default.

    Of experts in one tensor those are that have an axis for them, whatever the family's code does.
    """
    whole = entry.role == "experts" and len(entry.info.shape) != 3
    return entry.role in BY_DEFAULT and not whole and entry.info.dtype in FLOATS and 0 not in entry.info.shape


def _matrix(entry: Entry, scheme: Scheme, bias: bool) -> Matrix:
    """What the layout of a tensor depends on. bias: its layer has one."""
    expert = "experts" in entry.module.split(".")
    return Matrix(scheme, entry.matrix_shape, entry.info.dtype, entry.role, entry.transposed, bias, expert)


def _fitting(scheme: Scheme, shape: tuple[int, ...]) -> tuple[Scheme | None, str]:
    """The scheme itself, and ""; where its groups do not tile `shape`, the one that fits, and which that is.

    None where nothing fits, and the tensor stays in float.
    """
    try:
        scheme.check_shape("layer", shape)
    except ShapeError as error:
        fits = nearest(scheme, shape)
        return fits, error.hint if fits is None else f"K={shape[-1]}: {fits} with --fit-groups"
    return scheme, ""
