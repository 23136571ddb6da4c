"""`QTensor`: a quantized tensor, unpacked. Schemes, algorithms, formats and kernels meet only here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from spicerack.errors import ShapeError
from spicerack.numerics.scheme import IntLevels, Scheme


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """w = scale * (level[codes] - zero) + min, blockwise; only `codec` interprets codes.

    codes       int8, or uint8 if no level is negative or levels are a table, [..., N, K]; leading axes are experts
    scale       float tensor [..., N/block_rows, K/block_columns] in its stored type, or a QTensor of that shape
    zero        int8 like scale, or None
    min         like scale, or None
    transposed  the checkpoint's tensor is the transpose, [..., K, N] (GPT-2's Conv1D)
    input_scale float32 [1]: what a code of the layer's input counts for; only with static activations, and then None
                until it is known
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor | QTensor
    zero: torch.Tensor | None = None
    min: torch.Tensor | QTensor | None = None
    transposed: bool = False
    input_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        signed = isinstance(self.scheme.levels, IntLevels) and self.scheme.levels.lo < 0
        if self.codes.dtype != (torch.int8 if signed else torch.uint8):
            raise ShapeError(f"{self.scheme}: codes are {self.codes.dtype}, not {'int8' if signed else 'uint8'}")
        self.scheme.check_shape(f"QTensor {self.scheme}", self.shape)
        grid = self.grid
        for part, name in ((self.scale, "scale"), (self.zero, "zero"), (self.min, "min")):
            if part is not None and tuple(part.shape) != grid:
                raise ShapeError(f"{self.scheme}: {name} has shape {list(part.shape)}, its blocks make {list(grid)}")
        if (self.zero is not None) != self.scheme.zero or (self.min is not None) != (self.scheme.min is not None):
            raise ShapeError(f"{self.scheme}: zero or min given that the scheme lacks, or the other way round")
        x = self.input_scale
        if x is not None and (self.scheme.activations != "static" or (x.dtype, x.shape) != (torch.float32, (1,))):
            raise ShapeError(f"{self.scheme}: input scale {x.dtype} {list(x.shape)}, not a static scheme's float32 [1]")

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K], output rows first, whatever the checkpoint's order."""
        return tuple(self.codes.shape)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of scale, zero and min."""
        *leading, rows, columns = self.codes.shape
        block_rows, block_columns = self.scheme.block_shape(rows, columns)
        return (*leading, rows // block_rows, columns // block_columns)

    def matrices(self) -> list[QTensor]:
        """[E, N, K] -> E of [N, K]."""

        def split(part: Any) -> list[Any]:
            if part is None:
                return [None] * len(self.codes)
            return part.matrices() if isinstance(part, QTensor) else list(part)

        parts = zip(self.codes, split(self.scale), split(self.zero), split(self.min), strict=True)
        return [QTensor(self.scheme, *matrix) for matrix in parts]

    @classmethod
    def stack(cls, matrices: Sequence[QTensor], *, transposed: bool = False) -> QTensor:
        """Inverse of `matrices`."""

        def joined(parts: Sequence[Any]) -> Any:
            return cls.stack(parts) if isinstance(parts[0], QTensor) else torch.stack(list(parts))

        first = matrices[0]
        names = [name for name in ("codes", "scale", "zero", "min") if getattr(first, name) is not None]
        found = {name: joined([getattr(matrix, name) for matrix in matrices]) for name in names}
        return cls(first.scheme, **found, transposed=transposed)

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales, zero points and minima."""
        return self.scheme.stored_bits(self.shape)


Scale = torch.Tensor | QTensor

T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """The same with all tensors in it on `device`: of a tensor, a QTensor, or containers of those."""

    def one(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.to(device)
        if isinstance(part, QTensor):
            names = ("codes", "scale", "zero", "min", "input_scale")
            return dataclasses.replace(part, **{name: moved(getattr(part, name), device) for name in names})
        return part

    found: T = tree_map(one, value)
    return found
