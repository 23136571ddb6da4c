"""llama.cpp's own package for Python, gguf-py: it reads GGUF files and decodes their types, in numpy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spicerack.exports.readers import _gguf_weights
from spicerack.exports.source import Source
from spicerack.exports.targets import _gguf_plan as plans
from spicerack.exports.verify import Weights

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
        types = {one.spec.type.name for one in plans.plan(plans.Model.of(source.config), source)}
        return None if types.isdisjoint(_UNREAD) else f"it does not decode {' and '.join(_UNREAD)}"

    def opened(self, path: Path, source: Source, /) -> Weights:
        """All files of the model, mapped."""
        from gguf import GGUFReader

        class Reader(GGUFReader):
            """The same over a plain array: a view of its np.memmap takes ten times as long, and each token is four."""

            def _get(self, *args: Any, **rest: Any) -> Array:
                self.data: Any = np.asarray(self.data)
                return np.asarray(super()._get(*args, **rest))

        readers = [Reader(file) for file in _gguf_weights.files_of(path)]
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        return _gguf_weights.weights_of(_Tensors(tensors, [reader.data.base.base for reader in readers]), source)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """`_gguf_weights.Tensors` of its own. tensors: by name, as it gives them. mappings: of the files."""

    tensors: dict[str, Any]
    mappings: list[mmap.mmap]

    def forget(self) -> None:
        """What was mapped need not stay in memory."""
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def type(self, name: str) -> str:
        """By its enumeration."""
        return str(self.tensors[name].tensor_type.name)

    def rows(self, name: str) -> Array:
        """As it maps them."""
        return np.asarray(self.tensors[name].data)

    def numbers(self, name: str, rows: Array) -> Array:
        """As it decodes them; of float16, which it only has in float32, as they are."""
        from gguf import GGMLQuantizationType, dequantize

        type_ = self.tensors[name].tensor_type
        return rows if type_ == GGMLQuantizationType.F16 else np.asarray(dequantize(rows, type_))


READER = GgufPy()
