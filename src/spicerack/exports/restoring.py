"""A GGUF file of ours, its tensors in the schemes that they had: `w4g128`, which Q4_0 says in `w4g32`.

The file's metadata tells the scheme (`spicerack.schemes`). It is believed where a tensor of that scheme gives the very
bytes that lie in the file; elsewhere the tensor stays in its type's own scheme, which says the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from spicerack.errors import SpicerackError
from spicerack.exports.source import Change, Source
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.numerics.dtypes import SOURCE_BY_WORD
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage.format import StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import GgmlType
from spicerack.storage.gguf.metadata import Value

SCHEMES = "spicerack.schemes"
"""Key of the metadata: JSON, tensor of the file -> scheme, where that is not its type's own."""


def restored(source: Source) -> Source:
    """The source as it is, or, of a GGUF file that tells schemes, with tensors in those; these are read once."""
    checkpoint = source.folder.checkpoint
    told = _told(checkpoint) if isinstance(checkpoint, GgufCheckpoint) else {}
    if not told or not isinstance(checkpoint, GgufCheckpoint):
        return source
    contents, changes = dict(source.contents), dict[str, Change]()
    for module, stored in source.contents.items():
        place, *others = checkpoint.places[f"{module}.weight"]
        name = told.get(place.tensor)
        if name is None or any(told.get(other.tensor) != name for other in others):
            continue
        type_ = checkpoint.file.tensors[place.tensor].type
        wanted = _wanted(stored, name, str(checkpoint.config.get("dtype")))
        if wanted is not None and _restore(source.packed(module), wanted, type_) is not None:
            contents[module] = wanted
            changes[module] = Change(partial(_restored, wanted))
        source.release(stored)
    return Source(source.folder, contents, changes)


def _restored(wanted: StoredTensor, q: QTensor) -> QTensor:
    """q in the scheme of `wanted`, in which it was found to be."""
    return _candidate(q, wanted.scheme, dtype_of(wanted.scheme.scale, wanted.source_dtype)) or q


def _told(checkpoint: GgufCheckpoint) -> Mapping[str, str]:
    """Tensor -> name of a scheme; empty where the file says none, or nothing that can be read."""
    entry = checkpoint.metadata.get(SCHEMES)
    if not isinstance(entry, Value) or not isinstance(entry.value, str):
        return {}
    try:
        told = json.loads(entry.value)
    except (ValueError, RecursionError):  # of a stranger
        return {}
    return told if isinstance(told, dict) else {}


def _wanted(stored: StoredTensor, name: object, dtype: str) -> StoredTensor | None:
    """The tensor in the scheme called `name`; None where there is none, or none of its shape."""
    try:
        scheme = parse(str(name))
        scheme.check_shape(stored.module, stored.shape)
    except SpicerackError:
        return None
    return replace(stored, scheme=scheme, source_dtype=SOURCE_BY_WORD.get(dtype, stored.source_dtype))


def _restore(q: QTensor, wanted: StoredTensor, type_: GgmlType) -> QTensor | None:
    """q in the scheme of `wanted`; None where no tensor of that scheme has these bytes in the type."""
    try:
        candidate = _candidate(q, wanted.scheme, dtype_of(wanted.scheme.scale, wanted.source_dtype))
        if candidate is None or not torch.equal(blocks.encode(type_, candidate), blocks.encode(type_, q)):
            return None
    except SpicerackError:
        return None
    return candidate


def _candidate(q: QTensor, scheme: Scheme, dtype: torch.dtype) -> QTensor | None:
    """What q was, if it was of `scheme`: of each group the scale (and zero point) of its first block.

    None for schemes whose codes a type has changed so that they cannot be told: zero points in a type without minima.
    """
    levels = scheme.levels.integers
    if levels is None or isinstance(scheme.scale, Scheme) or scheme.min is not None:
        return None
    own, codes = q.scheme, q.codes
    scale = q.scale.plain_scale if isinstance(q.scale, QTensor) else q.scale
    unsigned = own.min is not None
    zero = None
    if unsigned:
        codes = (codes.view(torch.uint8).short() + levels.lo).to(torch.int8)
        if scheme.zero:
            if not isinstance(q.min, torch.Tensor):
                return None
            ratio = torch.where(scale == 0, 0, -q.min.float() / scale.float()).round() + levels.lo
            zero = _first(ratio.clamp(levels.lo, levels.hi).to(torch.int8), scheme, q.shape)
    elif scheme.zero:
        return None
    elif levels.half:
        codes, scale = codes >> 1, scale.float() * 2
    fits = bool(((codes >= levels.lo) & (codes <= levels.hi)).all())
    if not fits and not unsigned:  # the other sign, as w2 lies in Q2_0
        codes, scale = -codes, -scale
        fits = bool(((codes >= levels.lo) & (codes <= levels.hi)).all())
    if not fits:
        return None
    return QTensor(
        scheme, codes.to(codes_dtype(scheme)), _first(scale, scheme, q.shape).to(dtype), zero, transposed=q.transposed
    )


def _first(values: torch.Tensor, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """One for each group, of those for each block of each row [.., N, blocks]: the first that it has."""
    *_, rows, columns = scheme.scale_shape(shape)
    step = values.shape[-2] // rows, values.shape[-1] // columns
    return values[..., :: step[0], :: step[1]].contiguous()
