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
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import torch

from spicerack import _native
from spicerack.errors import UsageError
from spicerack.kernels import laying
from spicerack.numerics import dtypes
from spicerack.numerics.packed import Tensors
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Order, Undecoded

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
SCALE_TYPES = TYPES | {torch.int8: 3, torch.float8_e4m3fn: 4}
"""The same of scales, which are bytes where there are outer ones."""
_ORDERS = {"stream": 0, "bytes": 1, "quarters": 2}
"""How stored codes lie, and its number in the native module."""
_LINE = 64
"""Bytes of a cache line, which tensors in a room begin on, and of a vector of codes."""
_HUGE = 2 << 20
"""Bytes of a huge page on x86 and, where pages have 4 KB, on Arm; below one there is nothing to gain."""
_QUICK = 1e-3
"""Seconds in which a huge page is touched, or small ones are sooner."""


class Spec(NamedTuple):
    """The numbers of a matrix in panels: w = scale * (u - offset + half / 2), or scale * (u - zero), plus the minimum.

    n, k    N and K: output rows, and columns that are summed over
    group   columns that share a scale; 0: all of a row, or the whole matrix (whose scale is then stored for each row)
    bits    of a code: u is below 2^bits; or TRITS: u is 0, 1 or 2
    offset  u of the level 0
    half    levels are a half more
    minima  groups have them
    block   columns that share an outer scale, where there are some; 0: all of a row
    table   u of each code, 16 of them; empty: what a tile holds is u itself
    """

    n: int
    k: int
    group: int
    bits: int
    offset: int
    half: bool
    minima: bool = False
    block: int = 0
    table: tuple[int, ...] = ()

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
    """The numbers of a scheme without an `obstacle` for a matrix [N, K] of this shape.

    shape: [N, K]. tiling: "trits" for ternary codes five to a byte, which then have no bits of their own. Raises
    SchemeError for levels that panels do not hold.
    """
    laid, group = laying.laid(scheme), scheme.group_columns or 0
    return Spec(
        *shape,
        0 if group == shape[1] else group,
        laid.bits if tiling == "planes" else TRITS,
        laid.offset,
        laid.half,
        scheme.min is not None,
        laying.block_columns(scheme),
        laid.table,
    )


def in_blocks(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether groups lie in blocks, as native/kernels/kernel.h calls it: with minima, with scales that are quantized
    themselves, or of half a tile.

    scheme and shape: of a matrix [N, K].
    """
    half = scheme.group_columns == TILE // 2 != shape[1]
    return half or scheme.min is not None or isinstance(scheme.scale, Scheme)


def obstacle(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight cannot be laid out in panels, as the end of a sentence; None if it can.

    scheme: of the weight. shape: [N, K]. dtype: of the inputs. device: where the weight is to be. Panels hold integers
    of 2 to 8 bits, and what `laying` makes integers of, with one scale and at most one integer zero point or minimum
    for a group of a row; a group is a multiple of 32 columns, 16 of them, or the whole row.
    """
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in TYPES:
        return f"takes float32, float16 and bfloat16, not {dtype}"
    if reason := laying.obstacle(scheme):
        return reason
    group = scheme.group_columns or shape[1]
    if group != shape[1] and group % TILE and (group != TILE // 2 or shape[1] % TILE):
        return f"groups are {TILE // 2} or multiples of {TILE}, not {group}"
    if in_blocks(scheme, shape) and (scheme.zero or laying.laid(scheme).half):
        return f"groups of {group} have no zero points or half levels"
    if laying.block_columns(scheme) % TILE:
        return f"scales of scales are for multiples of {TILE} columns, not {laying.block_columns(scheme)}"
    return None


class Room:
    """Memory for tensors that live about as long, in one piece: on huge pages where Linux gives them, and not zeroed.

    With small pages memory reads a fifth to a third slower (docs/kernels.md: 22 and 29 GB/s for one thread). torch has
    no way to ask for huge ones, so that tensors are views of an anonymous mapping, which goes when the last of them
    goes.

    A huge page is given when it is first touched, which takes .1 ms; in a virtual machine whose host has not given the
    memory yet it took 3 to 6, and small pages, which had been used before, .9 for as many bytes. So the first is
    touched and timed: where it is slow the room is filled on small pages, and `merge` makes huge ones of them later.
    """

    def __init__(self, nbytes: int, *, huge: bool = True) -> None:
        """nbytes: of all tensors that will be taken; below a huge page they are torch's memory.

        huge: False where huge pages were slow a moment ago. `self.huge` then says whether these are.
        """
        self.huge = huge
        self._memory: mmap.mmap | None = None
        self._nbytes = nbytes // _HUGE * _HUGE
        if sys.platform == "linux" and self._nbytes:
            self._memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._start = self._next = -torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() % _HUGE
            self.huge = huge and self._are_quick(self._memory)
            if self.huge:
                self._advise(self._nbytes)

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], with anything in it; memory of torch where the room has no more."""
        if self._memory is None or self._next + nbytes > len(self._memory):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        taken = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=self._next)
        self._next += -(-nbytes // _LINE) * _LINE
        return taken

    def small(self) -> list[tuple[int, int]]:
        """What was filled on small pages, as `merge` takes it: (address, bytes), or nothing."""
        if self._memory is None or self.huge:
            return []
        self._advise(self._nbytes)
        return [(torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._start).data_ptr(), self._nbytes)]

    def _are_quick(self, memory: mmap.mmap) -> bool:
        """Whether a first huge page is here sooner than as many bytes of small ones."""
        self._advise(_HUGE)
        begin = time.perf_counter()
        memory[self._start] = 0
        return time.perf_counter() - begin < _QUICK

    def _advise(self, nbytes: int) -> None:
        """Ask for huge pages at the first so many bytes."""
        assert self._memory is not None
        with suppress(OSError):  # a kernel that was built without them
            self._memory.madvise(mmap.MADV_HUGEPAGE, self._start, nbytes)


def merge(rooms: Iterable[Room]) -> None:
    """Make huge pages of the small ones in `rooms`, in the background and unhurriedly: 15 s for a gigabyte where each
    is slow."""
    ranges = [range_ for room in rooms for range_ in room.small()]
    if ranges:
        _native.merge_pages(ranges)


class Staged(NamedTuple):
    """A matrix on its way to panels: `fill` has native code write its tensors, which hold anything until then.

    tensors   as `pack` has them
    packing   what native code makes them from
    """

    tensors: dict[str, torch.Tensor]
    packing: _native.Packing


def nbytes(scheme: Scheme, shape: tuple[int, int], tiling: Tiling = "planes") -> int:
    """Bytes of the codes of a matrix [N, K] in panels, rounded up to whole lines."""
    return -(-math.prod(spec_of(scheme, shape, tiling).tiles) // _LINE) * _LINE


def stage(q: Undecoded, tiling: Tiling = "planes", room: Room | None = None) -> Staged:
    """A matrix [N, K] of a scheme without an `obstacle`, on the CPU, on its way to panels of this tiling.

    room: where its codes will be; None for memory of their own.
    """
    spec = spec_of(q.scheme, q.shape, tiling)
    if laying.laid(q.scheme).step != 1:  # u is not what lies there
        return _stage(spec, "bytes", _bytes(q.qtensor()), q, room)
    return _stage(spec, q.order, q.data, q, room)


def _bytes(q: QTensor) -> torch.Tensor:
    """Codes [N, K] times their step, on the CPU."""
    step = laying.laid(q.scheme).step
    return q.codes.cpu() if step == 1 else q.codes.cpu() * step


def _stage(spec: Spec, order: Order, data: torch.Tensor, q: QTensor | Undecoded, room: Room | None) -> Staged:
    """What `stage` and `pack` share.

    spec         of the matrix
    order, data  its codes, as in `Undecoded`
    q            where the rest of it is
    room         see `stage`
    """
    scheme = q.scheme
    lowest, laid = scheme.levels.lo, laying.laid(scheme)
    room = room or Room(math.prod(spec.tiles))
    codes = room.take(math.prod(spec.tiles)).view(spec.tiles)
    most = (scheme.levels.hi - lowest) * laid.step
    packing = _native.Packing(
        data.contiguous().view(torch.uint8), _ORDERS[order], spec.n, spec.k, laid.bits, -lowest, most, spec.bits, codes
    )
    tensors = {"codes": codes}
    for name, values in laying.steps(scheme, q.scale, q.min).items():
        tensors[name] = _lanes(packing, values.cpu(), spec.n)
    if q.zero is not None:
        tensors["zero"] = _lanes(packing, q.zero.cpu(), spec.n, spec.offset).view(torch.uint8)
    if q.input_scale is not None:
        tensors["input_scale"] = q.input_scale.cpu().clone()
    return Staged(tensors, packing)


def fill(staged: Sequence[Staged], threads: int) -> list[bool]:
    """Write the tensors of all of them, on so many threads -> for each, whether its codes are levels of its scheme.

    Where one is none, the tensors are of no use. The interpreter's lock is free meanwhile.
    """
    return _native.pack_all([one.packing for one in staged], threads)


def pack(q: QTensor, tiling: Tiling = "planes") -> dict[str, torch.Tensor]:
    """A QTensor [N, K] of a scheme without an `obstacle` -> its tensors in panels, on the CPU, by name.

    codes        uint8 [N/16, K/32, 64 * bits], N and K rounded up; in trits [N/80, K/32, 512]
    scale        [N/16, groups, 16], in its stored type, or as `laying.steps` tells; with minima [N/16, 2 groups, 16]:
                 each group's follows its scale
    outer        [N/16, blocks, 16], or twice as many: what scales that are quantized themselves are multiplied by
    zero         uint8, like scale: zero - lo; only with zero points
    input_scale  float32 [1], as it is; only with static activations

    As many threads as torch uses.
    """
    n, k = q.shape
    staged = _stage(spec_of(q.scheme, (n, k), tiling), "bytes", _bytes(q), q, None)
    fill([staged], torch.get_num_threads())
    return staged.tensors


def unpack(scheme: Scheme, shape: tuple[int, int], tensors: Tensors, tiling: Tiling = "planes") -> QTensor:
    """Inverse of `pack`: a matrix [N, K] from its tensors in panels, codes and scales bit for bit, on the CPU.

    scheme, shape and tiling are those of `pack`. A scale of the whole matrix, which panels repeat for each row, is one
    number again. Whether the layer was a Conv1D is not told by panels: who knows it says so in the QTensor.
    """
    n, k = shape
    spec = spec_of(scheme, shape, tiling)
    codes = torch.empty((n, k), dtype=torch.uint8, device="cpu")
    laid = laying.laid(scheme)
    _native.from_panels(tensors["codes"].cpu(), spec.bits, -scheme.levels.lo, codes)
    if laid.step != 1:
        codes //= laid.step
    steps = {name: _from_lanes(tensors[name], n) for name in ("scale", "outer") if name in tensors}
    scale, low = laying.from_steps(scheme, steps)
    zero = None
    if scheme.zero:
        zero = _from_lanes(tensors["zero"], n).to(torch.int16).sub_(spec.offset)
        zero = zero.to(codes_dtype(scheme))
    return QTensor(scheme, codes.view(codes_dtype(scheme)), scale, zero, low, input_scale=tensors.get("input_scale"))


def _lanes(packing: _native.Packing, values: torch.Tensor, n: int, add: int = 0) -> torch.Tensor:
    """Where scales or zero points [N or 1, groups] will be, [N/16, groups, 16]: one vector for the rows of a panel.

    add: to values of one byte. One row stands for all. Rows beyond N, up to a whole panel, become zeros, and so are
    their products.
    """
    groups, size = values.shape[1], values.itemsize
    lanes = torch.empty((-(-n // PANEL), groups, PANEL), dtype=values.dtype, device="cpu")
    packing.add_lanes(values.contiguous().view(torch.uint8), size, add, lanes.view(torch.uint8))
    return lanes


def _from_lanes(lanes: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `_lanes`: [N/16, groups, 16] -> [N, groups]."""
    values = lanes.transpose(1, 2).reshape(-1, lanes.shape[1])[:n]
    return values.clone(memory_format=torch.contiguous_format)  # a column counts as contiguous whatever its stride
