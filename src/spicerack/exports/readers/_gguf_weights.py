"""What a GGUF file says, in a checkpoint's names and order of rows, by llama.cpp's formulas.

They are brought back here, and not by the code that brought them there. Whose decoder it is does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spicerack.exports.readings import Rows, Stack, Weights
from spicerack.exports.source import Source
from spicerack.models.gguf import config as configs
from spicerack.models.gguf.family import of_type
from spicerack.models.gguf.names import Names, Place
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES

Array = npt.NDArray[Any]


class Tensors(Protocol):
    """The tensors of all files of a model, as somebody reads and decodes them."""

    def __contains__(self, name: object, /) -> bool: ...

    def forget(self) -> None:
        """Whatever was mapped of the files need not stay in memory; it is mapped again when it is looked at."""

    def type(self, name: str, /) -> str:
        """What ggml calls the type of a tensor."""

    def rows(self, name: str, /) -> Array:
        """As they lie there: bytes [.., N, row_bytes], or floats [.., N, K]."""

    def numbers(self, name: str, rows: Array, /) -> Array:
        """Some rows of a tensor, decoded, in float32 or in the type of the file."""


def files_of(path: Path) -> list[Path]:
    """All files of a model that is written to `path`, its first file."""
    stem, _, rest = path.name.rpartition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}-*-of-{rest}")) if stem else [path]


def weights_of(tensors: Tensors, source: Source) -> Weights:
    """`exports.readings.Weights` of the files that `tensors` are read from."""
    family, config = of_type(source.config.get("model_type")), configs.whole(source.config)
    names = Names(family)

    def weights(name: str) -> torch.Tensor | Rows | Stack:
        tensors.forget()  # what was compared before
        if names.left_out(name):  # the notes say so
            return source.float(name)
        places = names.places(name)
        assert places, "what has no place is refused"
        place = places[0]
        parts = [tensors.rows(one.tensor) for one in places]
        if name in source.floats:
            numbers = [tensors.numbers(place.tensor, _member(rows, place)) for rows in parts]
            values = _rows_back(_shares_back(numbers, place), place, config)
            if family.plus_one and place.module.endswith("norm"):
                return _less_one(values, source.float(name))
            return _tensor(values.swapaxes(-1, -2) if place.turned else values)
        type_ = tensors.type(place.tensor)
        if parts[0].ndim == 3 and place.member is None:
            return Stack(
                lambda number: matrix(place.tensor, type_, _shares_back([p[number] for p in parts], place), name)
            )
        # what is packed is [N, K], whatever the checkpoint's order is
        rows = _rows_back(_shares_back([_member(rows, place) for rows in parts], place), place, config)
        scale = place.tensor.removesuffix(".weight") + ".scale"
        if scale in tensors:
            factor = _tensor(tensors.numbers(scale, tensors.rows(scale))).reshape(-1)
            factor = factor if place.member is None else factor[place.member, None]
            q = source.packed(name.removesuffix(".weight"))
            return _times(_tensor(tensors.numbers(place.tensor, rows)), factor, q)
        return matrix(place.tensor, type_, rows, name)

    def matrix(tensor: str, type_: str, rows: Array, name: str) -> Rows:
        """Rows of bytes [N, row_bytes] of a tensor of the file."""
        return Rows(
            len(rows),
            lambda start, stop: _tensor(tensors.numbers(tensor, rows[start:stop])),
            blocks.undecoded(TYPES[type_], _tensor(rows), name),
        )

    return weights


def _times(values: torch.Tensor, factor: torch.Tensor, q: QTensor) -> torch.Tensor:
    """NVFP4 times the scale of the tensor: the very weights where both are what they should be.

    llama.cpp multiplies by it last and we first, of which float32 rounds one otherwise than the other.
    """
    inner, own = blocks.without_tensor_scale(q)
    wanted = torch.ones_like(factor) if own is None else own
    same = torch.equal(values, codec.decode(inner)) and torch.equal(factor, wanted)
    return codec.decode(q) if same else values * factor.reshape(-1, *[1] * (values.ndim - 1))


def _member(rows: Array, place: Place) -> Array:
    """Of experts in one tensor the one that is meant."""
    return rows if place.member is None else np.atleast_1d(rows[place.member])


def _shares_back(parts: Sequence[Array], place: Place) -> Array:
    """One tensor of several whose rows are all rows of it."""
    if place.share is None:
        return parts[0]
    axis = parts[0].ndim + place.axis
    whole = np.concatenate(parts, axis)
    if place.share.alternating:
        rows = whole.shape[axis]
        whole = whole.take(np.arange(rows).reshape(len(parts), -1).T.reshape(-1), axis)
    return whole


def _rows_back(values: Array, place: Place, config: Mapping[str, Any]) -> Array:
    """Rows in transformers' order."""
    heads = int(config["num_attention_heads"]) if place.rows else 0
    if place.rows == "groups":
        keys = int(config["num_kv_heads"]) if config["new_decoder_architecture"] else 1
        width, (rows, *rest) = int(config["hidden_size"]) // heads, values.shape
        q, k, v = np.split(values, [heads * width, (heads + keys) * width])
        q = q.reshape(keys, heads // keys * width, *rest)
        k, v = k.reshape(keys, width, *rest), v.reshape(keys, width, *rest)
        return np.concatenate([q, k, v], axis=1).reshape(rows, *rest)
    if place.rows is None:
        return values
    heads = int(config["num_key_value_heads"]) if place.rows == "keys" else heads
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


def _tensor(values: Array) -> torch.Tensor:
    """The same as a tensor, which nobody writes to: torch has none that may not be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)


def _less_one(values: Array, wanted: torch.Tensor) -> torch.Tensor:
    """A norm without the 1 that was added: the very weight where 1 + w is what was read, which is all that both
    transformers and llama.cpp multiply by; float32 has not always another way back."""
    read = _tensor(values)
    return wanted if torch.equal(read, wanted.float() + 1) else read - 1
