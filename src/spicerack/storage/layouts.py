"""Which tensors a quantized matrix becomes on disk, in each format that is written: names, types, shapes. No torch.

One answer for all who ask: formats lay tensors out by it, `quantize --dry-run` adds it up, and `inspect` and `plan` say
from it, within a second, what a folder would weigh to the byte.

    compressed   compressed-tensors: integers that transformers and vLLM read
    bitnet       ternary codes, four rows to a byte
    container    spicerack's own, which holds every scheme

Formats are tried in this order, as `storage.format.choose` does (a test compares both), and one that cannot hold a
single matrix of a folder holds none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spicerack.numerics.scheme import FloatType, Scheme, word_count

Parts = dict[str, tuple[str, tuple[int, ...]]]
"""What stands behind the module's name -> (safetensors type, shape), in the order of writing."""
_BITS = {"U8": 8, "I8": 8, "I32": 32, "I64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E8M0": 8}
"""Bits of an element of the types that are written."""
_FLOATS: dict[FloatType, str] = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
BITNET = "ternarya8"
"""The one scheme that the format bitnet holds."""
BITNET_ROWS = 4
"""Codes in one of its bytes, of as many output rows."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor that is quantized, as far as its place on disk depends on it.

    scheme       what its numbers are
    shape        [N, K] or [E, N, K]: output rows first
    source       safetensors' name of the float type it had: "BF16"
    role         of `models.census`
    transposed   the float checkpoint stores [..., K, N]
    bias         the layer has one
    expert       it is one expert's
    """

    scheme: Scheme
    shape: tuple[int, ...]
    source: str
    role: str = "linear"
    transposed: bool = False
    bias: bool = False
    expert: bool = False


def float_type(kind: FloatType | Scheme, source: str) -> str:
    """safetensors' name of the type that a scale or minimum `kind` is stored in, for weights of type `source`.

    "source" is BF16 for BF16 and F16 for all others; of scales that are quantized themselves it is F32, which they are
    before that.
    """
    if isinstance(kind, Scheme):
        return "F32"
    if kind == "source":
        return "BF16" if source == "BF16" else "F16"
    return _FLOATS[kind]


def container(scheme: Scheme, shape: tuple[int, ...], source: str) -> Parts:
    """spicerack's own container: what `numerics.packed.pack` makes of a tensor [..., N, K]."""
    groups = scheme.scale_shape(shape)
    parts: Parts = {"codes": _words(scheme.codes_shape(shape), scheme.bits)}
    for name, kind in (("scale", scheme.scale), ("min", scheme.min)):
        if isinstance(kind, Scheme):
            parts |= {f"{name}.{key}": value for key, value in container(kind, groups, source).items()}
        elif kind is not None:
            parts[name] = (float_type(kind, source), groups)
    if scheme.zero:
        parts["zero"] = _words(groups, scheme.bits)
    if scheme.activations == "static":
        parts["input_scale"] = ("F32", (1,))
    return parts


def compressed(scheme: Scheme, shape: tuple[int, ...], source: str) -> Parts:
    """compressed-tensors: codes as int8 where activations are int8 too, else as a stream of bits."""
    rows, columns = shape
    groups = columns // (scheme.group_columns or columns)
    scale = (float_type(scheme.scale, source), (rows, groups))
    if scheme.activations:
        integers: Parts = {"weight": ("I8", (rows, columns)), "weight_scale": scale}
        return integers if scheme.activations == "token" else {**integers, "input_scale": ("F32", (1,))}
    parts: Parts = {"weight_packed": _words((rows, columns), scheme.bits), "weight_scale": scale}
    if scheme.zero:
        parts["weight_zero_point"] = ("I32", (word_count(rows, scheme.bits), groups))
    parts["weight_shape"] = ("I64", (2,))
    return parts


def bitnet(scheme: Scheme, shape: tuple[int, ...], source: str) -> Parts:
    """bitnet: four rows of codes to a row of bytes, and a scale."""
    rows, columns = shape
    scale = float_type(scheme.scale, source)
    return {"weight": ("U8", (rows // BITNET_ROWS, columns)), "weight_scale": (scale, (1,))}


def compressed_obstacle(matrix: Matrix) -> str | None:
    """What compressed-tensors lacks for a matrix, as the end of "compressed-tensors has no"; None if it holds it."""
    scheme, integers = matrix.scheme, matrix.scheme.levels.integers
    if matrix.role not in ("linear", "head", "router") or matrix.transposed or len(matrix.shape) != 2:
        return f"quantized {matrix.role}"
    top = 2 ** (scheme.bits - 1)
    if integers is None or (integers.lo, integers.hi) != (-top, top - 1):
        return f"levels of {scheme.name}"
    if integers.half:
        return f"half-integer levels ({scheme.name})"
    if scheme.plain_obstacle is not None or scheme.group[0] != 1:
        return f"scales like those of {scheme.name}"
    if scheme.activations and (scheme.bits, scheme.group, scheme.zero) != (8, (1, None), False):
        return f"activations like those of {scheme.name} here"
    return None


def bitnet_obstacle(matrix: Matrix) -> str | None:
    """What bitnet lacks for a matrix, as the end of "bitnet has no"; None if it holds it exactly.

    It has ternary weights with int8 activations of one token, two axes, no bias, and a multiple of four output rows.
    """
    if matrix.scheme.name != BITNET:
        return f"{matrix.scheme.name}, only {BITNET}"
    if matrix.role not in ("linear", "head") or matrix.transposed or len(matrix.shape) != 2:
        return f"quantized {matrix.role}"
    if matrix.expert:
        return "packed experts"
    if matrix.bias:
        return "biases: transformers multiplies them by the weight's scale"
    if matrix.shape[0] % BITNET_ROWS:
        return f"{matrix.shape[0]} output rows, only multiples of {BITNET_ROWS}"
    return None


def choose(matrices: Iterable[Matrix]) -> Callable[[Scheme, tuple[int, ...], str], Parts]:
    """The layout of the first format that holds every one of these matrices exactly."""
    held = tuple(matrices)
    if not any(compressed_obstacle(matrix) for matrix in held):
        return compressed
    return bitnet if not any(bitnet_obstacle(matrix) for matrix in held) else container


def nbytes(parts: Parts) -> int:
    """Bytes of these tensors, headers of files left out."""
    return sum(math.prod(shape) * _BITS[dtype] // 8 for dtype, shape in parts.values())


def _words(shape: tuple[int, ...], bits: int) -> tuple[str, tuple[int, ...]]:
    """Type and shape of packed codes [..., C]: 32-bit words, those of each row filled up with zeros."""
    return "I32", (*shape[:-1], word_count(shape[-1], bits))
