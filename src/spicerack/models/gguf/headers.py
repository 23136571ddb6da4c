"""What the headers of a GGUF file say of a checkpoint's tensors: places, shapes, and the order of rows.

No weight is read. What does not fit the model is refused here, by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spicerack.errors import CheckpointError
from spicerack.models.gguf import rope
from spicerack.models.gguf.family import Family
from spicerack.models.gguf.names import Names, Place
from spicerack.storage.gguf.ggml import FLOATS
from spicerack.storage.gguf.header import GgufTensor
from spicerack.storage.gguf.reader import GgufFile
from spicerack.storage.reader import BITS, TensorInfo

if TYPE_CHECKING:
    import torch

_NEWER = "the file is damaged, or newer than this spicerack"


def tensors_of(
    file: GgufFile, family: Family, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[Place, ...]], dict[str, TensorInfo]]:
    """Names of a checkpoint, in the order of the file -> what each is there, and what a header would say of it."""
    names, places, infos = Names(family), dict[str, list[Place]](), dict[str, list[TensorInfo]]()
    for name, stored in file.tensors.items():
        if name in rope.TENSORS:
            continue
        if stored.type.name not in FLOATS and stored.type.scheme is None:
            raise CheckpointError(f"{file.path}: {name} is {stored.type}, which is not read", _NEWER)
        for own, place in names.modules(name, stored.shape[0]):
            # what is packed is the weight of a module to `storage.formats.gguf`, also where a checkpoint has none
            named = own if stored.type.name in FLOATS or own.endswith(".weight") else f"{own}.weight"
            others = places.setdefault(named, [])
            if place.share is None and others:
                raise CheckpointError(f"{file.path}: {own} is in both {others[0].tensor} and {name}", _NEWER)
            others.append(place)
            infos.setdefault(named, []).append(_info(named, place, stored, file, config))
    for name, shared in places.items():
        if shared[0].share is not None:
            shared.sort(key=lambda place: place.share.number if place.share is not None else 0)
            _check_shares(name, shared, infos[name], file)
    return (
        {name: tuple(own) for name, own in places.items()},
        {name: _whole(places[name][0], own) for name, own in infos.items()},
    )


def _check_shares(name: str, places: Sequence[Place], infos: Sequence[TensorInfo], file: GgufFile) -> None:
    """Raise CheckpointError unless these tensors of a file are all shares of one, of one type and shape."""
    count = places[0].share.count if places[0].share is not None else 1
    types = {file.tensors[place.tensor].type.name for place in places}
    if len(places) != count:
        there = " and ".join(place.tensor for place in places)
        raise CheckpointError(
            f"{file.path}: {name} is {count} tensors of a file, and {there} alone is there in {types.pop()}",
            "the file is incomplete, or has them in two types, of which a checkpoint's tensor has one",
        )
    if len(types) > 1 or len({info.shape for info in infos}) > 1:
        both = " and ".join(f"{p.tensor} {[*file.tensors[p.tensor].shape]}" for p in places)
        raise CheckpointError(f"{file.path}: {both} in {' and '.join(sorted(types))} are not one tensor", _NEWER)


def _whole(place: Place, infos: Sequence[TensorInfo]) -> TensorInfo:
    """What a header would say of a checkpoint's tensor, by what it says of the parts that a file has."""
    first = infos[0]
    shape = [*first.shape]
    if place.share is not None:
        shape[place.axis] = sum(info.shape[place.axis] for info in infos)
    own = turned(tuple(shape)) if place.turned and first.dtype != "U8" else tuple(shape)
    return dataclasses.replace(first, shape=own, nbytes=sum(info.nbytes for info in infos))


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With its last two axes the other way round."""
    return (*shape[:-2], shape[-1], shape[-2])


def _info(name: str, place: Place, stored: GgufTensor, file: GgufFile, config: Mapping[str, Any]) -> TensorInfo:
    """What a header would say of what lies at a place, rows first. Raises CheckpointError for shapes that it cannot
    have."""
    packed = stored.type.name not in FLOATS
    shape = stored.raw_shape if packed else stored.shape
    begin, nbytes = stored.begin, stored.nbytes
    try:
        if place.member is not None:
            shape, nbytes = shape[1:] or (1,), nbytes // shape[0]
            begin += place.member * nbytes
        if place.part is not None:
            axis = -2 if len(shape) > 1 else -1
            start, stop = part_of(place, shape[axis], config)
            row = nbytes // math.prod(shape[: len(shape) + axis + 1])
            if len(shape) > 2 or not 0 <= start < stop <= shape[axis]:
                raise ValueError(f"rows {start} to {stop} of {list(shape)}")
            shape = (stop - start, *shape[1:])
            begin, nbytes = begin + start * row, (stop - start) * row
        if place.rows is not None:
            row_order(place, shape[0], config)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{file.path}: {place.tensor} is {stored.type} {list(stored.shape)}, which its heads do not fit: {error}",
            _NEWER,
        ) from error
    if place.turned and len(shape) < 2:
        raise CheckpointError(f"{file.path}: {place.tensor} {list(shape)} is no matrix", _NEWER)
    if place.module == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)  # a matrix of one row, which files have as a row
    dtype = "U8" if packed else stored.type.name
    return TensorInfo(name, dtype, shape, math.prod(shape) * BITS[dtype] // 8, stored.file, begin)


def part_of(place: Place, rows: int, config: Mapping[str, Any]) -> tuple[int, int]:
    """First row, and the one behind the last, of one of those fused in a tensor of `rows`."""
    assert place.part is not None
    number, count = place.part
    if count == 3:  # queries, keys, values: these two are alike
        heads = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or heads)
        head = rows // (heads + 2 * keys)
        bounds = (0, heads * head, (heads + keys) * head, (heads + 2 * keys) * head)
    else:
        bounds = (0, rows // 2, rows // 2 * 2, rows)
    return bounds[number], bounds[number + 1]


def row_order(place: Place, rows: int, config: Mapping[str, Any]) -> torch.Tensor:
    """Which of a checkpoint's rows is each row in a file, int64 [rows]. config: transformers' full one, or a file's."""
    import torch

    one = torch.arange(rows, device="cpu")
    heads = int(config["num_attention_heads"])
    if place.rows == "groups":
        queries = int(config.get("hidden_size", rows)) // heads
        keys = int(config["num_kv_heads"]) if config.get("new_decoder_architecture") else 1
        groups = one.reshape(keys, heads // keys + 2, queries)
        return torch.cat([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])
    if place.rows == "keys":
        heads = int(config.get("num_key_value_heads") or heads)
    # transformers turns the first half of a head with the second, llama.cpp each even row with the one behind it
    return one.reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
