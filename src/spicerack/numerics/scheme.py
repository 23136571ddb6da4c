"""What the numbers are: `Scheme`, frozen data, and the grammar of its names. Imports no torch.

    w<bits>[g<group>|t][z|h][a8[s]]

    w8        8-bit codes, one scale per output row          w4g128    4-bit, one scale per 128 inputs of a row
    w4g32z    the same with an integer zero point            w2g32h    half-integer levels: ±1/2, ±3/2
    w8t       one scale for the whole tensor                 w8a8      activations in int8 too, one scale per token
                                                             w8a8s     the same, one stored scale per layer

Other number systems (`ternary`, `nf4`, `fp8`, `mxfp4`, `nvfp4`, `q4_k`) are one file each in `schemes/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from spicerack import plugins
from spicerack.errors import SchemeError, ShapeError

FloatType = Literal["source", "float16", "bfloat16", "float32", "float8_e8m0fnu"]
"""How a scale is stored. `source` is float16 for float32 and float16 models and bfloat16 for bfloat16 models: loaders
cast scales to the model's type anyway, so nothing is lost that would have survived."""

FLOAT_BITS: dict[str, int] = {"source": 16, "float16": 16, "bfloat16": 16, "float32": 32, "float8_e8m0fnu": 8}


@dataclass(frozen=True, slots=True)
class IntLevels:
    """Codes are the integers lo..hi and stand for themselves, or, with `half`, for code + 1/2."""

    lo: int
    hi: int
    half: bool = False

    @property
    def bits(self) -> int:
        return max((self.hi - self.lo).bit_length(), 1)

    @property
    def values(self) -> tuple[float, ...]:
        """The level of each code, in code order from `lo`."""
        return tuple(code + 0.5 * self.half for code in range(self.lo, self.hi + 1))


@dataclass(frozen=True, slots=True)
class TableLevels:
    """Code i stands for values[i]; the values need not be sorted (small floats are listed by bit pattern)."""

    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        return max((len(self.values) - 1).bit_length(), 1)


def float_levels(
    exponent_bits: int, mantissa_bits: int, *, ieee_specials: bool = False, max_value: float = math.inf
) -> TableLevels:
    """Values of a small sign-exponent-mantissa float, by bit pattern, bias 2^(e-1)-1, with subnormals.

    Patterns above `max_value` (E4M3FN's NaN) and, with `ieee_specials`, the whole top exponent, stand for the largest
    finite value: an encoder never chooses them, because the smaller code with the same value comes first.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    magnitudes: list[float] = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
            special = value > max_value or (ieee_specials and exponent == 2**exponent_bits - 1)
            magnitudes.append(magnitudes[-1] if special else value)
    return TableLevels(tuple(magnitudes) + tuple(-m for m in magnitudes))


Levels = IntLevels | TableLevels


@dataclass(frozen=True, slots=True)
class Scheme:
    """w = scale * (level[code] - zero) + min, one scale (and zero, and min) per block of the last two axes.

    block: (rows, columns) that share a scale; None means the whole axis. (1, 128) is group 128, (1, None) one scale per
    output row, (None, None) one per tensor.
    scale, min: a float type, or a Scheme: scales that are themselves quantized (q4_k, nvfp4).
    zero: integer zero points, in the range of the codes and stored like them.
    activations: "token": int8, one scale per token, found on the fly; "static": int8, one calibrated scale per tensor.
    """

    name: str
    levels: Levels
    block: tuple[int | None, int | None] = (1, None)
    scale: FloatType | Scheme = "source"
    zero: bool = False
    min: FloatType | Scheme | None = None
    activations: Literal["token", "static"] | None = None

    def __post_init__(self) -> None:
        if self.zero and not isinstance(self.levels, IntLevels):
            raise SchemeError(f"{self.name}: a zero point needs integer levels", "use min instead")
        if self.levels.bits > 8:
            raise SchemeError(f"{self.name}: {self.levels.bits} bits a code; at most 8 are stored", "use fewer levels")

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return self.levels.bits

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None is the whole row."""
        return self.block[1]

    def block_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The block in full for a [rows, columns] matrix."""
        return self.block[0] or rows, self.block[1] or columns

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ShapeError unless whole blocks (and blocks of scales) tile the last two axes of `shape`."""
        if len(shape) < 2 or 0 in shape:
            raise ShapeError(f"{name}: shape {list(shape)} is not a matrix", "skip it")
        rows, columns = shape[-2:]
        block_rows, block_columns = self.block_shape(rows, columns)
        for axis, size, block in (("N", rows, block_rows), ("K", columns, block_columns)):
            if size % block:
                fits = [g for g in (256, 128, 64, 32, 16, 8, 4) if size % g == 0 and g < block]
                remedy = f"use group {fits[0]} or skip it" if fits else "use one scale per row, or skip it"
                raise ShapeError(f"{name}: {axis}={size} is not divisible by {self.name}'s block of {block}", remedy)
        for part in (self.scale, self.min):
            if isinstance(part, Scheme):
                part.check_shape(f"{name} (scales)", (*shape[:-2], rows // block_rows, columns // block_columns))

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a tensor of `shape` takes: codes, scales (a static one of activations too), zero points, minima.

        Padding of files is not counted.
        """
        *leading, rows, columns = shape
        block_rows, block_columns = self.block_shape(rows, columns)
        grid = (*leading, rows // block_rows, columns // block_columns)
        blocks = math.prod(grid)
        total = math.prod(shape) * self.bits + (blocks * self.bits if self.zero else 0)
        for part in (self.scale, self.min):
            if isinstance(part, Scheme):
                total += part.stored_bits(grid)
            elif part is not None:
                total += blocks * FLOAT_BITS[part]
        return total + (FLOAT_BITS["float32"] if self.activations == "static" else 0)

    @property
    def dynamic(self) -> Scheme:
        """The same with a scale per token where this has a static one."""
        if self.activations != "static":
            return self
        return dataclasses.replace(self, name=self.name.removesuffix("s"), activations="token")

    def __str__(self) -> str:
        return self.name


_NAME = re.compile(r"w(?P<bits>[2-8])(?:g(?P<group>[1-9]\d{0,5})|(?P<tensor>t))?(?P<kind>[zh])?(?P<act>a8s?)?")


def parse(name: str) -> Scheme:
    """The scheme called `name`: the grammar, or a file in `schemes/`. Raises SchemeError with the nearest names."""
    match = _NAME.fullmatch(name)
    if match is None:
        try:
            scheme = plugins.get("numerics.schemes", name, "SCHEME")
        except KeyError:
            raise SchemeError(f"unknown scheme {name!r}", _suggest(name)) from None
        assert isinstance(scheme, Scheme)
        return scheme
    half = 2 ** (int(match["bits"]) - 1)
    columns = int(match["group"]) if match["group"] else None
    activations: Literal["token", "static"] | None = None
    if match["act"]:
        activations = "static" if match["act"].endswith("s") else "token"
    return Scheme(
        name=name,
        levels=IntLevels(-half, half - 1, half=match["kind"] == "h"),
        block=(None, None) if match["tensor"] else (1, columns),
        zero=match["kind"] == "z",
        activations=activations,
    )


def _suggest(name: str) -> str:
    common = [
        "w8",
        "w8a8",
        "w4g128",
        "w4g64",
        "w4g32",
        "w4g128z",
        "w4g32z",
        "w3g64",
        "w3g128",
        "w2g32z",
        "w2g32h",
        "w6",
        "w5g64",
    ]
    near = difflib.get_close_matches(name.lower(), [*common, *plugins.names("numerics.schemes")], n=3, cutoff=0.4)
    return "did you mean " + ", ".join(near or ["w8", "w4g128", "w4g32z"]) + "? Grammar: w<2-8>[g<group>|t][z|h][a8[s]]"
