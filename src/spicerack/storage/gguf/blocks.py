"""Quantized tensors and the rows of bytes that GGUF has for them, both ways, exactly.

decode(type, raw)     uint8 [.., N, row_bytes] -> QTensor [.., N, K] in the type's own scheme
encode(type, q)       its inverse, and of every other QTensor whose numbers the type holds to the bit
obstacle(type, q)     why it does not, naming the rule, the row and the value; None if it does
types_for(scheme)     the types that may hold a scheme, smallest first, known before a weight is read
"""

from __future__ import annotations

import torch

from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme
from spicerack.storage.gguf.types import GgmlType


def decode(type_: GgmlType, raw: torch.Tensor, name: str = "tensor") -> QTensor:
    """Rows of bytes, uint8 [.., N, row_bytes] on the CPU -> QTensor [.., N, K] in the scheme `type_.scheme`.

    name: of the tensor, for errors. Raises CheckpointError, naming tensor, row and value, for scales that are not
    finite and codes that are no level, and for a type that is not decoded.
    """
    raise NotImplementedError


def encode(type_: GgmlType, q: QTensor, name: str = "tensor") -> torch.Tensor:
    """A QTensor [.., N, K] -> rows of bytes, uint8 [.., N, row_bytes], that decode to the same numbers bit for bit.

    Rows are q's own, whatever `q.transposed` says. Raises SchemeError with `obstacle`'s reason.
    """
    raise NotImplementedError


def obstacle(type_: GgmlType, q: QTensor) -> str | None:
    """Why `type_` cannot hold the numbers of q exactly, as the end of "NAME cannot be TYPE: "; None if it can."""
    raise NotImplementedError


def scheme_obstacle(type_: GgmlType, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """What can be said of it before a weight is read: None if q in `scheme`, [.., N, K] of `shape`, may be exact."""
    raise NotImplementedError


def types_for(scheme: Scheme, shape: tuple[int, ...]) -> tuple[GgmlType, ...]:
    """The quantized types for which `scheme_obstacle` is None, those of fewest bytes first."""
    raise NotImplementedError


def fitting(q: QTensor) -> GgmlType | None:
    """The first of `types_for` that holds q exactly; None if none does."""
    raise NotImplementedError


def decode_floats(type_: GgmlType, raw: torch.Tensor) -> torch.Tensor:
    """Rows of F32, F16 or BF16, uint8 [.., row_bytes] -> the same memory as float [.., K] (copied if misaligned)."""
    raise NotImplementedError


def encode_floats(type_: GgmlType, values: torch.Tensor, name: str = "tensor") -> torch.Tensor:
    """Floats [.., K] -> rows of F32, F16 or BF16, uint8. Raises WeightError for a number that the type rounds."""
    raise NotImplementedError


def without_tensor_scale(q: QTensor) -> tuple[QTensor, torch.Tensor | None]:
    """An NVFP4 tensor as GGUF has it: scales of blocks alone, and the float32 scale of the tensor (one for each matrix
    of a stack), which stands in a tensor of its own, NAME.scale; None if that is 1. Others as they are, and None."""
    raise NotImplementedError


def with_tensor_scale(q: QTensor, scale: torch.Tensor) -> QTensor:
    """Inverse of `without_tensor_scale`, for scales float32 [1], or [E] of a stack."""
    raise NotImplementedError
