"""What GPTQ and AWQ have in common: one width and one group for all layers, scales in float16, floats beside them.

common     the scheme that holds every layer exactly: the most bits, the largest group that divides all others
obstacle   what neither has
turned     [G, N] as [N, G]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage.format import Contents, StoredTensor
from spicerack.storage.reader import Checkpoint, TensorInfo

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Groups that the readers have kernels for, beside one scale for a row (gptqmodel 7.6: QuantizeConfig)."""
_BLOCK = 32
"""Rows and columns come in so many: what gptqmodel's and vLLM's kernels ask for."""
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Types that scales have in files of others; float16 is what is written."""
DAMAGED = "the folder is damaged, or in a variant that is not read"


def common(contents: Contents) -> dict[str, StoredTensor]:
    """The contents, all in the one scheme that holds each of them exactly, with scales in float16.

    Exact is: codes of fewer bits are codes of more, a scale is repeated for smaller groups, and where one layer has
    zero points, those of the others are 0. Contents in other schemes than integers of two's complement stay as they
    are, and are refused later.
    """
    schemes = [stored.scheme for stored in contents.values()]
    narrow = {module: _in_float16(stored) for module, stored in contents.items()}
    if not schemes or any(integers_obstacle(scheme) for scheme in schemes):
        return narrow
    bits, zero = max(scheme.bits for scheme in schemes), any(scheme.zero for scheme in schemes)
    columns = {stored.scheme.group_columns for stored in contents.values()}
    if columns != {None}:
        columns = {math.gcd(*(stored.scheme.group_columns or stored.shape[-1] for stored in contents.values()))}
    [group] = columns
    scheme = parse(f"w{bits}" + (f"g{group}" if group else "") + ("z" if zero else ""))
    return {module: replace(stored, scheme=scheme) for module, stored in narrow.items()}


def _in_float16(stored: StoredTensor) -> StoredTensor:
    """The tensor with scales in float16, whatever its model's type is."""
    return replace(stored, source_dtype=torch.float16)


def integers_obstacle(scheme: Scheme) -> str | None:
    """Why a scheme is not codes of two's complement times a scale of a group of a row, as the end of "has no"."""
    integers, half = scheme.levels.integers, 2 ** (scheme.bits - 1)
    if integers is None or (integers.lo, integers.hi) != (-half, half - 1):
        return f"levels of {scheme.name}"
    if integers.half:
        return f"half-integer levels ({scheme.name})"
    if scheme.plain_obstacle is not None or scheme.group[0] != 1 or scheme.scale != "source":
        return f"scales like those of {scheme.name}"
    return f"activations in integers ({scheme.name})" if scheme.activations else None


def obstacle(stored: StoredTensor, widths: tuple[int, ...]) -> str | None:
    """What is not there for a tensor, as the end of "X has no"; None if it is held. widths: bits of a code that are."""
    scheme = stored.scheme
    if stored.role not in ("linear", "head", "router") or stored.transposed or len(stored.shape) != 2:
        return f"quantized {stored.role}"
    if reason := integers_obstacle(scheme):
        return reason
    if scheme.bits not in widths:
        return f"{scheme.bits} bits ({scheme.name}), only {', '.join(map(str, widths))}"
    if scheme.group_columns not in (None, *GROUPS):
        return f"groups of {scheme.group_columns}, only {', '.join(map(str, GROUPS))} or a row"
    if stored.shape[0] % _BLOCK or stored.shape[1] % _BLOCK:
        return f"{list(stored.shape)} weights, only multiples of {_BLOCK} both ways"
    return None


def mixture(name: str, contents: Contents) -> list[str]:
    """A sentence for each module that is in another scheme than most: the format has one for all."""
    counts: dict[Scheme, int] = {}
    for stored in contents.values():
        counts[stored.scheme] = counts.get(stored.scheme, 0) + 1
    most = max(counts, key=lambda scheme: counts[scheme], default=None)
    return [
        f"{module}: {name} has one scheme for all layers, {most} for most, and this is {stored.scheme}"
        for module, stored in contents.items()
        if stored.scheme != most
    ]


def turned(values: torch.Tensor) -> torch.Tensor:
    """[G, N] -> [N, G], copied: of one group `contiguous` would leave the strides as they are, which are no row's."""
    return values.t().clone(memory_format=torch.contiguous_format)


def part(checkpoint: Checkpoint, module: str, name: str, dtypes: tuple[str, ...]) -> TensorInfo:
    """The matrix `module.name`. Raises CheckpointError if it is missing, or of another type, or no matrix."""
    info = checkpoint.tensors.get(f"{module}.{name}")
    if info is None:
        raise CheckpointError(f"{checkpoint.folder}: {module}.{name} is missing", DAMAGED)
    if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
        wanted = f"{' or '.join(dtypes)} of two axes"
        raise CheckpointError(
            f"{checkpoint.folder}: {info.name} is {info.dtype} {list(info.shape)}, not {wanted}", DAMAGED
        )
    return info


def scheme_of(bits: int, columns: int, groups: int, zero: torch.Tensor | None) -> Scheme:
    """The scheme of a matrix of `columns` inputs in `groups` groups; zero: its zero points, or None for none.

    Zero points that are all 0 are none.
    """
    size = "" if groups == 1 else f"g{columns // groups}"
    return parse(f"w{bits}{size}" + ("z" if zero is not None and bool(zero.any()) else ""))


def finite(module: str, scale: torch.Tensor) -> torch.Tensor:
    """The scales, which a file of a stranger may have anything in. Raises CheckpointError for NaN and infinities."""
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{module}.scales: one of them is not finite", DAMAGED)
    return scale


def width(section: Mapping[str, object], where: str, widths: tuple[int, ...]) -> int:
    """`bits` of a config section. Raises CheckpointError for others than `widths`."""
    bits = section.get("bits", section.get("w_bit"))
    if type(bits) is not int or bits not in widths:
        raise CheckpointError(f"{where}: bits is {bits!r}, not one of {', '.join(map(str, widths))}", DAMAGED)
    return bits
