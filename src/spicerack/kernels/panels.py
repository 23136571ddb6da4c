"""Panels: how the CPU kernels lay packed weights out in memory, and back.

A matrix [N, K] is cut into panels of 16 rows, and a panel into tiles of 32 columns, so that one vector holds several
output rows and integer dot products need no sums across it. Within a tile codes are bit planes, or ternary ones five to
a byte (`Tiling`); scales and zero points lie 16 rows of a panel side by side, one for each group. N is rounded up to
whole panels and K to whole tiles; what is beyond them are zeros. How a tile's bytes are ordered, and why, is told in
native/kernels/kernel.h; the native module fills tiles and empties them, and what is here says which and where.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from typing import Literal, NamedTuple

import torch

from spicerack import _native
from spicerack.errors import UsageError
from spicerack.numerics import dtypes, native
from spicerack.numerics.packed import Tensors
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme

NAMES: tuple[str, ...] = tuple(_native.engines())
"""Engines that this processor runs, fastest first; "scalar" is always the last."""
PANEL, TILE, UNIT = 16, 32, 64
"""Rows of a panel, columns of a tile, bytes of a tile for each bit (16 * 32 / 8), as in native/kernels/kernel.h."""
TRITS, BUNDLE, TRITS_BYTES = 1, 5, 512
"""In place of a number of bits: ternary codes, five to a byte (3^5 = 243); how many panels share a tile of them, one
row of each in a byte; bytes of such a tile."""
FLOATS, SPANS, TOKENS, FIXED = range(4)
"""How activations enter: float32; int8 with a scale for a span (32 columns of a row), for a row, or a given one."""
MAX_EXACT_COLUMNS = 1 << 16
"""Columns whose products are summed in int32 without overflow: 255 * 127 * 2^16 < 2^31."""
TYPES = {dtype: number for number, dtype in enumerate(dtypes.SOURCES)}
"""Types of x, y, bias and scales, and their numbers in the native module."""
_HUGE = 2 << 20
"""Bytes of a huge page on x86 and, where pages have 4 KB, on Arm; below one there is nothing to gain."""


class Spec(NamedTuple):
    """The numbers of a matrix in panels: w = scale * (u - offset + half / 2), or scale * (u - zero), with u = code -
    lo.

    n, k    N and K: output rows, and columns that are summed over
    group   columns that share a scale; 0: all of a row, or the whole matrix (whose scale is then stored for each row)
    bits    of a code: u is below 2^bits; or TRITS: u is 0, 1 or 2
    offset  u of the level 0: -lo
    half    levels are code + 1/2
    """

    n: int
    k: int
    group: int
    bits: int
    offset: int
    half: bool

    @property
    def tiles(self) -> tuple[int, int, int]:
        """The shape of the packed codes, uint8: panels (or bundles of them), tiles of a panel, bytes of a tile."""
        if self.bits == TRITS:
            return -(-self.n // (BUNDLE * PANEL)), -(-self.k // TILE), TRITS_BYTES
        return -(-self.n // PANEL), -(-self.k // TILE), UNIT * self.bits


Tiling = Literal["planes", "trits"]
"""How codes lie in a tile: planes of bits, for any scheme, or five ternary codes to a byte."""


def engine_index(engine: str | None = None) -> int:
    """The place in NAMES of an engine, which is how the native module is told of it; None is the fastest, 0.

    Raises UsageError, naming those that there are, for one that this processor, or this build, has not.
    """
    if engine is None:
        return 0
    if engine not in NAMES:
        raise UsageError(
            f"engine {engine}: this processor, or this build, does not have it", f"it has {', '.join(NAMES)}"
        )
    return NAMES.index(engine)


def spec_of(scheme: Scheme, shape: tuple[int, int], tiling: Tiling = "planes") -> Spec:
    """The numbers of a plain scheme for a matrix [N, K] of this shape.

    shape: [N, K]. tiling: "trits" for ternary codes five to a byte, which then have no bits of their own. Raises
    SchemeError for levels in a table, which have no offset.
    """
    levels = scheme.integers
    group = scheme.group_columns or 0
    bits = scheme.bits if tiling == "planes" else TRITS
    return Spec(*shape, 0 if group == shape[1] else group, bits, -levels.lo, levels.half)


def obstacle(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight cannot be laid out in panels, as the end of a sentence; None if it can.

    scheme: of the weight. shape: [N, K]. dtype: of the inputs. device: where the weight is to be. Panels hold plain
    integers of 2 to 8 bits with one float scale and at most one integer zero point for a group of a row; a group is a
    multiple of 32 columns, or the whole row.
    """
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in TYPES:
        return f"takes float32, float16 and bfloat16, not {dtype}"
    if scheme.plain_obstacle is not None:
        return scheme.plain_obstacle
    if scheme.bits < 2:
        return "codes have 2 to 8 bits"
    group = scheme.group_columns or shape[1]
    if group != shape[1] and group % TILE:
        return f"groups are multiples of {TILE}, not {group}"
    return None


def pack(q: QTensor, tiling: Tiling = "planes") -> dict[str, torch.Tensor]:
    """A QTensor [N, K] of a scheme without an `obstacle` -> its tensors in panels, on the CPU, by name.

    codes        uint8 [N/16, K/32, 64 * bits], N and K rounded up; in trits [N/80, K/32, 512]
    scale        [N/16, groups, 16], in its stored type
    zero         uint8, like scale: zero - lo; only with zero points
    input_scale  float32 [1], as it is; only with static activations

    As many threads as torch uses.
    """
    n, k = q.shape
    spec = spec_of(q.scheme, (n, k), tiling)
    tiles = zeros(math.prod(spec.tiles)).view(spec.tiles)
    height = PANEL * (BUNDLE if tiling == "trits" else 1)
    codes = q.codes.cpu().contiguous().view(torch.uint8)

    def work(first: int, last: int) -> None:
        _native.to_panels(codes[first * height : last * height], spec.bits, spec.offset, tiles[first:last])

    with native.team(torch.get_num_threads()) as workers:
        workers.run(work, len(tiles))
    tensors = {"codes": tiles, "scale": _to_lanes(q.plain_scale.cpu(), n)}
    if q.zero is not None:
        tensors["zero"] = _to_lanes((q.zero.cpu().to(torch.int16) + spec.offset).to(torch.uint8), n)
    if q.input_scale is not None:
        tensors["input_scale"] = q.input_scale.cpu()
    return tensors


def unpack(scheme: Scheme, shape: tuple[int, int], tensors: Tensors, tiling: Tiling = "planes") -> QTensor:
    """Inverse of `pack`: a matrix [N, K] from its tensors in panels, codes and scales bit for bit, on the CPU.

    scheme, shape and tiling are those of `pack`. A scale of the whole matrix, which panels repeat for each row, is one
    number again. Whether the layer was a Conv1D is not told by panels: who knows it says so in the QTensor.
    """
    n, k = shape
    spec = spec_of(scheme, shape, tiling)
    codes = torch.empty((n, k), dtype=torch.uint8)
    _native.from_panels(tensors["codes"].cpu(), spec.bits, spec.offset, codes)
    scale = _from_lanes(tensors["scale"], n)
    if scheme.group == (None, None):
        scale = scale[:1]  # all rows have a copy of it
    zero = None
    if scheme.zero:
        zero = _from_lanes(tensors["zero"], n).to(torch.int16).sub_(spec.offset)
        zero = zero.to(codes_dtype(scheme))
    return QTensor(scheme, codes.view(codes_dtype(scheme)), scale, zero, input_scale=tensors.get("input_scale"))


def zeros(nbytes: int) -> torch.Tensor:
    """uint8 zeros [nbytes], on huge pages where Linux gives them.

    With small pages memory reads a fifth to a third slower (docs/kernels.md: 22 and 29 GB/s for one thread). torch has
    no way to ask for them, so the tensor is a view of an anonymous mapping, which goes when the tensor goes.
    """
    if sys.platform != "linux" or nbytes < _HUGE:
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)


def _to_lanes(values: torch.Tensor, n: int) -> torch.Tensor:
    """Scales or zero points [N or 1, groups] -> [N/16, groups, 16], so that one vector holds those of a panel's rows.

    One row stands for all. Rows beyond N, up to a whole panel, are zeros, and so are their products.
    """
    padded = values.new_zeros((-(-n // PANEL) * PANEL, values.shape[1]))
    padded[:n] = values
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _from_lanes(lanes: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `_to_lanes`: [N/16, groups, 16] -> [N, groups]."""
    return lanes.transpose(1, 2).reshape(-1, lanes.shape[1])[:n].contiguous()
