"""The specification of the search where groups have minima, or scales that are quantized themselves.

    w = s * v + m,     s = d * p,     m = e * r         v, p, r integers; d and e floats of a super-block of groups

as llama.cpp's types have them.

A super-block is fitted to its weights x with importances a in three steps; each looks at sums of a row's own only.

1. Lines. For every group the real s and m with the least error: codes come from scales around that of the range, and
   the least-squares line through each choice of codes says how much of sum(a x^2) it explains. The best is coded anew
   by its own line, twice.
2. Shares. d and p from the lines' scales, each weighted by how fast the error grows beside it; then e and r from the
   minima that are best for d * p. d comes from the largest scale on a code or between two, then by least squares.
3. Rounds. With all codes as they are d and e are solved for together; then p and r of each group move by one where that
   makes the error smaller. Whatever is judged has been rounded as it is stored, and its codes are chosen anew.

Where a super-block is no better then than plainly rounded ("absmax": s and m from the range, d and e from the largest
of them), it stays so. Scales and minima that are floats of each group, without anything above them, go through 1, and
through 3 with p = r = 1.

Arithmetic of weights is float32, unfused, and sums are those of `search.piece_sum`; what is done with sums is float64.
Native code (native/quantizers/superblocks.cpp) follows it bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scales import SMALLEST, dtype_of, store
from spicerack.numerics.scheme import FloatType, Scheme
from spicerack.numerics.search import PIECE, Range, piece_sum

LINES = 24
"""Scales from which codes of lines are tried. With 48 the error of q2_k is .1 % smaller."""
TOP, SPAN = 1.0, 0.3
"""Those scales put the group's largest weight on TOP codes above the last one, down to SPAN of all codes below it."""
REFINEMENTS = 2
"""How often a line is laid through the codes that it gives itself."""
SHARES, SHARE_STEP = 16, 0.25
"""Floats of a super-block that are tried: its largest scale on the last code + 1, and down in steps of a code."""
ROUNDS = 2
"""How often d and e, and then the codes of scales and minima, are chosen anew."""
_FLAT = 1e-5
"""Share of the product of sums below which their determinant is float32's rounding, and no line is defined."""
_BETTER = 1 - 1e-9
"""A tie, as in `search.Fit.better`: equal candidates must not differ by the rounding of their sums."""


@dataclass(frozen=True, slots=True)
class Form:
    """What of a scheme the search asks.

    levels        of codes
    groups        that share d and e: 1 where scales are floats
    columns       of a group
    scale, min    the integers that scales and minima are in units of d and e; None where they are floats
    has_min       whether there are minima at all
    scale_dtype, min_dtype   that d and e (or scales and minima) are stored in
    """

    levels: IntLevels
    groups: int
    columns: int
    scale: IntLevels | None
    min: IntLevels | None
    has_min: bool
    scale_dtype: torch.dtype
    min_dtype: torch.dtype


def form_of(scheme: Scheme, columns: int, source: torch.dtype) -> Form | None:
    """How `scheme` is searched here for rows of `columns` weights that were of type `source`; None if it is not.

    It is where all levels are integers, groups lie in rows and are no longer than a piece, and scales are quantized
    over neighbours in the row or minima are there.
    """
    integers, (rows, group) = scheme.levels.integers, scheme.group
    if integers is None or integers.half or rows != 1 or (scheme.min is None and not isinstance(scheme.scale, Scheme)):
        return None
    scale, low = _part(scheme.scale, source), None if scheme.min is None else _part(scheme.min, source)
    if scale is None or (scheme.min is not None and (low is None or low[0] != scale[0])):
        return None
    if (group or columns) > PIECE:
        return None
    return Form(
        integers, scale[0], group or columns, scale[1], None if low is None else low[1], low is not None,
        scale[2], scale[2] if low is None else low[2],
    )  # fmt: skip


def _part(kind: FloatType | Scheme, source: torch.dtype) -> tuple[int, IntLevels | None, torch.dtype] | None:
    """Of scales or minima: groups that share a float, integers in units of it, its type; None for other kinds."""
    if not isinstance(kind, Scheme):
        return 1, None, dtype_of(kind, source)
    rows, groups = kind.group
    plain = kind.levels.integers is not None and kind.plain_obstacle is None and not kind.zero
    if not plain or rows != 1 or groups is None or isinstance(kind.scale, Scheme):
        return None
    return groups, kind.levels.integers, dtype_of(kind.scale, source)


class Fitted(NamedTuple):
    """Super-blocks as they are stored.

    scale, min               d and e as they are stored, float32 [S]; minima are e * r, so e is not positive (or 1,
                             where all r are 0); 0 without minima
    scale_codes, min_codes   p and r, integers [S, G] of any type; ones where scales are floats
    """

    scale: torch.Tensor
    scale_codes: torch.Tensor
    min: torch.Tensor
    min_codes: torch.Tensor


class _Sums(NamedTuple):
    """sum a v x, sum a v v and sum a v of groups with codes v, float64 [S, G]."""

    xv: torch.Tensor
    vv: torch.Tensor
    v: torch.Tensor


class Blocks:
    """Super-blocks x float32 [S, G, B], with importances a of that shape or None: what they are judged by."""

    def __init__(self, x: torch.Tensor, a: torch.Tensor | None, form: Form) -> None:
        """Take the sums that do not depend on codes."""
        self.x, self.a, self.form = x, a, form
        ones = torch.ones_like(x) if a is None else a
        self.weight, self.total = self._sum(ones), self._sum(x if a is None else a * x)

    def _sum(self, terms: torch.Tensor) -> torch.Tensor:
        """float32 [S, G, B] -> float64 [S, G]."""
        return piece_sum(terms.reshape(-1, terms.shape[-1])).reshape(terms.shape[:-1])

    def levels(self, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """v of the nearest codes for scales s and minima m, float32 [S, G] -> float32 [S, G, B]."""
        u = self.x - m[..., None] if self.form.has_min else self.x
        return (u * _inverse(s)[..., None]).round().clamp(self.form.levels.lo, self.form.levels.hi)

    def sums(self, v: torch.Tensor) -> _Sums:
        """Sums of codes v."""
        av = v if self.a is None else self.a * v
        return _Sums(self._sum(av * self.x), self._sum(av * v), self._sum(av))

    def errors(self, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """sum a (s v + m - x)^2 of every group, float64 [S, G]."""
        y = s[..., None] * self.levels(s, m)
        e = (y + m[..., None] if self.form.has_min else y) - self.x
        return self._sum((e if self.a is None else self.a * e) * e)

    def line(self, sums: _Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The least-squares s and m through codes, float64 [S, G], and what it explains of sum a x^2; -1 for none."""
        if not self.form.has_min:
            s = sums.xv / sums.vv
            return s, torch.zeros_like(s), torch.where(sums.vv > 0, s * sums.xv, -1.0)
        product = self.weight * sums.vv
        spread = product - sums.v * sums.v
        s = (self.weight * sums.xv - sums.v * self.total) / spread
        m = (self.total - s * sums.v) / self.weight
        usable = (spread > _FLAT * product) & (s > 0)
        if self.form.min is not None:  # minima of a super-block have one sign
            above = usable & (m > 0)
            s, m = torch.where(above, sums.xv / sums.vv, s), torch.where(above, 0.0, m)
        return s, m, torch.where(usable, s * sums.xv + m * self.total, -1.0)


def fit(blocks: Blocks, range_: Range = "opt") -> Fitted:
    """d, p, e and r of super-blocks, see the top of this file.

    Where a float comes out as infinite or, of weights that are not all 0, as 0, it is for the caller to refuse or to
    raise: then nothing was searched.
    """
    low, raw = _range(blocks)
    plain = _shared(blocks, raw, low, search=False)
    if range_ == "absmax":
        return plain
    s, m = _lines(blocks, low, raw)
    best = _rounds(blocks, _shared(blocks, s, m, search=True))
    better = _total(_error(blocks, best)) < _total(_error(blocks, plain)) * _BETTER
    return _chosen(better & usable(plain, blocks.form) & usable(best, blocks.form), best, plain)


def usable(fitted: Fitted, form: Form) -> torch.Tensor:
    """Which super-blocks [S] have no float that is infinite or that rounded to 0, so that codes mean something."""
    floats = torch.isfinite(fitted.scale) & (fitted.scale != 0) & torch.isfinite(fitted.min)
    return floats if form.min is None else floats & ((fitted.min != 0) | (fitted.min_codes == 0).all(1))


def _chosen(take: torch.Tensor, new: Fitted, old: Fitted) -> Fitted:
    """`new` in those super-blocks where `take` [S] is true, else `old`."""
    return Fitted(*(torch.where(take if n.dim() == 1 else take[:, None], n, o) for n, o in zip(new, old, strict=True)))


def codes_of(blocks: Blocks, scale: torch.Tensor, low: torch.Tensor) -> Fitted:
    """The super-blocks with floats d and e that are given, float32 [S]: codes of the ranges' scales and minima."""
    m, s = _range(blocks)
    ones = torch.ones_like(s)
    p = ones if blocks.form.scale is None else _codes(s, scale, blocks.form.scale)
    r = ones if blocks.form.min is None else _codes(m, low, blocks.form.min)
    return Fitted(scale, p, low, r if blocks.form.has_min else torch.zeros_like(s))


def values(fitted: Fitted) -> tuple[torch.Tensor, torch.Tensor]:
    """s and m of every group, float32 [S, G], as readers compute them."""
    return fitted.scale[:, None] * fitted.scale_codes, fitted.min[:, None] * fitted.min_codes


def _error(blocks: Blocks, fitted: Fitted) -> torch.Tensor:
    """The error of every group, float64 [S, G]."""
    return blocks.errors(*values(fitted))


# ---- 1. lines --------------------------------------------------------------------------------------------------------


def _range(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum, and the scale with which codes just span a group's weights, float32 [S, G]."""
    levels, bottom, top = blocks.form.levels, blocks.x.amin(-1), blocks.x.amax(-1)
    if not blocks.form.has_min:
        longer = levels.lo if -levels.lo > levels.hi else levels.hi
        return torch.zeros_like(top), torch.where(top > -bottom, top, bottom) / longer
    low = bottom.clamp(max=0) if blocks.form.min is not None else bottom
    return low, (top.maximum(low) - low) / levels.hi


def steps(form: Form) -> tuple[float, ...]:
    """What the scale of the range is multiplied with for each of the scales that are tried, of both signs where codes
    have both."""
    last = max(form.levels.hi, -form.levels.lo)
    inverse = [(last + TOP - i * (TOP + SPAN * last) / (LINES - 1)) / last for i in range(LINES)]
    return tuple(sign * one for one in inverse for sign in ((1.0,) if form.has_min else (1.0, -1.0)))


def _lines(blocks: Blocks, low: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s and m of every group, float32 [S, G]."""
    s, m, gain = raw, low, torch.zeros_like(raw, dtype=torch.float64)
    inverse = _inverse(raw)
    u = blocks.x - low[..., None] if blocks.form.has_min else blocks.x
    for step in steps(blocks.form):
        factor = inverse * torch.tensor(step, dtype=torch.float32, device="cpu")
        v = (u * factor[..., None]).round().clamp(blocks.form.levels.lo, blocks.form.levels.hi)
        s, m, gain = _better_line(blocks, v, s, m, gain)
    for _ in range(REFINEMENTS):
        s, m, gain = _better_line(blocks, blocks.levels(s, m), s, m, gain)
    return s, m


def _better_line(
    blocks: Blocks, v: torch.Tensor, s: torch.Tensor, m: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s, m and gain of the line through codes v where it explains more than the one at hand."""
    new_s, new_m, new_gain = blocks.line(blocks.sums(v))
    take = new_gain > gain
    return torch.where(take, new_s.float(), s), torch.where(take, new_m.float(), m), torch.where(take, new_gain, gain)


# ---- 2. shares -------------------------------------------------------------------------------------------------------


def _shared(blocks: Blocks, s: torch.Tensor, m: torch.Tensor, *, search: bool) -> Fitted:
    """d, p, e and r for scales s and minima m, float32 [S, G].

    search: by least squares; else from the largest alone, with m as it is.
    """
    form, sums = blocks.form, blocks.sums(blocks.levels(s, m))
    stiff = sums.vv
    if form.has_min:
        stiff = sums.vv - sums.v * sums.v / blocks.weight
    d, p = _share(s, torch.where(stiff > 0, stiff, 0.0), form.scale, form.scale_dtype, search=search)
    if form.scale is None:  # of a group of one number, which is its minimum
        d = torch.where(s[:, 0] == 0, 1.0, d)
    if not form.has_min:
        return Fitted(d, p, torch.zeros_like(d), torch.zeros_like(p))
    if search:
        chosen = (d[:, None] * p).double()
        m = ((blocks.total - chosen * sums.v) / blocks.weight).float()
        m = m.clamp(max=0) if form.min is not None else m
        m = torch.where(torch.isfinite(m), m, 0.0)
    return Fitted(d, p, *_share(m, blocks.weight, form.min, form.min_dtype, search=search))


def _share(
    part: torch.Tensor, weight: torch.Tensor, levels: IntLevels | None, dtype: torch.dtype, *, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float [S] as stored and codes [S, G] whose products are near `part`, float32 [S, G], by `weight`, float64.

    Without levels: part itself, as stored, and ones. Else the float of zeros is 1.
    """
    if levels is None:
        return store(part[:, 0], dtype), torch.ones_like(part)
    last = levels.hi if levels.hi >= -levels.lo else levels.lo
    top, bottom = part.amax(1), part.amin(1)
    largest = torch.where(top > -bottom, top, bottom)
    d = store(largest / last, dtype)
    if search:
        best = torch.full_like(weight[:, 0], torch.inf)
        d = d.clone()
        for i in range(SHARES + REFINEMENTS):
            step = last + (1.0 - i * SHARE_STEP) * (1 if last > 0 else -1)
            start = largest / torch.tensor(step, dtype=torch.float32, device="cpu") if i < SHARES else d
            p = _codes(part, start, levels).double()
            solved = store((_total(weight * part * p) / _total(weight * p * p)).float(), dtype)
            apart = part.double() - solved.double()[:, None] * p
            error = _total(weight * apart * apart)
            take = error < best * _BETTER  # never where it is not a number
            best, d = torch.where(take, error, best), torch.where(take, solved, d)
    return torch.where(largest == 0, 1.0, d), _codes(part, d, levels)


def _codes(part: torch.Tensor, d: torch.Tensor, levels: IntLevels) -> torch.Tensor:
    """Codes float32 [S, G] nearest to part / d."""
    return (part * _inverse(d)[:, None]).round().clamp(levels.lo, levels.hi)


def _inverse(s: torch.Tensor) -> torch.Tensor:
    """1 / s, or 0 where that would be infinite."""
    return torch.where(s.abs() < SMALLEST, 0.0, 1 / s)


def _total(terms: torch.Tensor) -> torch.Tensor:
    """float64 [S, G] -> [S], added in turn."""
    return terms.cumsum(1)[:, -1]


# ---- 3. rounds -------------------------------------------------------------------------------------------------------


def _rounds(blocks: Blocks, now: Fitted) -> Fitted:
    """`now`, better."""
    form = blocks.form
    error = _error(blocks, now)
    for _ in range(ROUNDS):
        sums = blocks.sums(blocks.levels(*values(now)))
        new = _solved(blocks, now, sums)
        new_error = _error(blocks, new)
        take = _total(new_error) < _total(error) * _BETTER
        now = _chosen(take, new, now)
        error = torch.where(take[:, None], new_error, error)
        for move in (1.0, -1.0):
            if form.scale is not None:
                p = (now.scale_codes + move).clamp(form.scale.lo, form.scale.hi)
                r = _best_minimum(blocks, now, p, sums) if form.min is not None else now.min_codes
                now, error = _moved(blocks, now, error, p, r)
        for move in (1.0, -1.0):
            if form.min is not None:
                r = (now.min_codes + move).clamp(form.min.lo, form.min.hi)
                now, error = _moved(blocks, now, error, now.scale_codes, r)
    return now


def _moved(
    blocks: Blocks, now: Fitted, error: torch.Tensor, p: torch.Tensor, r: torch.Tensor
) -> tuple[Fitted, torch.Tensor]:
    """`now` with other codes of scales and minima in those groups where they have less error, and the errors."""
    new = now._replace(scale_codes=p, min_codes=r)
    new_error = _error(blocks, new)
    take = new_error < error * _BETTER
    codes = (torch.where(take, p, now.scale_codes), torch.where(take, r, now.min_codes))
    return now._replace(scale_codes=codes[0], min_codes=codes[1]), torch.where(take, new_error, error)


def _best_minimum(blocks: Blocks, now: Fitted, p: torch.Tensor, sums: _Sums) -> torch.Tensor:
    """r [S, G] that is best beside other codes of scales p, with the weights' codes as they were."""
    assert blocks.form.min is not None
    s = (now.scale[:, None] * p).double()
    m = ((blocks.total - s * sums.v) / blocks.weight).float()
    return _codes(torch.where(torch.isfinite(m), m, 0.0), now.min, blocks.form.min)


def _solved(blocks: Blocks, now: Fitted, sums: _Sums) -> Fitted:
    """d and e by least squares, with all codes as they are; as they were where that has no solution that is stored."""
    form = blocks.form
    p, r = now.scale_codes.double(), now.min_codes.double()
    pp, px = _total(p * p * sums.vv), _total(p * sums.xv)
    if not form.has_min:
        return now._replace(scale=_usable(px / pp, now.scale, form.scale_dtype))
    rr, pr, rx = _total(r * r * blocks.weight), _total(p * r * sums.v), _total(r * blocks.total)
    product = pp * rr
    spread = product - pr * pr
    both = spread > _FLAT * product
    d = torch.where(both, (px * rr - rx * pr) / spread, px / pp)
    e = torch.where(both, (rx * pp - px * pr) / spread, now.min.double())
    if form.min is None:
        return now._replace(scale=_usable(d, now.scale, form.scale_dtype), min=_finite(e, now.min, form.min_dtype))
    return now._replace(scale=_usable(d, now.scale, form.scale_dtype), min=_usable(e, now.min, form.min_dtype))


def _usable(solved: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`solved`, float64 [S], as stored; where that is 0 or not finite the old one."""
    stored = store(solved.float(), dtype)
    return torch.where(torch.isfinite(stored) & (stored != 0), stored, old)


def _finite(solved: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`solved`, float64 [S], as stored; where that is not finite the old one."""
    stored = store(solved.float(), dtype)
    return torch.where(torch.isfinite(stored), stored, old)
