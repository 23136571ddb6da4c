"""What was written is compared as a whole: all integers and floats, and rows that readers decode."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spicerack.errors import OutputError
from spicerack.exports import readings, verify
from spicerack.exports.readings import Rows
from spicerack.exports.source import Source
from spicerack.numerics import codec, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.storage.format import StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES
from spicerack.storage.reader import TensorInfo

SHAPE = (600, 512)


@dataclasses.dataclass(frozen=True)
class Fake:
    """A reader of one matrix, whose bytes and numbers are given."""

    rows: Rows
    name: str = "somebody"
    foreign: bool = True

    def obstacle(self, _to: str, _source: Source, /) -> str | None:
        return None

    def opened(self, _path: Path, _source: Source, /) -> readings.Weights:
        return lambda _name: self.rows


@dataclasses.dataclass(frozen=True)
class One:
    """A source of one matrix."""

    q: QTensor

    def order(self) -> list[StoredTensor]:
        return [StoredTensor("layer", self.q.scheme, self.q.shape)]

    def either(self, _module: str) -> QTensor:
        return self.q

    def release(self, _tensor: StoredTensor) -> None:
        """Nothing is mapped."""


@dataclasses.dataclass(frozen=True)
class FakeFloats(Fake):
    """A reader of one float tensor."""

    rows: torch.Tensor  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class OneFloat:
    """A source of one float tensor."""

    info: TensorInfo
    tensor: torch.Tensor

    def order(self) -> list[TensorInfo]:
        return [self.info]

    def float(self, _name: str) -> torch.Tensor:
        return self.tensor

    def release(self, _tensor: TensorInfo) -> None:
        """Nothing is mapped."""


def checked(q: QTensor, raw: torch.Tensor, type_: str, change: Callable[[torch.Tensor], object]) -> None:
    """Raises OutputError unless bytes of a type are q, whose numbers a reader changes."""
    values = codec.decode(q)
    change(values)
    rows = Rows(len(raw), lambda start, stop: values[start:stop], blocks.undecoded(TYPES[type_], raw))
    verify.verify(Fake(rows), One(q), Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "type_"),
    [("w4g128", "Q4_0"), ("w4g32z", "Q5_0"), ("w2g64", "Q2_0"), ("w2g32h", "Q4_0"), ("w6", "Q6_K"), ("q4_k", "Q4_K"),
     ("ternary", "TQ2_0"), ("w4g64m", "Q4_1"), ("iq4_nl", "IQ4_NL")],
)  # fmt: skip
def test_every_code_counts(scheme: str, type_: str) -> None:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    q = rounding.to_nearest(w, parse(scheme), source=torch.float16)
    raw = blocks.encode(TYPES[type_], q)
    checked(q, raw, type_, lambda _: None)
    pieces = readings.sampled("layer.weight", SHAPE)
    row = next(row for row in range(SHAPE[0]) if not any(start <= row < stop for start, stop in pieces))
    for at in (5, -5):  # a code of a row that no reader decodes
        damaged = raw.clone()
        damaged[row, at] ^= 1
        with pytest.raises(OutputError, match=r"layer\.weight: somebody reads"):
            checked(q, damaged, type_, lambda _: None)


@pytest.mark.parametrize("row", [0, -1])
def test_rows_are_read_by_the_reader(row: int) -> None:
    q = rounding.to_nearest(torch.randn(SHAPE), parse("w4g32"), source=torch.float16)

    with pytest.raises(
        OutputError, match=rf"layer\.weight: somebody reads .* at {row % SHAPE[0] * SHAPE[1] + 3}, where"
    ):
        checked(q, blocks.encode(TYPES["Q4_0"], q), "Q4_0", lambda values: values[row, 3].add_(1))


def test_floats_are_compared_as_bytes() -> None:
    info = TensorInfo("norm", "F32", (3,), 12, "")
    stored = torch.tensor([1.0, torch.nan, -torch.inf])
    for read, fine in ((stored, True), (torch.tensor([1.0, torch.nan, 0.0]), False)):
        reader, source = FakeFloats(read), OneFloat(info, stored)
        with contextlib.nullcontext() if fine else pytest.raises(OutputError, match="norm: somebody reads"):
            verify.verify(reader, source, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "multiple"), [((600, 512), 1), ((1000, 4096), 32), ((7, 8), 1), ((2049, 8192), 32)])
def test_rows_of_both_ends_and_between_are_sampled(shape: tuple[int, int], multiple: int) -> None:
    pieces = [readings.sampled(name, shape, multiple) for name in ("a", "b")]
    for some in pieces:
        assert (some[0][0] == 0 and some[-1][1] == shape[0]) or shape[0] % multiple
        assert all(start % multiple == 0 and start < stop <= shape[0] for start, stop in some)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(some))
    assert (pieces[0] == pieces[1]) == (len(pieces[0]) == 1)
