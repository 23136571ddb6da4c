"""What MLX's scales and biases say of a tensor: which scheme it has, and the type in which its scales are held.

    told        scales and biases in a folder -> the scheme's name, and the source whose scales have that type
    multiples   -bias / scale: what a zero point is, in codes from 0

Reading all of them takes an eighth of the time that the weights do: one row is looked at, and the others where that
row's biases are multiples of its scales, which those that MLX itself chose are not.
"""

from __future__ import annotations

import torch

from spicerack.numerics.scales import dtype_of
from spicerack.storage.reader import Checkpoint, TensorInfo


def told(
    checkpoint: Checkpoint, scales: TensorInfo, biases: TensorInfo, stem: str, width: int
) -> tuple[str, torch.dtype]:
    """The scheme's name, beginning with `stem`, and the source whose scales are of the type that is needed."""
    kind, dtype = _kind(checkpoint.read_rows(scales.name, 0, 1), checkpoint.read_rows(biases.name, 0, 1), width)
    if kind != "m" or dtype is not None:
        kind, dtype = _kind(checkpoint.read(scales.name), checkpoint.read(biases.name), width)
    return (f"{stem}{kind}f", torch.float32) if dtype is None else (f"{stem}{kind}", dtype)


def _kind(scales: torch.Tensor, biases: torch.Tensor, width: int) -> tuple[str, torch.dtype | None]:
    """ "" (symmetric), "h", "z" or "m", and the source of scales (and minima) that are so; None: only float32 has them.

    Multiples are compared in float64, in which products are exact.
    """
    middle, times = 2 ** (width - 1), multiples(scales, biases)
    exact = bool((times.double() * scales.double() == -biases.double()).all())
    kind = "m"
    if exact and bool((times == middle).all()):
        kind = ""
    elif exact and bool((times == middle - 0.5).all()):
        kind = "h"
    elif exact and bool(((times == times.round()) & (times >= 0) & (times < 2 * middle)).all()):
        kind = "z"
    if scales.dtype != torch.float32:
        return kind, scales.dtype
    values = [scales, biases] if kind == "m" else [scales]
    for source in (torch.float32, torch.bfloat16):
        stored = dtype_of("source", source)
        if all(torch.equal(value.to(stored).float(), value) for value in values):
            return kind, source
    # with scales of 24 bits MLX rounds the product with a code before it adds: so does who has minima, and nobody else
    return "m", None


def multiples(scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """-bias / scale, float32, rounded to halves; 0 where the scale is."""
    quotient = torch.where(scales == 0, 0.0, -biases.float() / scales.float())
    return (quotient * 2).round() / 2
