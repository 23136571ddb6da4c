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
from spicerack.exports.readings import Weights
from spicerack.exports.source import Source
from spicerack.exports.targets import _gguf_plan as plans

Array = npt.NDArray[Any]
_UNREAD = ("Q1_0", "Q2_0")
"""Types that gguf-py 0.19 does not decode."""
_ITEMS = {
    "UINT8": 1, "INT8": 1, "BOOL": 1, "UINT16": 2, "INT16": 2, "UINT32": 4, "INT32": 4, "FLOAT32": 4, "UINT64": 8,
    "INT64": 8, "FLOAT64": 8,
}  # fmt: skip
"""Bytes of an item of an array, by what gguf-py calls its type."""


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
        from gguf import GGUFReader, GGUFValueType

        class Reader(GGUFReader):
            """The same over a plain array, of which a view takes a tenth of the time; and items of arrays, which are
            tokens and merges, are stepped over: it makes four objects of each, which is seconds."""

            def _get(self, *args: Any, **rest: Any) -> Array:
                self.data: Any = np.asarray(self.data)
                return np.asarray(super()._get(*args, **rest))

            def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
                if raw_type != GGUFValueType.ARRAY:
                    return super()._get_field_parts(orig_offs, raw_type)
                kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                size = _nbytes_of_items(self.data, orig_offs + 12, GGUFValueType(kind[0]).name, int(count[0]))
                return 12 + size, [kind, count], [], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]

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


def _nbytes_of_items(data: Array, begin: int, kind: str, count: int) -> int:
    """Bytes of so many items of an array, by GGUF's specification, version 3."""
    if kind != "STRING":
        return count * _ITEMS[kind]
    raw, at = data.data, begin
    for _ in range(count):
        at += 8 + int.from_bytes(raw[at : at + 8], "little")
    return at - begin


READER = GgufPy()
