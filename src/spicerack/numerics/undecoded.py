"""`Undecoded`: a quantized matrix whose codes still lie as a folder stores them.

Who needs codes one to a byte takes the `qtensor`; a kernel that can lay out the stored bits themselves (`Kernel.stage`)
saves a pass over a byte for each weight, which is most of the time that a model takes to open. Nobody has looked at
the codes: some may be none of the scheme's levels, and whoever reads them must notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from spicerack.errors import SchemeError, ShapeError
from spicerack.numerics import native
from spicerack.numerics.qtensor import QTensor, Scale, codes_dtype
from spicerack.numerics.scheme import Scheme, word_count

Order = Literal["stream", "bytes", "quarters"]
"""How codes [N, K] lie: as the words of `bits`, each code less the lowest; as they are, one to a byte; or four rows
r, r + N/4, r + N/2 and r + 3N/4 to a row r of bytes, two bits each, less the lowest, the first of them lowest."""


@dataclass(frozen=True, slots=True, eq=False)
class Undecoded:
    """A matrix [N, K] of a scheme whose codes are one weight's each, as it was read: a QTensor but for its codes.

    scheme       what the numbers are
    shape        [N, K]
    order        how its codes lie
    data         the codes: int32 [N, words] of a stream, int8 [N, K] of bytes, uint8 [N/4, K] of quarters
    scale, min   floats [N or 1, groups], in their stored type, or a QTensor of that shape; min may be None
    zero         int8 like scale, or None
    input_scale  float32 [1]; only with static activations
    transposed   the checkpoint's tensor is [K, N]

    Raises ShapeError for parts of another type or shape.
    """

    scheme: Scheme
    shape: tuple[int, int]
    order: Order
    data: torch.Tensor
    scale: Scale
    zero: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    transposed: bool = False
    min: Scale | None = None

    def __post_init__(self) -> None:
        n, k = self.shape
        self.scheme.check_shape(f"codes of {self.scheme}", self.shape)
        wanted = {
            "stream": (torch.int32, (n, word_count(k, self.scheme.bits))),
            "bytes": (torch.int8, (n, k)),
            "quarters": (torch.uint8, (n // 4, k)),
        }[self.order]
        if (self.data.dtype, tuple(self.data.shape)) != wanted or (self.order == "quarters" and n % 4):
            raise ShapeError(
                f"{self.scheme}: {self.order} of {self.data.dtype} {list(self.data.shape)} are not [{n}, {k}]"
            )
        groups = self.scheme.scale_shape(self.shape)
        for part in (self.scale, self.zero, self.min):
            if part is not None and tuple(part.shape) != groups:
                raise ShapeError(f"{self.scheme}: scales of {list(part.shape)}, its blocks make {list(groups)}")
        if (self.zero is not None) != self.scheme.zero or (self.min is not None) != (self.scheme.min is not None):
            raise ShapeError(f"{self.scheme}: zero points or minima that the scheme lacks, or none that it has")

    @property
    def plain_scale(self) -> torch.Tensor:
        """As `QTensor.plain_scale`. Raises SchemeError where the scale is quantized itself."""
        if isinstance(self.scale, QTensor):
            raise SchemeError(f"{self.scheme}: {self.scheme.scale_obstacle}", "use a scheme with float scales")
        return self.scale

    def qtensor(self) -> QTensor:
        """The same, decoded: codes one to a byte, whatever they are."""
        parts = (self.scale, self.zero, self.min)
        return QTensor(self.scheme, self._codes(), *parts, transposed=self.transposed, input_scale=self.input_scale)

    def _codes(self) -> torch.Tensor:
        """[N, K], of `codes_dtype`."""
        dtype, lowest = codes_dtype(self.scheme), self.scheme.levels.lo
        if self.order == "bytes":
            return self.data
        if self.order == "quarters":
            return torch.cat([self.data >> 2 * place & 3 for place in range(4)]).view(dtype) + lowest
        return native.unpack(self.data, self.scheme.bits, self.shape[1], offset=-lowest).view(dtype)
