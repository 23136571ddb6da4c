"""Releases in FP8 or MXFP4 with the codes that they have: what `import` makes a folder of, and what `export` writes of
the latter. Everywhere else they are floats.

Our `fp8` is a code of E4M3 times a scale of its row. A release with a scale for each row is that; of one with a scale
for the tensor each row gets the same. Scales are stored in 16 bits: a release whose scales have more is refused by
name, and so is one with scales of blocks, which no scheme of ours has. Our `mxfp4` is what gpt-oss is released in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spicerack.errors import CheckpointError, UsageError, listed
from spicerack.numerics.dtypes import BY_SAFETENSORS
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.runtime.folder import Folder
from spicerack.storage.format import Contents, Layout, MethodFormat, Reading, StoredTensor
from spicerack.storage.reader import Checkpoint
from spicerack.storage.released import Coded, Released

_SCHEME = "fp8"
_NO_NUMBER, _NO_POWER = 0x7F, 0xFF
"""E4M3's only pattern that is none, without its sign, and E8M0's."""
_AS_FLOATS = "quantize it: it is read as floats"
_LISTED = 3


def kept(release: Released) -> Folder:
    """The folder of a release, its coded tensors packed in our schemes; no weight is read, scales of FP8 are.

    Raises UsageError naming tensor and rule where codes cannot be kept, and CheckpointError.
    """
    reasons = [f"{name} {reason}" for name, coded in release.coded.items() if (reason := _obstacle(name, coded))]
    if reasons:
        raise UsageError(
            f"{release.folder}: codes cannot be kept: {listed(reasons, _LISTED, 'tensors', between='; ')}", _AS_FLOATS
        )
    parts = {part.name for coded in release.coded.values() for part in (coded.codes, coded.scale)}
    base = release.base.held()
    own = {name: info for name, info in base.tensors.items() if name in parts or name in release.tensors}
    contents = {name.removesuffix(".weight"): _stored(name, release) for name in release.coded}
    fmt = Kept({name.removesuffix(".weight"): coded for name, coded in release.coded.items()})
    return Folder(replace(base, tensors=own, config=release.config), fmt, contents)


def in_mxfp4(folder: Folder) -> Folder:
    """A release in MXFP4 with its codes, any other folder as it is: what there is of FP8 no engine's file holds."""
    release = folder.checkpoint
    if isinstance(release, Released) and all(coded.coding == "mxfp4" for coded in release.coded.values()):
        return kept(release)
    return folder


def _obstacle(name: str, coded: Coded) -> str | None:
    """Why a tensor is not ours with the codes that it has, behind its name; None if it is."""
    if coded.coding == "mxfp4":
        return None
    if len(coded.codes.shape) != 2 or not name.endswith(".weight"):
        return f"is FP8 of {len(coded.codes.shape)} axes"
    rows, columns = coded.block
    n, k = coded.codes.shape
    if math.prod(coded.scale.shape) == 1 or (rows == 1 and columns == k and n == math.prod(coded.scale.shape)):
        return None
    return f"has a scale for {rows} x {columns} weights, {_SCHEME} has one for a row"


def _stored(name: str, release: Released) -> StoredTensor:
    """A tensor as ours, with scales of the first 16-bit type that holds them. Raises UsageError if none does."""
    coded, model = release.coded[name], BY_SAFETENSORS[release.tensors[name].dtype]
    if coded.coding == "mxfp4":
        experts, k, n = release.tensors[name].shape  # gpt-oss's code has inputs first, its files outputs
        return StoredTensor(
            name, parse("mxfp4"), (experts, n, k), role="experts", source_dtype=model, transposed=True
        )  # fmt: skip
    scale = release.base.read(coded.scale.name).float()
    for source in dict.fromkeys((model, torch.bfloat16, torch.float16)):
        if torch.equal(scale.to(dtype_of("source", source)).float(), scale):
            n, k = coded.codes.shape
            return StoredTensor(name.removesuffix(".weight"), parse(_SCHEME), (n, k), source_dtype=source)
    reason = f"{coded.scale.name} has numbers that no float of 16 bits holds"
    raise UsageError(f"{release.folder}: codes cannot be kept: {reason}", _AS_FLOATS)


@dataclass(frozen=True, slots=True)
class Kept(MethodFormat):
    """How a release lies in its folder; it is read alone. Methods: `storage.format.Format`.

    coded: module -> how it lies there.
    """

    coded: Mapping[str, Coded]
    method = "fp8"
    name: str = "fp8"
    rank: int = 0
    read_by_others: bool = True
    on_request: bool = True

    def obstacles(self, contents: Contents) -> list[str]:
        """All: nobody writes it."""
        return [f"{module}: releases are only read" for module in contents]

    def layout(self, stored: StoredTensor) -> Layout:
        """The tensors of a module that is there."""
        coded = self.coded[stored.module]
        return {info.name: (info.dtype, info.shape) for info in (coded.codes, coded.scale)}

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """Nobody asks, because of `obstacles`."""
        raise AssertionError(f"{stored.module}: releases are only read")

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """Codes are the patterns of bits that they are."""
        codes, scale = (tensors[name] for name in self.layout(stored))
        if self.coded[stored.module].coding == "mxfp4":
            return _mxfp4(stored, codes, scale)
        patterns = codes.view(torch.uint8)
        if bool((patterns & _NO_NUMBER == _NO_NUMBER).any()) or not bool(torch.isfinite(scale.float()).all()):
            raise CheckpointError(f"{stored.module}: a weight or scale that is no number", "fetch the files again")
        scale = scale.to(dtype_of(stored.scheme.scale, stored.source_dtype)).reshape(-1, 1)
        return QTensor(stored.scheme, patterns, scale.expand(stored.shape[0], 1).contiguous())

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded | None:
        """One expert of a stack in MXFP4, whose bytes are words of a stream; None of FP8: they are bytes already."""
        if self.coded[stored.module].coding != "mxfp4" or len(stored.shape) != 2:
            return None
        blocks, scale = (tensors[name] for name in self.layout(stored))
        words = blocks.reshape(stored.shape[0], -1).contiguous().view(torch.int32)
        powers = _powers(stored, scale)
        return Undecoded(stored.scheme, stored.shape, "stream", words, powers, transposed=stored.transposed)

    def config(self, config: Mapping[str, Any], contents: Contents, _reading: Reading) -> dict[str, Any]:
        """Nobody asks, because of `obstacles`."""
        raise AssertionError(f"{len(contents)} tensors of a release, which are only read")

    def float_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As it is: a release's config was the float model's when it was opened."""
        return dict(config)

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Nobody asks: `kept` knows them."""
        raise AssertionError(f"{checkpoint.folder}: contents of a release are known when it is opened")

    def notes(self, _contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """None."""
        return []


def _mxfp4(stored: StoredTensor, blocks: torch.Tensor, scale: torch.Tensor) -> QTensor:
    """blocks [.., N, G, 16], scale [.., N, G]: a byte has its low half first. Raises CheckpointError for no number."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-3)
    return QTensor(stored.scheme, codes, _powers(stored, scale), transposed=stored.transposed)


def _powers(stored: StoredTensor, scale: torch.Tensor) -> torch.Tensor:
    """Powers of two, of their bytes. Raises CheckpointError for one that is no number."""
    if bool((scale == _NO_POWER).any()):
        raise CheckpointError(f"{stored.module}: a scale that is no number", "fetch the files again")
    return scale.contiguous().view(torch.float8_e8m0fnu)
