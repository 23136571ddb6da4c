"""`QTensor`: a quantized tensor, unpacked. Schemes, algorithms, formats and kernels meet only here.

Codes stay one to a byte while a tensor is worked on; they are packed at the two edges, in formats (disk) and in kernels
(memory), each in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from spicerack.errors import SchemeError, ShapeError
from spicerack.numerics.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """w = scale * (level[codes] - zero) + min, group by group; only the scheme's levels know what a code stands for.

    scheme      what the numbers are
    codes       of `codes_dtype`, [..., N, K] (K / weights where a code stands for several); leading axes are experts
    scale       float tensor [..., N/group_rows, K/group_columns] in its stored type, or a QTensor of that shape
    zero        int8 like scale, or None
    min         like scale, or None
    transposed  the checkpoint's tensor is the transpose, [..., K, N] (GPT-2's Conv1D)
    input_scale float32 [1]: what a code of the layer's input counts for; only with static activations, and then None
                until it is known

    Raises ShapeError for parts of another type or shape than the scheme has.
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor | QTensor
    zero: torch.Tensor | None = None
    min: torch.Tensor | QTensor | None = None
    transposed: bool = False
    input_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        dtype = codes_dtype(self.scheme)
        if self.codes.dtype != dtype:
            raise ShapeError(f"{self.scheme}: codes are {self.codes.dtype}, not {str(dtype).removeprefix('torch.')}")
        self.scheme.check_shape(f"QTensor {self.scheme}", self.shape)
        groups = self.scheme.scale_shape(self.shape)
        for part, name in ((self.scale, "scale"), (self.zero, "zero"), (self.min, "min")):
            if part is not None and tuple(part.shape) != groups:
                raise ShapeError(f"{self.scheme}: {name} has shape {list(part.shape)}, its blocks make {list(groups)}")
        if (self.zero is not None) != self.scheme.zero or (self.min is not None) != (self.scheme.min is not None):
            raise ShapeError(f"{self.scheme}: zero or min given that the scheme lacks, or the other way round")
        x = self.input_scale
        if x is not None and (self.scheme.activations != "static" or (x.dtype, x.shape) != (torch.float32, (1,))):
            raise ShapeError(f"{self.scheme}: input scale {x.dtype} {list(x.shape)}, not a static scheme's float32 [1]")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, [..., N, K]: output rows first, whatever the checkpoint's order."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * self.scheme.levels.weights)

    @property
    def plain_scale(self) -> torch.Tensor:
        """The scale where it is a float tensor, in its stored type. Raises SchemeError where it is quantized itself.

        `Scheme.scale_obstacle` says beforehand.
        """
        if isinstance(self.scale, QTensor):
            raise SchemeError(f"{self.scheme}: {self.scheme.scale_obstacle}", "use a scheme with float scales")
        return self.scale

    def matrices(self) -> list[QTensor]:
        """The experts of a stack [E, N, K], each [N, K], sharing its memory; neither transposed nor with an input
        scale."""

        def split(part: Any) -> list[Any]:
            if part is None:
                return [None] * len(self.codes)
            return part.matrices() if isinstance(part, QTensor) else list(part)

        parts = zip(self.codes, split(self.scale), split(self.zero), split(self.min), strict=True)
        return [QTensor(self.scheme, *matrix) for matrix in parts]

    @classmethod
    def stack(cls, matrices: Sequence[QTensor], *, transposed: bool = False) -> QTensor:
        """Inverse of `matrices`: E of [N, K], of one scheme, shape and kind of parts -> [E, N, K].

        transposed: what the result says of the checkpoint's order.
        """

        def joined(parts: Sequence[Any]) -> Any:
            return cls.stack(parts) if isinstance(parts[0], QTensor) else torch.stack(list(parts))

        first = matrices[0]
        names = [name for name in ("codes", "scale", "zero", "min") if getattr(first, name) is not None]
        parts = {name: joined([getattr(matrix, name) for matrix in matrices]) for name in names}
        return cls(first.scheme, **parts, transposed=transposed)

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales, zero points and minima as a folder counts them, see `Scheme.stored_bits`."""
        return self.scheme.stored_bits(self.shape)


Scale = torch.Tensor | QTensor
"""Scales or minima of groups: floats as they are stored, or quantized themselves."""


def codes_dtype(scheme: Scheme) -> torch.dtype:
    """The type of codes: int8 where some are negative (integers around 0), uint8 where none is (tables)."""
    return torch.int8 if scheme.levels.lo < 0 else torch.uint8


T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """The same with all tensors in it on `device`: a tensor, a QTensor, or lists, tuples and dictionaries of those."""

    def one(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.to(device)
        if isinstance(part, QTensor):
            names = ("codes", "scale", "zero", "min", "input_scale")
            return dataclasses.replace(part, **{name: moved(getattr(part, name), device) for name in names})
        return part

    there: T = tree_map(one, value)
    return there
