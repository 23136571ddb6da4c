"""The outlier picture: how far the largest weights stick out, per kind of layer, in one stream over the file.

A scale must reach the largest weight of its block, so a few large weights make the steps for all others coarse.
Measured per tensor, with its own mean m and sigma, and gathered per kind:

    rms        sqrt(mean w^2)
    max/rms    max |w| / rms; 4 to 6 for a bell curve, by size
    kurtosis   mean (w - m)^4 / sigma^4; 3 for a bell curve, more with heavy tails
    beyond k   share of |w - m| > k sigma; 6.3e-5 (k = 4) and 2.0e-9 (k = 6) for a bell curve
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from spicerack.models import census
from spicerack.models.overview import pattern_of
from spicerack.models.sizes import FLOATS
from spicerack.storage.reader import Checkpoint

MATRICES = ("linear", "conv1d", "experts", "embedding", "head", "router")
"""Roles of tensors that are measured: what could be quantized, by default or on request."""
BINS = 12
"""Histogram of |w - m| / sigma: one bin per sigma, the last one open."""
_CHUNK = 1 << 22
"""Weights that are looked at once, 16 MB in float32: chunks of any size give the same figures, but for rounding."""


@dataclass(frozen=True, slots=True)
class Spread:
    """What one tensor, or all tensors of a kind, look like. Shares are of all finite weights, 0 to 1.

    pattern              what a recipe calls them
    role                 what they do
    count                tensors
    parameters           finite weights in them
    rms, absmax          of the weights themselves
    max_over_rms         the largest of the tensors'; that tensor is `worst`
    kurtosis             mean over the tensors, by size; 0 for constant ones
    beyond_4, beyond_6   share of weights farther than so many sigma from their tensor's mean
    worst                the name of the tensor with the largest max/rms
    histogram            share of weights per sigma of distance from the mean, `BINS` of them
    nonfinite            number of NaN and infinite weights; they are left out of everything else
    """

    pattern: str
    role: str
    count: int
    parameters: int
    rms: float
    absmax: float
    max_over_rms: float
    kurtosis: float
    beyond_4: float
    beyond_6: float
    worst: str
    histogram: tuple[float, ...]
    nonfinite: int


def measure(checkpoint: Checkpoint, progress: Callable[[int], None] = lambda _: None) -> list[Spread]:
    """Spreads of all float matrices by pattern, in file order. Holds a few chunks of 16 MB, whatever the tensors'
    sizes.

    progress: called with the bytes of each tensor of the file, measured or not. Raises CheckpointError for a file that
    cannot be read.
    """
    kinds: dict[tuple[str, str], list[Spread]] = {}
    for entry in census.take(checkpoint).entries.values():
        if entry.role in MATRICES and entry.info.dtype in FLOATS and entry.info.numel:
            pattern = pattern_of(entry.module)
            kinds.setdefault((pattern, entry.role), []).append(_one(checkpoint, entry, pattern))
        progress(entry.info.nbytes)
    return [_gather(members) for members in kinds.values()]


def _one(checkpoint: Checkpoint, entry: census.Entry, pattern: str) -> Spread:
    """The spread of one tensor, in two passes: the second needs the mean and sigma of the first.

    Sums are in float64: over a billion weights float32 would lose most of its digits.
    """
    count, total, squares, absmax = 0, 0.0, 0.0, 0.0
    for x in _chunks(checkpoint, entry.name):
        count += x.numel()
        total += float(x.sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        absmax = max(absmax, *(abs(float(bound)) for bound in x.aminmax()))
    n = max(count, 1)
    mean, rms = total / n, math.sqrt(squares / n)
    sigma = math.sqrt(max(squares / n - mean**2, 0.0))
    fourth, bins = 0.0, torch.zeros(BINS, dtype=torch.float64, device="cpu")
    for x in _chunks(checkpoint, entry.name) if sigma else ():
        z = (x - mean).abs_().div_(sigma)
        bins += torch.histc(z, BINS, 0, BINS)  # leaves out what is beyond the last bin
        fourth += float(torch.linalg.vector_norm(z.square_(), dtype=torch.float64)) ** 2
    bins[-1] += count - float(bins.sum()) if sigma else 0.0
    histogram = [share / n for share in bins.tolist()]
    return Spread(
        pattern=pattern,
        role=entry.role,
        count=1,
        parameters=count,
        rms=rms,
        absmax=absmax,
        max_over_rms=absmax / rms if rms else 0.0,
        kurtosis=fourth / n,
        beyond_4=sum(histogram[4:]),
        beyond_6=sum(histogram[6:]),
        worst=entry.name,
        histogram=tuple(histogram),
        nonfinite=entry.info.numel - count,
    )


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """Finite values of a tensor, flat, in float32, some rows of the first axis at a time; never empty."""
    shape = checkpoint.tensors[name].shape
    step = max(_CHUNK // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        x = checkpoint.read_rows(name, start, min(start + step, shape[0])).float().flatten()
        if not all(bound.isfinite() for bound in x.aminmax()):
            x = x[x.isfinite()]
        if x.numel():
            yield x


def _gather(members: list[Spread]) -> Spread:
    """One Spread of many tensors of a kind, weighted by size; the largest max/rms and its tensor are kept as
    they are."""
    total = sum(m.parameters for m in members)
    weights = [m.parameters / total if total else 0.0 for m in members]

    def mean(values: list[float]) -> float:
        return math.fsum(w * v for w, v in zip(weights, values, strict=True))

    worst = max(members, key=lambda m: m.max_over_rms)
    return Spread(
        pattern=worst.pattern,
        role=worst.role,
        count=len(members),
        parameters=total,
        rms=math.sqrt(mean([m.rms**2 for m in members])),
        absmax=max(m.absmax for m in members),
        max_over_rms=worst.max_over_rms,
        kurtosis=mean([m.kurtosis for m in members]),
        beyond_4=mean([m.beyond_4 for m in members]),
        beyond_6=mean([m.beyond_6 for m in members]),
        worst=worst.worst,
        histogram=tuple(mean([m.histogram[i] for m in members]) for i in range(BINS)),
        nonfinite=sum(m.nonfinite for m in members),
    )
