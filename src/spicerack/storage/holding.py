"""In which scheme a file of others holds each tensor: its own, another that says the same in more bits, or none.

    hold       every tensor of a folder -> `Held`: from headers alone
    nearest    the scheme that a tensor could have
    convert    a QTensor into the scheme in which it is held, with not a weight changed

The same is said in more bits where codes are integers: three bits are four of which some are not used, a scale that a
row shares is repeated for its groups, a scheme without zero points has zero points of 0, half-integer levels are odd
integers with half of the scale, ternary codes are codes of two bits. What cannot be had so is rounded again, or refused
with the nearest scheme that is held. Who holds is asked (`Holder`): a format, a target of exports, an engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from spicerack import plugins
from spicerack.errors import ShapeError, WeightError
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import Contents, StoredTensor

_GROUPS = ("", "g256", "g128", "g64", "g32", "g16")
"""Groups that are tried: what engines have."""
_FEWER = 1.5
"""How much nearer a scheme of more bits is than one of as many fewer: who rounds again wants to lose little."""
_KIND = 0.25
"""What another kind of zero point counts for among as many bits."""


class Holder(Protocol):
    """Whoever can be asked what it holds exactly; equal ones answer the same."""

    def __hash__(self) -> int:
        """Of what answers depend on: they are remembered."""

    def prepared(self, contents: Contents, /) -> Contents:
        """The contents as they are laid out there: what is decided over all tensors at once."""

    def obstacles(self, contents: Contents, /) -> list[str]:
        """Why tensors cannot be held exactly in their schemes, a sentence each beginning with `MODULE: `; empty if all
        can.

        A rule about a tensor must not depend on the others, but for those that no scheme would help: `hold` asks about
        schemes that would do, one tensor at a time.
        """


@dataclass(frozen=True, slots=True)
class Held:
    """In which scheme somebody holds a tensor.

    stored   as it is held
    exact    every weight stays what it is; else it is rounded again
    rule     why the scheme that it had is not held, where it is not
    """

    stored: StoredTensor
    exact: bool
    rule: str | None = None

    def nearest(self, given: StoredTensor) -> Scheme | None:
        """What a tensor that is not held exactly could be rounded to; None where no scheme of it is held."""
        return None if self.stored.scheme == given.scheme else self.stored.scheme


@lru_cache(maxsize=1)
def _candidates() -> tuple[Scheme, ...]:
    """Schemes that are tried, those of the grammar and those with a file of their own."""
    grammar = [f"w{bits}{group}{kind}" for bits in range(2, 9) for group in _GROUPS for kind in ("", "z", "h", "m")]
    return tuple(map(parse, [*grammar, *plugins.names("numerics.schemes")]))


def hold(holder: Holder, contents: Contents) -> dict[str, Held]:
    """Module -> in which scheme it is held.

    Of schemes that say the same the smallest is taken; where none does, the nearest that is held, or, where there is
    none for the tensor at all, the tensor as it was, which is then refused.
    """
    known: dict[tuple[object, ...], Held] = {}
    held = {}
    for module, stored in contents.items():
        # layers of a kind are alike, and a model has hundreds
        key = (re.sub(r"[0-9]+", "*", module), stored.scheme, stored.shape, stored.role, stored.source_dtype,
               stored.transposed, stored.bias)  # fmt: skip
        if key not in known:
            known[key] = _hold(holder, stored)
        same = known[key]
        rule = None if same.rule is None else same.rule.replace(same.stored.module, module, 1)
        held[module] = Held(replace(same.stored, module=module, variant=stored.variant), same.exact, rule)
    return held


def nearest(holder: Holder, stored: StoredTensor) -> Scheme | None:
    """The scheme that is held and nearest to a tensor's, whatever stands against its own; None where none is held."""
    return min(_able(holder, _blank(stored)), key=lambda scheme: _distance(stored, scheme), default=None)


def _hold(holder: Holder, stored: StoredTensor) -> Held:
    """`hold` for one tensor."""
    rule = _rule(holder, stored)
    if rule is None:
        return Held(stored, exact=True)
    able = _able(holder, _blank(stored))
    same = [scheme for scheme in able if obstacle(stored.scheme, scheme, stored.shape) is None]
    if same:
        smallest = min(same, key=lambda scheme: scheme.stored_bits(stored.shape))
        return Held(replace(stored, scheme=smallest), exact=True, rule=rule)
    near = nearest(holder, stored)
    return Held(stored if near is None else replace(stored, scheme=near), exact=False, rule=rule)


def _blank(stored: StoredTensor) -> StoredTensor:
    """A layer of the same kind, whatever its scheme is."""
    return replace(stored, module=re.sub(r"[0-9]+", "0", stored.module), scheme=_candidates()[0], variant="")


@lru_cache(maxsize=1024)
def _able(holder: Holder, stored: StoredTensor) -> tuple[Scheme, ...]:
    """The schemes that a tensor could have. Remembered: two hundred are asked about, for each layer and scheme."""
    return tuple(s for s in _fitting(stored) if _rule(holder, replace(stored, scheme=s)) is None)


def _rule(holder: Holder, stored: StoredTensor) -> str | None:
    """Why the tensor is not held, as a sentence; None if it is."""
    return next(iter(holder.obstacles(holder.prepared({stored.module: stored}))), None)


def _fitting(stored: StoredTensor) -> Iterator[Scheme]:
    """Schemes whose groups tile the tensor."""
    for scheme in _candidates():
        try:
            scheme.check_shape(stored.module, stored.shape)
        except ShapeError:
            continue
        yield scheme


def _distance(stored: StoredTensor, scheme: Scheme) -> tuple[float, int]:
    """How far another scheme is from the tensor's: by bits of a weight, then by how zero is had. Of equals one of the
    grammar comes before one with a file of its own."""
    count = math.prod(stored.shape)
    more = (scheme.stored_bits(stored.shape) - stored.scheme.stored_bits(stored.shape)) / count
    kind = (scheme.zero, scheme.min is None) != (stored.scheme.zero, stored.scheme.min is None)
    return (more if more >= 0 else -_FEWER * more) + _KIND * kind, scheme.bits


def obstacle(given: Scheme, wanted: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why a tensor in the scheme `given` cannot be said in `wanted` without a weight changing; None if it can."""
    if replace(given, name="", activations=None) == replace(wanted, name="", activations=None):
        return None
    a, b = given.levels.integers, wanted.levels.integers
    if a is None or b is None or isinstance(given.scale, Scheme) or isinstance(wanted.scale, Scheme):
        return "other numbers"
    if (given.min is None) != (wanted.min is None) or isinstance(given.min, Scheme) or isinstance(wanted.min, Scheme):
        return "minima"
    if given.zero and not wanted.zero:
        return "no zero points"
    rows, columns = given.group_shape(*shape[-2:])
    smaller_rows, smaller_columns = wanted.group_shape(*shape[-2:])
    if rows % smaller_rows or columns % smaller_columns:
        return "larger groups"
    if b.half and not a.half:
        return "half-integer levels"
    lo, hi = (2 * a.lo + 1, 2 * a.hi + 1) if a.half and not b.half else (a.lo, a.hi)
    return None if b.lo <= lo and hi <= b.hi else "fewer levels"


def convert(q: QTensor, wanted: StoredTensor) -> QTensor:
    """q in the scheme and with the type of scales that `wanted` has, of which `obstacle` has none.

    Raises WeightError, naming module and scale, where that type does not hold a scale.
    """
    given, scheme = q.scheme, wanted.scheme
    if isinstance(q.scale, QTensor) or given.levels.integers is None:
        return replace(q, scheme=scheme)  # scales of their own: the same scheme but for activations
    scale, grid, codes = stored_scale(q.scale, given, wanted), scheme.scale_shape(q.shape), q.codes
    if _halved(given, scheme):
        codes = 2 * codes + 1
    zero = _zeros(q.zero, grid) if scheme.zero else None
    low = None
    if q.min is not None:
        assert isinstance(q.min, torch.Tensor), "quantized minima were refused"
        low = spread(_cast(q.min, dtype_of(scheme.scale, wanted.source_dtype), wanted.module), grid)
    return QTensor(
        scheme, codes.to(codes_dtype(scheme)), spread(scale, grid), zero, low,
        transposed=q.transposed, input_scale=q.input_scale if scheme.activations == "static" else None,
    )  # fmt: skip


def relabeled(u: Undecoded, wanted: StoredTensor) -> Undecoded | None:
    """The same as `convert`, of a tensor whose codes stay what they are; None where they become others.

    Raises WeightError as `convert` does.
    """
    scheme = wanted.scheme
    if scheme.levels != u.scheme.levels or scheme.plain_obstacle or u.scheme.plain_obstacle:
        return None
    grid = scheme.scale_shape(u.shape)
    return replace(
        u, scheme=scheme, scale=spread(stored_scale(u.plain_scale, u.scheme, wanted), grid),
        zero=_zeros(u.zero, grid) if scheme.zero else None,
        input_scale=u.input_scale if scheme.activations == "static" else None,
    )  # fmt: skip


def _zeros(zero: torch.Tensor | None, grid: tuple[int, ...]) -> torch.Tensor:
    """Zero points of groups: 0 where there were none."""
    return torch.zeros(grid, dtype=torch.int8, device="cpu") if zero is None else spread(zero, grid)


def stored_scale(scale: torch.Tensor, given: Scheme, wanted: StoredTensor) -> torch.Tensor:
    """Scales of a tensor in the scheme `given` as they are stored in that of `wanted`, one for each group as before.

    Raises WeightError, naming module and scale, for one that the type there does not hold.
    """
    value = scale.float() / 2 if _halved(given, wanted.scheme) else scale
    return _cast(value, dtype_of(wanted.scheme.scale, wanted.source_dtype), wanted.module)


def _halved(given: Scheme, wanted: Scheme) -> bool:
    """Whether half-integer levels become odd integers."""
    return given.integers.half and not wanted.integers.half


def spread(values: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Scales [.., rows, columns] of groups -> those of the smaller groups of `grid`: each repeated."""
    for axis in (-2, -1):
        times = grid[axis] // values.shape[axis]
        values = values if times == 1 else values.repeat_interleave(times, dim=axis)
    return values


def _cast(values: torch.Tensor, dtype: torch.dtype, module: str) -> torch.Tensor:
    """Scales or minima in another type. Raises WeightError for one that it does not hold."""
    if values.dtype == dtype:
        return values
    cast = values.to(dtype)
    back = cast.to(values.dtype)  # what is lost does not come back: of two types one has more bits wherever both reach
    if not torch.equal(back, values):
        place = [int(i) for i in (back != values).nonzero()[0]]
        raise WeightError(
            f"{module}: scale {place} is {float(values[tuple(place)]):.9g}, which "
            f"{str(dtype).removeprefix('torch.')} does not hold",
            "export to what has scales of that type (mlx, compressed-tensors), or --requantize",
        )
    return cast
