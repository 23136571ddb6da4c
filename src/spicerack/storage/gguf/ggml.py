"""ggml's types: how many weights make a block, how many bytes that takes, and which scheme it is. Imports no torch.

Numbers and sizes are those of ggml.h and ggml-common.h (libggml 0.25.3). Types that only exist while llama.cpp
multiplies (Q8_1, Q8_K), and numbers that it has given up, are left out: no file has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spicerack.errors import ShapeError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How the rows of a tensor lie in a GGUF file.

    id       in the file
    name     ggml's, such as "Q4_K"
    block    weights, neighbours in a row, that are stored together
    nbytes   that a block takes
    scheme   name of the scheme that its blocks are, a QTensor's; None for plain numbers and for what is not decoded
    """

    id: int
    name: str
    block: int
    nbytes: int
    scheme: str | None = None

    def __str__(self) -> str:
        return self.name

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights. Raises ShapeError if they are no whole blocks."""
        if columns % self.block:
            raise ShapeError(f"a row of {columns} weights is no whole blocks of {self.block}, as {self.name} has them")
        return columns // self.block * self.nbytes


_TYPES = (
    GgmlType(0, "F32", 1, 4), GgmlType(1, "F16", 1, 2), GgmlType(30, "BF16", 1, 2), GgmlType(28, "F64", 1, 8),
    GgmlType(24, "I8", 1, 1), GgmlType(25, "I16", 1, 2), GgmlType(26, "I32", 1, 4), GgmlType(27, "I64", 1, 8),
    GgmlType(2, "Q4_0", 32, 18, "w4g32"), GgmlType(3, "Q4_1", 32, 20, "q4_1"),
    GgmlType(6, "Q5_0", 32, 22, "w5g32"), GgmlType(7, "Q5_1", 32, 24, "q5_1"), GgmlType(8, "Q8_0", 32, 34, "w8g32"),
    GgmlType(10, "Q2_K", 256, 84, "q2_k"), GgmlType(11, "Q3_K", 256, 110, "q3_k"),
    GgmlType(12, "Q4_K", 256, 144, "q4_k"), GgmlType(13, "Q5_K", 256, 176, "q5_k"),
    GgmlType(14, "Q6_K", 256, 210, "q6_k"), GgmlType(20, "IQ4_NL", 32, 18, "iq4_nl"),
    GgmlType(34, "TQ1_0", 256, 54, "ternaryg256"), GgmlType(35, "TQ2_0", 256, 66, "ternaryg256"),
    GgmlType(39, "MXFP4", 32, 17, "mxfp4"), GgmlType(40, "NVFP4", 64, 36, "nvfp4"),
    GgmlType(41, "Q1_0", 128, 18, "q1_0"), GgmlType(42, "Q2_0", 64, 18, "q2_0"),
    GgmlType(16, "IQ2_XXS", 256, 66), GgmlType(17, "IQ2_XS", 256, 74), GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50), GgmlType(21, "IQ3_S", 256, 110), GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136), GgmlType(29, "IQ1_M", 256, 56),
)  # fmt: skip
TYPES: dict[str, GgmlType] = {type_.name: type_ for type_ in _TYPES}
"""ggml's name -> its type, for every type that a file may have; those that are decoded have a scheme or are floats."""
BY_ID: dict[int, GgmlType] = {type_.id: type_ for type_ in _TYPES}
"""The number in a file -> its type."""
FLOATS = ("F32", "F16", "BF16")
"""Types of plain numbers that models have."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a GGUF file, as its table has it.

    name    llama.cpp's, such as "blk.0.attn_q.weight"
    type    how its rows lie
    shape   outermost first, as torch has it: [.., N, K] with the weights of a row last (files have it the other way)
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Of its bytes: [.., N, row_bytes]."""
        return (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))

    @property
    def nbytes(self) -> int:
        """That it takes in the file, without padding."""
        return math.prod(self.raw_shape)
