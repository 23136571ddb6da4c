"""A QTensor as named tensors with its codes bit-packed: in memory, and in spicerack's own container.

codes           int32 words [..., N, ceil(K bits / 32)], code - lo, the stream of `bits`;
                K / weights in place of K where a code stands for several weights
scale           [..., N/rows, K/columns] in its stored type; if quantized: scale.codes, scale.scale ...
zero            int32 words [..., N/rows, ceil(K/columns bits / 32)], zero - lo
min             like scale
input_scale     float32 [1], with static activations

What is packed is all that the reference kernel keeps of a weight, on any device: rows are decoded from it as they are
needed (`decode_rows`), and nothing else of a tensor is touched for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spicerack.numerics import bits, native
from spicerack.numerics.qtensor import QTensor, Scale, codes_dtype
from spicerack.numerics.scheme import FloatType, Scheme
from spicerack.numerics.undecoded import Undecoded

Tensors = Mapping[str, torch.Tensor]
"""Packed tensors by the names above, or by those of a kernel."""
Rows = torch.Tensor | slice
"""Rows of a matrix: indices int64 [R], or a slice whose step is 1."""


def pack(q: QTensor) -> dict[str, torch.Tensor]:
    """Bit-pack q into tensors of the names, types and shapes that `storage.layouts.container` says; `unpack` is the
    inverse."""
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
    """Inverse of `pack`, for a tensor of shape [..., N, K]. Raises KeyError for a missing tensor, and ShapeError."""
    groups, parts = scheme.scale_shape(shape), _unpacked_parts(scheme, shape, tensors)
    return QTensor(
        scheme=scheme,
        codes=_unpack_codes(tensors["codes"], scheme, scheme.codes_shape(shape)[-1]),
        scale=parts["scale"],
        zero=_unpack_codes(tensors["zero"], scheme, groups[-1]) if scheme.zero else None,
        min=parts.get("min"),
        transposed=transposed,
        input_scale=tensors.get("input_scale"),
    )


def undecoded(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, transposed: bool = False) -> Undecoded:
    """What `unpack` gives of a matrix [N, K] whose codes are one weight's each, with them as they lie in the words."""
    (n, k), parts = shape, _unpacked_parts(scheme, shape, tensors)
    zero = _unpack_codes(tensors["zero"], scheme, scheme.scale_shape(shape)[-1]) if scheme.zero else None
    return Undecoded(
        scheme=scheme,
        shape=(n, k),
        order="stream",
        data=tensors["codes"],
        scale=parts["scale"],
        zero=zero,
        input_scale=tensors.get("input_scale"),
        transposed=transposed,
        min=parts.get("min"),
    )


def _unpacked_parts(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors) -> dict[str, Scale]:
    """Scales, and minima if any, of a packed tensor [..., N, K], by name."""
    groups = scheme.scale_shape(shape)
    return {
        name: unpack(kind, groups, part(tensors, name)) if isinstance(kind, Scheme) else tensors[name]
        for name, kind in _parts(scheme)
    }


def decode_rows(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, rows: Rows) -> torch.Tensor:
    """float32 [R, K]: the chosen rows of a packed [N, K] matrix, equal to `codec.decode` bit for bit.

    Only the words and scales of those rows are touched.
    """
    n, k = shape
    group_rows, group_columns = scheme.group_shape(n, k)
    count = len(range(n)[rows]) if isinstance(rows, slice) else len(rows)  # without making the indices
    groups = rows if group_rows == 1 else _indices(rows, n, tensors["codes"].device) // group_rows
    grid = scheme.scale_shape(shape)
    codes = bits.unpack(tensors["codes"][rows], scheme.bits, scheme.codes_shape(shape)[-1])
    codes = codes.reshape(count, grid[1], group_columns // scheme.levels.weights)
    zero: torch.Tensor | float = 0.0
    if scheme.zero:
        zero = _codes(bits.unpack(tensors["zero"][groups], scheme.bits, grid[1]), scheme)[..., None]
    values = scheme.levels.decode(_codes(codes, scheme), zero)
    parts = {name: _part_rows(kind, grid, tensors, name, groups)[..., None] for name, kind in _parts(scheme)}
    values = parts["scale"] * values
    if "min" in parts:
        values = values + parts["min"]
    return values.reshape(count, k)


def code_rows(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors, rows: Rows) -> torch.Tensor:
    """float32 [R, K]: the codes of the chosen rows of a packed [N, K] matrix, as integers from the scheme's lowest on.

    For products in integers; a scheme whose codes stand for several weights has no such rows.
    """
    return _codes(bits.unpack(tensors["codes"][rows], scheme.bits, scheme.codes_shape(shape)[-1]), scheme).float()


def part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def _part_rows(
    kind: FloatType | Scheme, grid: tuple[int, ...], tensors: Tensors, name: str, rows: Rows
) -> torch.Tensor:
    """Scales or minima of the chosen rows of a packed matrix, float32 [R, groups of a row].

    kind: how they are stored, maybe quantized themselves. grid: their shape [rows, groups]. name: "scale" or "min".
    rows: which rows of that shape.
    """
    if isinstance(kind, Scheme):
        return decode_rows(kind, grid, part(tensors, name), rows)
    return tensors[name][rows].float()


def _indices(rows: Rows, n: int, device: torch.device) -> torch.Tensor:
    """Rows as indices int64 [R], on `device`: a slice of n rows spelled out, indices as they are."""
    return torch.arange(*rows.indices(n), device=device) if isinstance(rows, slice) else rows


def _parts(scheme: Scheme) -> list[tuple[str, FloatType | Scheme]]:
    """(name, how it is stored) of the floats that a scheme has for each group: its scale, and its minimum if any."""
    return [(name, kind) for name, kind in (("scale", scheme.scale), ("min", scheme.min)) if kind is not None]


def _codes(stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """uint8 from the stream -> codes, in any type: float32 where the smallest is not 0, as the product needs it."""
    return stored.float().add_(scheme.levels.lo) if scheme.levels.lo else stored


def _pack_codes(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes or zero points [..., C] of the scheme's range -> words, each less the lowest code, so that none is
    negative."""
    return native.pack(codes.cpu(), scheme.bits, offset=-scheme.levels.lo)


def _unpack_codes(words: torch.Tensor, scheme: Scheme, columns: int) -> torch.Tensor:
    """Inverse of `_pack_codes`: words of `columns` codes -> codes of the scheme's type, on the CPU."""
    codes = native.unpack(words.cpu(), scheme.bits, columns, offset=-scheme.levels.lo)
    return codes.view(codes_dtype(scheme))
