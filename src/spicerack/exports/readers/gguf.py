"""llama.cpp's own package for Python, gguf-py: it reads GGUF files and decodes their types, in numpy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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

        files = _gguf_weights.files_of(path)
        return _gguf_weights.weights_of(
            _Tensors({tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}), source
        )


@dataclass(frozen=True, slots=True)
class _Tensors:
    """`_gguf_weights.Tensors` of its own. tensors: by name, as it gives them."""

    tensors: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def rows(self, name: str) -> Array:
        """As it maps them."""
        return np.asarray(self.tensors[name].data)

    def numbers(self, name: str, rows: Array) -> Array:
        """As it decodes them; of float16, which it only has in float32, as they are."""
        from gguf import GGMLQuantizationType, dequantize

        type_ = self.tensors[name].tensor_type
        return rows if type_ == GGMLQuantizationType.F16 else np.asarray(dequantize(rows, type_))


READER = GgufPy()
