"""The specification: how numbers become codes and back. Slow, exact, in torch; fast paths must equal it bit for bit.

    encode: the search (search.py; superblocks/ where groups have minima or scales are quantized themselves) finds
            scale s and zero z, or minimum, of every group; then q = nearest code to (x - min) / s
    decode: w = s * (level[q] - z) + min

Codes are chosen against the scale as stored, never against the one that was meant. A group is a row of a matrix [M, B]
while it is worked on, whatever its shape in the tensor; one matrix of scales [M, 1] goes with it.

What quantization would ruin is refused here too, by name: weights that are not finite, and groups whose scale the type
of scales cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spicerack.errors import WeightError
from spicerack.numerics.qtensor import QTensor, Scale, codes_dtype
from spicerack.numerics.scales import dtype_of, smallest_scale
from spicerack.numerics.scheme import FloatType, Scheme
from spicerack.numerics.search import Range, TensorGroups, search
from spicerack.numerics.superblocks.search import Blocks, Fitted, Form, codes_of, fit, form_of, usable, values

FLUSH = 1e-4
"""A group this much smaller than the tensor's largest weight may be rounded up to the smallest stored scale."""


# ---- groups ---------------------------------------------------------------------------------------------------------


def to_groups(w: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """[..., N, K] -> [groups, elements], groups in the order of the scales [..., N/rows, K/columns]."""
    rows, columns = group
    *leading, n, k = w.shape
    tiles = w.reshape(*leading, n // rows, rows, k // columns, columns).transpose(-3, -2)
    return tiles.reshape(-1, rows * columns)


def from_groups(groups: torch.Tensor, shape: tuple[int, ...], group: tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_groups`: [groups, elements] -> a tensor of `shape`, [..., N, K]; `group` is that of
    `to_groups`."""
    rows, columns = group
    *leading, n, k = shape
    return groups.reshape(*leading, n // rows, k // columns, rows, columns).transpose(-3, -2).reshape(shape)


def _codes_group(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """The group of weights [..., N, K] in codes: fewer columns where a code stands for several weights."""
    rows, columns = scheme.group_shape(*shape[-2:])
    return rows, columns // scheme.levels.weights


# ---- encode and decode ----------------------------------------------------------------------------------------------


def encode(
    w: torch.Tensor,
    scheme: Scheme,
    *,
    range_: Range = "opt",
    importance: torch.Tensor | None = None,
    name: str = "weight",
    source: torch.dtype | None = None,
) -> QTensor:
    """Quantize w [..., N, K]: the specification of `rounding.to_nearest`.

    w            any float type, on any device; codes lie where w does
    scheme       what its numbers are to be
    range_       how scales are chosen: by the least error, or by the largest weight
    importance   [K] or of w's shape, not negative: how much an error in each weight matters (mean square of its input)
    name         of the tensor, for errors
    source       the type that decides that of scales; w's own if None

    Raises ShapeError for a shape that groups do not tile, and WeightError naming tensor, place and value.
    """
    shape = tuple(w.shape)
    source = source or w.dtype
    scheme.check_shape(name, shape)
    check_finite(w.float(), name)
    form = form_of(scheme, shape[-1], source)
    if form is not None:
        return _encode_blocks(w, scheme, form, range_, importance, name)
    group, groups = scheme.group_shape(*shape[-2:]), scheme.scale_shape(shape)
    x = to_groups(w.float(), group)
    a = None if importance is None else to_groups(importance.float().expand(shape), group)
    min_: Scale | None = None
    if scheme.min is not None:
        lowest = x.amin(1).clamp(max=0).reshape(groups)
        min_, stored_min = _encode_part(lowest, scheme.min, range_, source, name)
        x = x - stored_min[:, None]
    best, zero = _searched(TensorGroups(x, scheme, a), dtype_of(scheme.scale, source), groups, range_, name)
    if isinstance(scheme.scale, Scheme):  # a block of zeros must not widen the range of its neighbours' scales
        best = torch.where(x.any(1).reshape(groups), best, 0.0)
    scale, stored = _encode_part(best, scheme.scale, range_, source, name)
    # multiplied by the inverse and not divided: that is what native code does, and the two may differ by a code
    inverse = torch.where(stored == 0, 0, 1 / stored)[:, None]
    codes = scheme.levels.encode(x * inverse, zero[:, None])
    codes = from_groups(codes, scheme.codes_shape(shape), _codes_group(scheme, shape))
    return QTensor(
        scheme=scheme,
        codes=codes.to(codes_dtype(scheme)).contiguous(),
        scale=scale,
        zero=zero.reshape(groups).to(torch.int8) if scheme.zero else None,
        min=min_,
    )


def _encode_blocks(
    w: torch.Tensor, scheme: Scheme, form: Form, range_: Range, importance: torch.Tensor | None, name: str
) -> QTensor:
    """`encode` of weights [..., N, K] whose super-blocks are searched together."""
    grid = (-1, form.groups, form.columns)
    x = w.float().reshape(grid)
    blocks = Blocks(x, None if importance is None else importance.float().expand(w.shape).reshape(grid), form)
    fitted = fit(blocks, range_)
    if not bool(usable(fitted, form).all()):
        fitted = _raised(blocks, fitted, (*w.shape[:-1], -1), name)
    return of_blocks(scheme, form, tuple(w.shape), fitted, blocks.levels(*values(fitted)))


def of_blocks(scheme: Scheme, form: Form, shape: tuple[int, ...], fitted: Fitted, codes: torch.Tensor) -> QTensor:
    """The QTensor of weights of `shape` that super-blocks and codes [S, G, B] make."""
    floats = (*shape[:-1], -1)
    groups = scheme.scale_shape(shape)

    def part(
        kind: FloatType | Scheme | None, value: torch.Tensor, integers: torch.Tensor, dtype: torch.dtype
    ) -> Scale | None:
        stored = value.to(dtype).reshape(floats)
        if not isinstance(kind, Scheme):
            return None if kind is None else stored
        return QTensor(kind, integers.reshape(groups).to(codes_dtype(kind)), stored)

    scale = part(scheme.scale, fitted.scale, fitted.scale_codes, form.scale_dtype)
    assert scale is not None
    return QTensor(
        scheme=scheme,
        codes=codes.reshape(shape).to(codes_dtype(scheme)).contiguous(),
        scale=scale,
        min=part(scheme.min, fitted.min, fitted.min_codes, form.min_dtype),
    )


def _raised(blocks: Blocks, fitted: Fitted, floats: tuple[int, ...], name: str) -> Fitted:
    """The same with floats of super-blocks that came out as 0 rounded up where that is harmless, by `check_scale`."""
    form, low = blocks.form, -blocks.x.amin((1, 2)).clamp(max=0)
    peak = blocks.x.abs().amax((1, 2)).reshape(floats)
    d = check_scale(peak, fitted.scale.reshape(floats), form.scale_dtype, name).reshape(-1)
    e = fitted.min
    if form.min is not None:
        e = -check_scale(low.reshape(floats), -e.reshape(floats), form.min_dtype, f"{name} (minima)").reshape(-1)
    return codes_of(blocks, d, e)


def _searched(
    weights: TensorGroups, dtype: torch.dtype, groups: tuple[int, ...], range_: Range, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, of the shape `groups`, and zero points [M] that the search finds, in stored values, float32.

    dtype: that scales are stored in. name: of the tensor, for errors. Raises WeightError for a scale that `dtype`
    cannot hold.
    """
    best, zero = search(weights, weights.scheme, dtype, range_)
    best = best.reshape(groups)
    if not scale_fits(best):
        best = check_scale(weights.x.abs().amax(1).reshape(groups), best, dtype, name)
    return best, zero


def _encode_part(
    values: torch.Tensor, kind: FloatType | Scheme, range_: Range, source: torch.dtype, name: str
) -> tuple[Scale, torch.Tensor]:
    """Store a scale or minimum -> (as stored, the float32 values [M] that readers will see).

    values: float32, of the scales' shape. kind: a float type, or the scheme that quantizes them in turn. source: the
    weights' type, which "source" goes by. name: of the tensor, for errors.
    """
    if isinstance(kind, Scheme):
        part = encode(values, kind, range_=range_, name=f"{name} ({kind.name})")
        return part, decode(part).reshape(-1)
    stored = values.to(dtype_of(kind, source))
    return stored, stored.float().reshape(-1)


def decode(q: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers that q stands for, [..., N, K] in `dtype`: float32 arithmetic, rounded once at the end.

    The checkpoint's order is restored: [..., K, N] where the tensor is transposed.
    """
    codes = to_groups(q.codes, _codes_group(q.scheme, q.shape))
    zero = 0.0 if q.zero is None else q.zero.reshape(-1, 1).float()
    x = _part_values(q.scale) * q.scheme.levels.decode(codes, zero)
    if q.min is not None:
        x = x + _part_values(q.min)
    w = from_groups(x, q.shape, q.scheme.group_shape(*q.shape[-2:])).to(dtype)
    return w.transpose(-1, -2) if q.transposed else w


def decode_rows(q: QTensor, rows: int) -> Iterator[torch.Tensor]:
    """`decode` in float32, `rows` of the flattened [rows, K] matrix at a time, output rows first: for what must not be
    in memory as a whole.

    rows: of whole groups, a multiple of the group's own rows; the last piece may have fewer.
    """
    *_, n, k = q.shape
    group_rows, group_columns = q.scheme.group_shape(n, k)
    codes = q.codes.reshape(-1, q.codes.shape[-1])
    parts = [
        None if part is None else _part_values(part).reshape(-1, k // group_columns)
        for part in (q.scale, q.zero, q.min)
    ]
    for start in range(0, len(codes), rows):
        chunk = codes[start : start + rows]
        groups = slice(start // group_rows, (start + len(chunk)) // group_rows)
        scale, zero, low = (None if part is None else part[groups].reshape(-1, 1) for part in parts)
        assert scale is not None
        v = q.scheme.levels.decode(to_groups(chunk, _codes_group(q.scheme, q.shape)), 0.0 if zero is None else zero)
        x = scale * v if low is None else scale * v + low
        yield from_groups(x, (len(chunk), k), (group_rows, group_columns))


def _part_values(part: Scale) -> torch.Tensor:
    """Scales, zero points or minima as they count in arithmetic, float32 [M, 1]."""
    values = decode(part) if isinstance(part, QTensor) else part.float()
    return values.reshape(-1, 1)


# ---- what is refused ------------------------------------------------------------------------------------------------


def check_finite(w: torch.Tensor, name: str) -> None:
    """Raise WeightError naming the first NaN or infinity of w, its place, and how many there are; return if there is
    none."""
    bad = ~torch.isfinite(w)
    if bool(bad.any()):
        place = [int(i) for i in bad.nonzero()[0]]
        value = float(w[tuple(place)])
        raise WeightError(
            f"{name}: {int(bad.sum())} weights are not finite; the first is {value} at {place}",
            "the checkpoint is damaged or was saved from a diverged run: repair it, or skip this tensor",
        )


def scale_fits(scale: torch.Tensor) -> bool:
    """Whether no stored scale came out as 0 or infinite: then codes that were chosen against them are of use."""
    return bool(((scale != 0) & torch.isfinite(scale)).all())


def check_scale(peak: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Stored scales [..., N/rows, K/columns], zeros rounded up where that is harmless; WeightError where it is not.

    peak: each group's largest magnitude. Harmless: it is FLUSH times smaller than the tensor's, so that the group's
    error is below anything visible.
    """
    remedy = "convert the model to bfloat16 first, or skip this tensor"
    over = ~torch.isfinite(scale)
    if bool(over.any()):
        limit = f"needs a scale above {torch.finfo(dtype).max:.3g}, the largest {str(dtype).removeprefix('torch.')}"
        raise WeightError(f"{name}: {_place(over, peak)} {limit}", remedy)
    lost = scale == 0
    harmful = lost & (peak > FLUSH * peak.max())
    if bool(harmful.any()):
        limit = f"needs a scale below {smallest_scale(dtype):.3g}, the smallest {str(dtype).removeprefix('torch.')}"
        raise WeightError(f"{name}: {_place(harmful, peak)} {limit}", remedy)
    return torch.where(lost, smallest_scale(dtype), scale)


def _place(bad: torch.Tensor, peak: torch.Tensor) -> str:
    """The first group that is bad, by its place among the scales, and its largest weight, for a message."""
    place = [int(i) for i in bad.nonzero()[0]]
    return f"block {place} with weights up to {float(peak[tuple(place)]):.3g}"
