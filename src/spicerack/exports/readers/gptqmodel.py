"""gptqmodel, by which transformers runs GPTQ and AWQ folders: its layers decode theirs, one at a time.

What it gives is float16, each weight rounded once; so are ours before they are compared.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spicerack.exports.readers._described import matrix
from spicerack.exports.readings import Grid, Weights, sampled
from spicerack.exports.source import Source
from spicerack.storage.reader import Checkpoint

_PACKAGE = "gptqmodel"
_FORMATS = ("gptq", "awq")
_MULTIPLE = 32
"""Rows that its layers have in multiples."""


@dataclass(frozen=True, slots=True)
class GPTQModel:
    """Methods: `exports.verify.Reader`."""

    foreign: bool = True

    @property
    def name(self) -> str:
        """With the version that is installed."""
        return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Other formats, or a package that is not there or does not start."""
        if to not in _FORMATS:
            return f"{to} is neither of {' and '.join(_FORMATS)}"
        if importlib.util.find_spec(_PACKAGE) is None:
            return f"{_PACKAGE} is not installed"
        try:
            _module("")
        except ImportError as error:
            return f"{_PACKAGE} does not start: {error}"
        return None

    def opened(self, path: Path, source: Source, /) -> Weights:
        """From files and config.json's section."""
        return partial(_weights, Checkpoint.open(path).held(), source)


def _module(name: str) -> Any:
    """A part of the package; what it says while it is imported goes to standard error, for output may be JSON."""
    with _elsewhere():
        return import_module(f"{_PACKAGE}{name}")


def _elsewhere() -> contextlib.AbstractContextManager[Any]:
    """Within, what is printed goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


def _weights(checkpoint: Checkpoint, source: Source, name: str) -> torch.Tensor | Grid:
    """One tensor: taken apart where the source has it packed, with rows that gptqmodel decodes; else as it lies
    there."""
    module = name.removesuffix(".weight")
    if module not in source.contents:
        return checkpoint.read(name)
    section = checkpoint.config["quantization_config"]
    n, k = source.contents[module].shape
    size = k if section["group_size"] == -1 else section["group_size"]
    whole = {part: checkpoint.read(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}

    def decoded(first: int, last: int) -> torch.Tensor:
        """Rows, float16: outputs are columns there, in whole words."""
        parts = {
            part: tensor[:, tensor.shape[1] * first // n : tensor.shape[1] * last // n].contiguous()
            for part, tensor in whole.items()
        }
        if section["quant_method"] == "awq":
            unpack = _module(".quantization.awq.utils.packing_utils").dequantize_gemm
            columns: torch.Tensor = unpack(**parts, bits=section["bits"], group_size=size)
        else:
            order = checkpoint.read(f"{module}.g_idx")
            columns = _gptq({**parts, "g_idx": order}, section, (last - first, k), size)
        return columns.t()

    grid = matrix(checkpoint, module)
    assert isinstance(grid, Grid), "both formats are integers"
    pieces = sampled(name, (n, k), _MULTIPLE)
    return replace(grid, samples=[(first, decoded(first, last)) for first, last in pieces])


def _gptq(parts: Mapping[str, torch.Tensor], section: Mapping[str, Any], shape: tuple[int, int], size: int) -> Any:
    """[K, N] of a GPTQ layer, float16, as the package's plainest kernel has it."""
    layer = _module(".nn_modules.qlinear.torch").TorchLinear(
        bits=section["bits"], group_size=size, sym=section["sym"], desc_act=section["desc_act"], in_features=shape[1],
        out_features=shape[0], bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    for name, tensor in parts.items():
        setattr(layer, name, tensor.clone())  # it changes zero points in place
    if section["checkpoint_format"] == "gptq":
        convert = _module(".utils.model").convert_gptq_v1_to_v2_format_module
        with _elsewhere():
            convert(module=layer, bits=section["bits"], pack_dtype=torch.int32)
    return layer.dequantize_weight()


READER = GPTQModel()
