"""A QTensor as named tensors with its codes bit-packed: in memory, and in spicerack's own container.

codes           int32 words [..., N, ceil(K bits / 32)], code - lo, the stream of `bits`
scale           [..., N/rows, K/columns] in its stored type; if quantized: scale.codes, scale.scale ...
zero            int32 words [..., N/rows, ceil(K/columns bits / 32)], zero - lo
min             like scale
input_scale     float32 [1], with static activations
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spicerack.numerics import bits, native
from spicerack.numerics.levels import dtype_of, level_values
from spicerack.numerics.qtensor import QTensor, Scale
from spicerack.numerics.scheme import FloatType, IntLevels, Scheme

Tensors = Mapping[str, torch.Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Rows = torch.Tensor | slice


def layout(scheme: Scheme, shape: tuple[int, ...], source: torch.dtype) -> Layout:
    """Name -> (type, shape) of what `pack` makes of a tensor [..., N, K] that was of type `source`."""
    *leading, rows, columns = shape
    grid = _grid(scheme, shape)
    parts: Layout = {"codes": (torch.int32, (*leading, rows, bits.word_count(columns, scheme.bits)))}
    for name, kind in _parts(scheme):
        if isinstance(kind, Scheme):
            inner = layout(kind, grid, source)
            parts |= {f"{name}.{key}": value for key, value in inner.items()}
        else:
            parts[name] = (dtype_of(kind, source), grid)
    if scheme.zero:
        parts["zero"] = (torch.int32, (*grid[:-1], bits.word_count(grid[-1], scheme.bits)))
    if scheme.activations == "static":
        parts["input_scale"] = (torch.float32, (1,))
    return parts


def pack(q: QTensor) -> dict[str, torch.Tensor]:
    """Bit-pack q; `unpack` is the inverse."""
    tensors = {"codes": _pack_codes(q.codes, q.scheme)}
    for name, part in (("scale", q.scale), ("min", q.min)):
        if isinstance(part, QTensor):
            tensors |= {f"{name}.{key}": value for key, value in pack(part).items()}
        elif part is not None:
            tensors[name] = part
    if q.zero is not None:
        tensors["zero"] = _pack_codes(q.zero, q.scheme)
    if q.input_scale is not None:
        tensors["input_scale"] = q.input_scale
    return tensors


def unpack(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, transposed: bool = False) -> QTensor:
    """Inverse of `pack`, for a tensor of shape [..., N, K]."""
    grid = _grid(scheme, shape)
    parts: dict[str, Scale] = {}
    for name, kind in _parts(scheme):
        parts[name] = unpack(kind, grid, part(tensors, name)) if isinstance(kind, Scheme) else tensors[name]
    return QTensor(
        scheme=scheme,
        codes=_unpack_codes(tensors["codes"], scheme, shape[-1]),
        scale=parts["scale"],
        zero=_unpack_codes(tensors["zero"], scheme, grid[-1]) if scheme.zero else None,
        min=parts.get("min"),
        transposed=transposed,
        input_scale=tensors.get("input_scale"),
    )


def decode_rows(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, rows: Rows) -> torch.Tensor:
    """float32 [R, K]: the chosen rows of a packed [N, K] matrix, equal to `codec.decode` bit for bit.

    rows: indices [R], or a slice whose step is 1. Only their words and scales are touched.
    """
    n, k = shape
    block_rows, block_columns = scheme.block_shape(n, k)
    count = len(range(n)[rows]) if isinstance(rows, slice) else len(rows)
    blocks = rows if block_rows == 1 else _indices(rows, n, tensors["codes"].device) // block_rows
    grid = _grid(scheme, shape)
    codes = bits.unpack(tensors["codes"][rows], scheme.bits, k).reshape(count, grid[1], block_columns)
    zero: torch.Tensor | float = 0.0
    if scheme.zero:
        zero = _offset(bits.unpack(tensors["zero"][blocks], scheme.bits, grid[1]), scheme)[..., None]
    level = _offset(codes, scheme) if isinstance(scheme.levels, IntLevels) else codes
    values = level_values(level, scheme.levels, zero)
    parts = {name: _part_rows(kind, grid, tensors, name, blocks)[..., None] for name, kind in _parts(scheme)}
    values = parts["scale"] * values
    if "min" in parts:
        values = values + parts["min"]
    return values.reshape(count, k)


def code_rows(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, rows: Rows) -> torch.Tensor:
    """float32 [R, K]: the integer codes of the chosen rows of a packed [N, K] matrix."""
    return _offset(bits.unpack(tensors["codes"][rows], scheme.bits, shape[1]), scheme)


def part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def _part_rows(
    kind: FloatType | Scheme, grid: tuple[int, ...], tensors: Tensors, name: str, rows: Rows
) -> torch.Tensor:
    if isinstance(kind, Scheme):
        return decode_rows(kind, grid, part(tensors, name), rows)
    return tensors[name][rows].float()


def _indices(rows: Rows, n: int, device: torch.device) -> torch.Tensor:
    return torch.arange(*rows.indices(n), device=device) if isinstance(rows, slice) else rows


def _parts(scheme: Scheme) -> list[tuple[str, FloatType | Scheme]]:
    return [(name, kind) for name, kind in (("scale", scheme.scale), ("min", scheme.min)) if kind is not None]


def _grid(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    *leading, rows, columns = shape
    block_rows, block_columns = scheme.block_shape(rows, columns)
    return (*leading, rows // block_rows, columns // block_columns)


def _lowest(scheme: Scheme) -> int:
    return scheme.levels.lo if isinstance(scheme.levels, IntLevels) else 0


def _offset(stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Stored uint8 -> float32 code. (int16 would do as well; the product needs float32 anyway.)"""
    return stored.float().add_(_lowest(scheme))


def _pack_codes(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return native.pack(codes.cpu(), scheme.bits, offset=-_lowest(scheme))


def _unpack_codes(words: torch.Tensor, scheme: Scheme, columns: int) -> torch.Tensor:
    low = _lowest(scheme)
    codes = native.unpack(words.cpu(), scheme.bits, columns, offset=-low)
    return codes.view(torch.int8) if low < 0 else codes
