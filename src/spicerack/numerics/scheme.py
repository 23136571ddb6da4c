"""What the numbers are: `Scheme`, frozen data, and the grammar of its names. Imports no torch.

    w<bits>[g<group>|t][z|h|m][f][a8[s]]

    w8        8-bit codes, one scale per output row          w4g128    4-bit, one scale per 128 inputs of a row
    w4g32z    the same with an integer zero point            w2g32h    half-integer levels: ±1/2, ±3/2
    w8t       one scale for the whole tensor                 w8a8      activations in int8 too, one scale per token
    w4g64m    codes from 0 and a float minimum per group     w8a8s     the same, one stored scale per layer
    w4g64f    scales (and minima) in float32

Other number systems (`ternary`, `nf4`, `fp8`, `mxfp4`, `nvfp4`, `q4_k`) are one file each in `schemes/`.

A scheme answers what others would otherwise each find out in their own way: whether it is *plain*, the kind that most
fast code is written for (integers, times a float scale of a row, of a group of a row or of the tensor, and no minimum),
and if it is not, why (`plain_obstacle`, and the single questions behind it).
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
from spicerack.numerics.levels import IntLevels, Levels

FloatType = Literal["source", "float16", "bfloat16", "float32", "float8_e8m0fnu"]
"""How a scale is stored. `source` is float16 for float32 and float16 models and bfloat16 for bfloat16 models: loaders
cast scales to the model's type anyway, so nothing is lost that would have survived."""

FLOAT_BITS: dict[FloatType, int] = {"source": 16, "float16": 16, "bfloat16": 16, "float32": 32, "float8_e8m0fnu": 8}
"""Bits of a scale of each type."""

MAX_BITS = 8
"""The widest code: QTensor keeps codes in bytes, and `bits` packs codes of up to one byte."""
_GROUPS = (256, 128, 64, 32, 16, 8, 4)
"""Groups that an error suggests where one does not divide a row: those that kernels and other engines have."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """w = scale * (level[code] - zero) + min, one scale (and zero, and min) per group of the last two axes.

    name         the grammar's, or that of the file in `schemes/`; folders and recipes know the scheme by it
    levels       what the codes stand for
    group        (rows, columns) that share a scale; None means the whole axis. (1, 128) is group 128, (1, None) one
                 scale per output row, (None, None) one per tensor
    scale, min   a float type, or a Scheme: scales that are themselves quantized (q4_k, nvfp4). No min: None
    zero         integer zero points, in the range of the codes and stored like them
    activations  what layers do with their inputs: "token", int8 with one scale per token, found as they come; "static",
                 int8 with one calibrated scale per tensor; None, nothing

    Raises SchemeError for parts that do not go together.
    """

    name: str
    levels: Levels
    group: tuple[int | None, int | None] = (1, None)
    scale: FloatType | Scheme = "source"
    zero: bool = False
    min: FloatType | Scheme | None = None
    activations: Literal["token", "static"] | None = None

    def __post_init__(self) -> None:
        if self.zero and self.levels.integers is None:
            raise SchemeError(f"{self.name}: a zero point needs integer levels", "use min instead")
        if self.levels.bits > MAX_BITS:
            raise SchemeError(
                f"{self.name}: {self.levels.bits} bits a code; at most {MAX_BITS} are stored", "use fewer levels"
            )

    def __str__(self) -> str:
        return self.name

    # ---- what fast code asks ----------------------------------------------------------------------------------------

    @property
    def integers(self) -> IntLevels:
        """The levels of a scheme without a `levels_obstacle`. Raises SchemeError for any other."""
        integers = self.levels.integers
        if integers is None:
            raise SchemeError(f"{self.name}: {self.levels_obstacle}", "use integer levels, such as w4g32")
        return integers

    @property
    def levels_obstacle(self) -> str | None:
        """Why w / scale + zero does not tell a weight's place among the levels (nf4, fp8, mxfp4), or None."""
        return "its levels are a table, not integers" if self.levels.integers is None else None

    @property
    def codes_obstacle(self) -> str | None:
        """Why a code is not one weight's, so that columns of a matrix can be rounded one after the other, or None."""
        return None if self.levels.weights == 1 else f"its codes stand for {self.levels.weights} weights each"

    @property
    def scale_obstacle(self) -> str | None:
        """Why a group is not its levels times one float (q4_k, nvfp4), or None. `QTensor.plain_scale` is that float."""
        if isinstance(self.scale, Scheme):
            return "its scales are quantized themselves"
        return None if self.min is None else "its blocks have minima"

    @property
    def rows_obstacle(self) -> str | None:
        """Why rows are not independent of each other but for a scale of the whole tensor, or None."""
        return None if self.group in ((None, None), (1, self.group[1])) else "rows of a block share a scale"

    @property
    def plain_obstacle(self) -> str | None:
        """Why this scheme is not plain, or None: integers times a float of a row, a group of a row or the tensor.

        Powers of two (mxfp4) are floats but not plain: they are stored in a type of their own.
        """
        powers = "its scales are powers of two" if self.scale == "float8_e8m0fnu" else None
        return self.levels_obstacle or self.scale_obstacle or powers or self.rows_obstacle

    @property
    def is_ternary(self) -> bool:
        """Whether the levels are -1, 0 and 1."""
        return self.levels == IntLevels(-1, 1) and not self.zero

    # ---- shapes and sizes -------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return self.levels.bits

    @property
    def group_columns(self) -> int | None:
        """Columns that share a scale; None is the whole row."""
        return self.group[1]

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The group in full for a [rows, columns] matrix."""
        return self.group[0] or rows, self.group[1] or columns

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of weights [..., N, K]: the same, but for levels whose codes stand for several weights
        each."""
        return (*shape[:-1], shape[-1] // self.levels.weights)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of scales, zero points and minima of weights [..., N, K]: one of each per group."""
        *leading, rows, columns = shape
        group_rows, group_columns = self.group_shape(rows, columns)
        return (*leading, rows // group_rows, columns // group_columns)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ShapeError unless whole groups (and groups of scales) tile the last two axes of `shape`; return if they
        do.

        name: of the tensor, for the message, whose hint names the largest common group that fits.
        """
        if len(shape) < 2 or 0 in shape:
            raise ShapeError(f"{name}: shape {list(shape)} is not a matrix", "skip it")
        rows, columns = shape[-2:]
        group_rows, group_columns = self.group_shape(rows, columns)
        for axis, size, group in (("N", rows, group_rows), ("K", columns, group_columns)):
            if size % group:
                smaller = [g for g in _GROUPS if size % g == 0 and g < group]
                remedy = f"use group {smaller[0]} or skip it" if smaller else "use one scale per row, or skip it"
                raise ShapeError(f"{name}: {axis}={size} is not divisible by {self.name}'s block of {group}", remedy)
        if group_columns % self.levels.weights:
            raise ShapeError(
                f"{name}: blocks of {group_columns} columns are no whole codes of {self.name}, which stand for "
                f"{self.levels.weights} weights each",
                "skip it",
            )
        for part in (self.scale, self.min):
            if isinstance(part, Scheme):
                part.check_shape(f"{name} (scales)", self.scale_shape(shape))

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a tensor of `shape` takes: codes, scales (a static one of activations too), zero points, minima.

        Padding of files is not counted.
        """
        groups = math.prod(self.scale_shape(shape))
        total = math.prod(self.codes_shape(shape)) * self.bits + (groups * self.bits if self.zero else 0)
        for part in (self.scale, self.min):
            if isinstance(part, Scheme):
                total += part.stored_bits(self.scale_shape(shape))
            elif part is not None:
                total += groups * FLOAT_BITS[part]
        return total + (FLOAT_BITS["float32"] if self.activations == "static" else 0)

    @property
    def dynamic(self) -> Scheme:
        """The same with a scale per token where this has a static one."""
        if self.activations != "static":
            return self
        return dataclasses.replace(self, name=self.name.removesuffix("s"), activations="token")


def word_count(columns: int, bits: int) -> int:
    """32-bit words that hold a row of `columns` codes of `bits` bits, the last of them filled up with zeros."""
    return -(-columns * bits // 32)


_NAME = re.compile(
    r"w(?P<bits>[2-8])(?:g(?P<group>[1-9]\d{0,5})|(?P<tensor>t))?(?P<kind>[zhm])?(?P<wide>f)?(?P<act>a8s?)?"
)
_COMMON = (
    "w8", "w8a8", "w4g128", "w4g64", "w4g32", "w4g128z", "w4g32z", "w3g64", "w3g128", "w2g32z", "w2g32h", "w6", "w5g64",
)  # fmt: skip
"""Names of the grammar that are suggested for those that are nearly like them."""
_OTHER_NAMES = {
    "int8": "w8", "8bit": "w8", "w8a16": "w8", "q8_0": "w8g32",
    "int6": "w6", "6bit": "w6", "q5_0": "w5g32",
    "int4": "w4g128", "4bit": "w4g128", "w4a16": "w4g128", "q4_0": "w4g32",
    "float8": "fp8", "fp8_e4m3": "fp8", "bitnet": "ternary", "1.58bit": "ternary",
}  # fmt: skip
"""What other tools and papers call the numbers, in lower case and without hyphens -> our name. llama.cpp's types of one
scale a block are our schemes exactly; a bare "int4" says nothing of groups, and is what engines on GPUs mean by it."""


def parse(name: str) -> Scheme:
    """The scheme called `name`: by the grammar, by a file in `schemes/`, or by what others call it (INT8, W4A16, Q4_0).

    Of files the very name comes first, then the name in lower case. Its `name` is always ours. Raises SchemeError, with
    the nearest names, for one that is none of these, and for parts that do not go together.
    """
    scheme: Scheme
    if name in (files := plugins.names("numerics.schemes")):
        scheme = plugins.get("numerics.schemes", name, "SCHEME")
        return scheme
    lower = name.lower()
    usual = _OTHER_NAMES.get(lower.replace("-", ""), lower)
    if usual in files:
        scheme = plugins.get("numerics.schemes", usual, "SCHEME")
        return scheme
    match = _NAME.fullmatch(usual)
    # what multiplies in integers has no minima, and scales of 16 bits
    if match is None or (match["act"] and (match["wide"] or match["kind"] == "m")):
        raise SchemeError(f"unknown scheme {name!r}", _suggest(name))
    half, minimum = 2 ** (int(match["bits"]) - 1), match["kind"] == "m"
    floats: FloatType = "float32" if match["wide"] else "source"
    columns = int(match["group"]) if match["group"] else None
    activations: Literal["token", "static"] | None = None
    if match["act"]:
        activations = "static" if match["act"].endswith("s") else "token"
    return Scheme(
        name=usual,
        levels=IntLevels(0, 2 * half - 1) if minimum else IntLevels(-half, half - 1, half=match["kind"] == "h"),
        group=(None, None) if match["tensor"] else (1, columns),
        scale=floats,
        zero=match["kind"] == "z",
        min=floats if minimum else None,
        activations=activations,
    )


def _suggest(name: str) -> str:
    """The hint for a name that is no scheme's: those that look like it, and the grammar."""
    near = difflib.get_close_matches(name.lower(), [*_COMMON, *plugins.names("numerics.schemes")], n=3, cutoff=0.4)
    return (
        "did you mean "
        + ", ".join(near or ["w8", "w4g128", "w4g32z"])
        + "? Grammar: w<2-8>[g<group>|t][z|h|m][f][a8[s]]"
    )
