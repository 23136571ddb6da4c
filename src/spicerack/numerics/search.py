"""The specification of the range search: which scale (and zero) a group gets. In torch; native/quantizers/ equals it.

For a group x with importance a >= 0 (one by default) the search looks for the stored scale s and zero z that minimize

    E(s, z) = sum_j a_j (s * v_j - x_j)^2,      v_j = level[q_j] - z,     q_j = nearest code to x_j / s

`absmax` takes the scale that puts the group's largest magnitude on the outermost code (with a zero point: that spans
minimum and maximum). `opt` starts there and goes from coarse to fine: scales down to 1/12 of that one, of both signs;
then a few percent up and down from the best; then least squares with the codes fixed, s = sum(a x v) / sum(a v v).
Every candidate is rounded to the type it will be stored in before it is judged, so `opt` is never worse than `absmax`,
and what is judged is what is shipped.

Of the levels -1, 0, 1 the least error is known: whatever the scale, the weights that are not 0 are those of largest
magnitude, so `opt` takes the k for which (sum a |x|)^2 / sum a over the k largest is greatest, and s is their mean.

Arithmetic is float32, unfused. Sums fold runs of 16 neighbours in pairs in float32, add the runs of a piece of 2^16
elements in turn in float64, and then the pieces: an order that vector code of any width can follow bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from spicerack.numerics.levels import Levels
from spicerack.numerics.scales import smallest_scale, store
from spicerack.numerics.scheme import Scheme

Range = Literal["absmax", "opt"]
"""How a group's scale is chosen: from its largest magnitude, or by the search."""

DIVISORS: tuple[float, ...] = tuple(1.25**i for i in range(12))
"""Coarse: divisors of the absmax scale. The largest, 11.6, is for 2-bit rows with far outliers."""
POWERS: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Coarse divisors for scales that are powers of two, which finer steps would never reach."""
FINE: tuple[tuple[float, float], ...] = tuple((step, 1 / step) for step in (1.12, 1.06, 1.03, 1.015))
"""Fine: factors tried up and down from the best scale so far."""
SHIFTS: tuple[float, ...] = (-1.0, 0.0, 1.0)
"""Zero points tried at every coarse scale, around the one that centres the range."""
REFINEMENTS = 2
"""Least squares with the codes fixed is done so often: codes change with the scale, and the scale with the codes."""
RUN = 16
"""Neighbours whose terms are summed in float32, in pairs: one vector of 512 bits, two of 256 or four of 128."""
PIECE = 1 << 16
"""Elements of a group whose sums are in one float64 chain; longer groups are judged piece by piece, so that threads can
share them and no temporary is larger than a piece. Part of the specification: another value changes the last bits."""
SORTED = 1 << 20
"""Weights that are sorted at once, in whole groups: order and sums take far more memory than the weights."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One candidate per group, judged.

    scale    [M], stored values, float32
    zero     [M], float32
    error    sum of squared errors, float64 [M]; infinite where the scale is 0 or infinite
    xv, vv   sum(a x v) and sum(a v v), float64 [M]
    x, v     sum(a x) and sum(a v), float64 [M]; they matter with a zero point only, and are any numbers without one
    """

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor
    xv: torch.Tensor
    vv: torch.Tensor
    x: torch.Tensor
    v: torch.Tensor

    def better(self, other: Fit) -> Fit:
        """Groupwise the one with the smaller error; `self` on a tie.

        A tie is 1e-9 relative: equal candidates, reached on different ways, must not differ by the rounding of their
        sums.
        """
        # far above the rounding of float64 sums of a group's weights, far below any difference that could be seen
        take = other.error < self.error * (1 - 1e-9)
        return Fit(*(torch.where(take, getattr(other, f), getattr(self, f)) for f in Fit.__slots__))


class Groups(Protocol):
    """M groups of weights, as the search sees them: it asks for bounds once, and then has candidates judged."""

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest weight of each group, float32 [M]."""

    def judge(self, scale: torch.Tensor, zero: torch.Tensor) -> Fit:
        """Error and sums of a stored scale and zero for each group; infinite error where the scale is 0 or infinite."""

    def weight(self) -> torch.Tensor:
        """Total importance of each group, float64 [M]; its size, if all weights matter the same."""

    def ternary(self) -> torch.Tensor:
        """The scale with the least error for levels -1, 0, 1, float32 [M]; 0 for groups of zeros."""


def search(
    groups: Groups, scheme: Scheme, dtype: torch.dtype, range_: Range = "opt"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of every group -> (scale [M] as stored in `dtype`, zero [M]), both float32.

    Groups of zeros get `empty_scale`: nothing divides by 0. An infinite absmax scale stays: `codec.check_scale` refuses
    it. Every candidate is one pass over the weights: 4 (powers of two) to 36 (with zero points) coarse ones, 8 fine
    ones and REFINEMENTS more; two in all for ternary levels, and none for `absmax`.
    """
    raw, centre = _start(*groups.bounds(), scheme)
    scale = torch.where(raw == 0, empty_scale(scheme, dtype), store(raw, dtype))
    zero = _zero_for(centre, scale, scheme)
    if range_ == "absmax":
        return scale, zero
    best = groups.judge(scale, zero)
    final = (raw == 0) | torch.isinf(scale)  # nothing to search, or to be refused: clipping would hide it
    if scheme.is_ternary:
        best = best.better(groups.judge(store(groups.ternary(), dtype), zero))
        return torch.where(final, scale, best.scale), zero
    for factor in coarse_factors(scheme):
        candidate = store(raw * _float32(factor), dtype)
        base = _zero_for(centre, candidate, scheme)
        for shift in shifts(scheme):
            best = best.better(groups.judge(candidate, _clip_zero(base + shift, scheme) if scheme.zero else base))
    for pair in FINE:
        middle = best
        for factor in pair:
            best = best.better(groups.judge(store(middle.scale * _float32(factor), dtype), middle.zero))
    total = groups.weight()
    for _ in range(REFINEMENTS):
        best = best.better(groups.judge(*_refined(best, scheme, total, dtype)))
    return torch.where(final, scale, best.scale), torch.where(final, zero, best.zero)


def empty_scale(scheme: Scheme, dtype: torch.dtype) -> float:
    """The scale of a group of zeros, which none fits better than another: 1, if zeros have a level of their own.

    Where they have none (half-integers, tables without 0), the smallest that `dtype` stores: the levels next to 0 are
    then as near to it as they can be, and do not stand for half of a step that no weight has.
    """
    return 1.0 if scheme.zero or _has_zero(scheme.levels) else smallest_scale(dtype)


def _has_zero(levels: Levels) -> bool:
    """Whether weights of 0 are coded as 0."""
    if levels.integers is not None:  # told without a tensor: training's graphs pass here
        return levels.lo <= 0 <= levels.hi and not levels.integers.half
    zeros = torch.zeros((1, levels.weights), dtype=torch.float32, device="cpu")
    return not bool(levels.decode(levels.encode(zeros)).any())


def coarse_factors(scheme: Scheme) -> tuple[float, ...]:
    """Factors of the absmax scale in the order in which they are judged; of both signs where levels are not mirrored.

    A negative scale turns the longer side of a range that has one (-8..7) to where the weights are.
    """
    signs = (1.0,) if scheme.zero or scheme.levels.mirrored else (1.0, -1.0)
    divisors = POWERS if scheme.scale == "float8_e8m0fnu" else DIVISORS
    return tuple(sign / divisor for divisor in divisors for sign in signs)


def shifts(scheme: Scheme) -> tuple[float, ...]:
    """Zero points tried at each coarse scale, as distances from the central one; only that one without zero points."""
    return SHIFTS if scheme.zero else (0.0,)


# ---- the steps ------------------------------------------------------------------------------------------------------


def _float32(factor: float) -> torch.Tensor:
    """A factor as native code has it: rounded to float32 before it multiplies."""
    return torch.tensor(factor, dtype=torch.float32, device="cpu")


def _start(bottom: torch.Tensor, top: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax: unrounded scale [M], and the centre [M] of the range that it spans (0 without a zero point).

    bottom, top: least and largest weight of each group, float32 [M]. With zero points the range includes 0, which then
    has a code of its own.
    """
    levels = scheme.levels
    if scheme.zero:
        low, high = bottom.clamp(max=0), top.clamp(min=0)
        return (high - low) / (levels.hi - levels.lo), (high + low) / 2
    if -levels.lowest == levels.highest:
        raw = torch.maximum(top, -bottom) / levels.highest
    else:  # the longer side takes the weight of largest magnitude, whatever its sign
        longer = levels.lowest if -levels.lowest > levels.highest else levels.highest
        raw = torch.where(top > -bottom, top, bottom) / longer
    return raw, torch.zeros_like(raw)


def _zero_for(centre: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The zero point that puts `centre` [M] in the middle of the codes, for scales [M]; zeros where the scheme has
    none."""
    if not scheme.zero:
        return torch.zeros_like(scale)
    return _clip_zero((scheme.levels.lo + scheme.levels.hi) / 2 - centre / scale, scheme)


def _clip_zero(zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The nearest zero point that can be stored; 0 for none (0 / 0, of a scale that is never taken)."""
    return torch.nan_to_num(torch.round(zero), nan=0.0).clamp(scheme.levels.lo, scheme.levels.hi)


def _refined(fit: Fit, scheme: Scheme, total: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares with the codes fixed: the best scale, and with a zero point the best line through them.

    fit: the best candidate so far. total: importance of each group, float64 [M]. dtype: that scales are stored in. ->
    scale [M] as stored, and zero [M].
    """
    if not scheme.zero:
        return store((fit.xv / fit.vv).float(), dtype), fit.zero
    # x ~ s*v + m over all elements; v counts from the present zero, so the zero moves by -m/s.
    slope = (total * fit.xv - fit.v * fit.x) / (total * fit.vv - fit.v * fit.v)
    intercept = (fit.x - slope * fit.v) / total
    return store(slope.float(), dtype), _clip_zero(fit.zero - (intercept / slope).float(), scheme)


# ---- groups in torch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorGroups:
    """Groups in torch's operations, on any device: the specification of what `native` does.

    x            float32 [M, B]
    scheme       whose levels the groups are judged by
    importance   float32 [M, B], not negative; None for ones
    """

    x: torch.Tensor
    scheme: Scheme
    importance: torch.Tensor | None = None

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Groups.bounds`."""
        return self.x.amin(1), self.x.amax(1)

    def weight(self) -> torch.Tensor:
        """See `Groups.weight`."""
        count, size = self.x.shape
        if self.importance is None:
            return torch.full((count,), float(size), dtype=torch.float64, device=self.x.device)
        return ordered_sum([piece_sum(self.importance[:, i : i + PIECE]) for i in range(0, size, PIECE)])

    def judge(self, scale: torch.Tensor, zero: torch.Tensor) -> Fit:
        """See `Groups.judge`: x / s, level and error in float32; their products summed by `piece_sum`."""
        usable = (scale != 0) & torch.isfinite(scale)
        levels, s, z = self.scheme.levels, scale[:, None], zero[:, None]
        inverse = torch.where(usable, 1 / scale, 0)[:, None]
        pieces: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, self.x.shape[1], PIECE):
            x = self.x[:, start : start + PIECE]
            v = levels.decode(levels.encode(x * inverse, z), z)
            e = s * v - x
            if self.importance is None:
                av, ax, ae = v, x, e
            else:
                a = self.importance[:, start : start + PIECE]
                av, ax, ae = a * v, a * x, a * e
            line = (ax, av) if self.scheme.zero else ()
            pieces.append(tuple(piece_sum(term) for term in (ae * e, av * x, av * v, *line)))
        error, xv, vv, *line_sums = (ordered_sum(sums) for sums in zip(*pieces, strict=True))
        x_sum, v_sum = line_sums or (xv, vv)
        return Fit(scale, zero, torch.where(usable, error, torch.inf), xv, vv, x_sum, v_sum)

    def ternary(self) -> torch.Tensor:
        """See `Groups.ternary`; groups are sorted SORTED weights at a time."""
        step = max(SORTED // self.x.shape[1], 1)
        return torch.cat([self._ternary(slice(first, first + step)) for first in range(0, len(self.x), step)])

    def _ternary(self, some: slice) -> torch.Tensor:
        """`ternary` of some of the groups: their magnitudes sorted, with the importance that goes with each."""
        size, order = self.x[some].abs().sort(dim=1, descending=True)
        a = None if self.importance is None else self.importance[some].gather(1, order)
        return best_prefix(size, a)


def best_prefix(size: torch.Tensor, a: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [M]: of magnitudes [M, B] that fall, the mean of those in the prefix with the greatest gain.

    The gain of a prefix is (sum a |x|)^2 / sum a, which is by how much its mean as scale makes the squared error
    smaller. a: importances, or how often each magnitude occurs.
    """
    best, mean, total, weight = (torch.zeros((len(size), 1), dtype=torch.float64, device=size.device) for _ in range(4))
    for start in range(0, size.shape[1], PIECE):
        some = size[:, start : start + PIECE].double()
        share = torch.ones_like(some) if a is None else a[:, start : start + PIECE].double()
        sums, weights = total + (some * share).cumsum(1), weight + share.cumsum(1)
        gain = sums.square() / weights.clamp(min=1e-300)  # importances may be 0: such a prefix gains 0, not nan
        greatest, which = gain.max(1, keepdim=True)
        mean = torch.where(greatest > best, sums.gather(1, which) / weights.gather(1, which).clamp(min=1e-300), mean)
        best, total, weight = torch.maximum(best, greatest), sums[:, -1:], weights[:, -1:]
    return mean[:, 0].float()


def piece_sum(terms: torch.Tensor) -> torch.Tensor:
    """float32 [M, B] -> float64 [M]: runs of 16 neighbours folded in pairs, then added in turn in float64.

    B is at most PIECE; what is missing to whole runs is zeros, which change no sum.
    """
    sums = torch.nn.functional.pad(terms, (0, -terms.shape[1] % RUN))
    for _ in range(RUN.bit_length() - 1):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums.double().cumsum(1)[:, -1]


def ordered_sum(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 [M], the pieces' sums added in turn, first to last, whoever computed them when."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total
