"""llama.cpp's own package for Python, gguf-py: it reads GGUF files and decodes their types, in numpy.

What it reads are llama.cpp's names and order of rows; they are brought back here by llama.cpp's formulas, and not by
the code that brought them there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spicerack.exports.source import Source
from spicerack.exports.verify import Weights
from spicerack.models.gguf import config as configs
from spicerack.models.gguf.family import of_type
from spicerack.models.gguf.names import Names, Place
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.storage.gguf import blocks

Array = npt.NDArray[Any]
_UNREAD = ("Q1_0", "Q2_0")
"""Types that gguf-py 0.19 does not decode."""


@dataclass(frozen=True, slots=True)
class GgufPy:
    """See the module. Methods: `exports.verify.Reader`."""

    foreign: bool = True

    @property
    def name(self) -> str:
        """With the version that is installed."""
        return f"gguf-py {importlib.metadata.version('gguf')}"

    def obstacle(self, to: str, source: Source, /) -> str | None:
        """Another format, a package that is not installed, or types that it does not decode."""
        if to != "gguf":
            return "it reads GGUF alone"
        if importlib.util.find_spec("gguf") is None:
            return "gguf is not installed: pip install 'spicerack-quant[gguf]'"
        schemes = {str(stored.scheme) for stored in source.contents.values()}
        return None if schemes.isdisjoint({"q1_0", "q2_0"}) else f"it does not decode {' and '.join(_UNREAD)}"

    def opened(self, path: Path, source: Source, /) -> Weights:
        """All files of the model, mapped."""
        from gguf import GGUFReader

        stem, _, rest = path.name.rpartition("-00001-of-")
        files = sorted(path.parent.glob(f"{stem}-*-of-{rest}")) if stem else [path]
        tensors = {tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}
        family, config = of_type(source.config.get("model_type")), configs.whole(source.config)
        names = Names(family)

        def weights(name: str) -> torch.Tensor:
            if names.left_out(name):  # the notes say so
                return source.float(name)
            place = names.place(name)
            assert place is not None, "what has no place is refused"
            values = _rows_back(_decoded(tensors, place.tensor, place), place, config)
            scale = place.tensor.removesuffix(".weight") + ".scale"
            if scale in tensors and scale != place.tensor:
                factor = _tensor(_decoded(tensors, scale, place)).reshape(-1)
                return _times(_tensor(values), factor, source.packed(name.removesuffix(".weight")))
            if family.plus_one and place.module.endswith("norm"):
                return _less_one(values, source.float(name))
            # what is packed is [N, K], whatever the checkpoint's order is
            return _tensor(values.T if place.turned and name in source.floats else values)

        return weights


def _decoded(tensors: Mapping[str, Any], name: str, place: Place) -> Array:
    """A tensor of the file, or the one of a stack, as its numbers."""
    from gguf import GGMLQuantizationType, dequantize

    tensor = tensors[name]
    stack = tensor.data if place.member is None else tensor.data[place.member]
    if tensor.tensor_type == GGMLQuantizationType.F16:
        return np.asarray(stack)
    return np.asarray(dequantize(np.atleast_1d(stack), tensor.tensor_type))


def _times(values: torch.Tensor, factor: torch.Tensor, q: QTensor) -> torch.Tensor:
    """NVFP4 times the scale of the tensor: the very weights where both are what they should be.

    llama.cpp multiplies by it last and we first, of which float32 rounds one otherwise than the other.
    """
    inner, own = blocks.without_tensor_scale(q)
    wanted = torch.ones_like(factor) if own is None else own
    same = torch.equal(values, codec.decode(inner)) and torch.equal(factor, wanted)
    return codec.decode(q) if same else values * factor


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
    """The same as a tensor; what is mapped from a file is copied, as torch has no tensors that may not be written."""
    return torch.from_numpy(np.require(values, requirements="W"))


def _less_one(values: Array, wanted: torch.Tensor) -> torch.Tensor:
    """A norm without the 1 that was added: the very weight where 1 + w is what was read, which is all that both
    transformers and llama.cpp multiply by; float32 has not always another way back."""
    read = _tensor(values)
    return wanted if torch.equal(read, wanted.float() + 1) else read - 1


READER = GgufPy()
