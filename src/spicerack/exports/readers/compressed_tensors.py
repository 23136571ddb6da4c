"""compressed-tensors' own code, by which transformers decodes such folders: its config, matching and decompression.

Scales are handed to it in float32, so that what it multiplies is not rounded to 16 bits: what is compared are codes and
scales, and not a type.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spicerack.errors import OutputError
from spicerack.exports.readers._described import matrix
from spicerack.exports.readings import Grid, Weights, sampled
from spicerack.exports.source import Source
from spicerack.storage.reader import Checkpoint

_FORMAT = "compressed-tensors"
_MULTIPLE = 32
"""Rows whose zero points fill whole words, whatever their bits."""


@dataclass(frozen=True, slots=True)
class CompressedTensorsReader:
    """Methods: `exports.verify.Reader`."""

    foreign: bool = True

    @property
    def name(self) -> str:
        """With the version that is installed."""
        return f"{_FORMAT} {importlib.metadata.version(_FORMAT)}"

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Other formats, or the package is not there."""
        if to != _FORMAT:
            return f"{to} is not its format"
        return None if importlib.util.find_spec("compressed_tensors") else f"{_FORMAT} is not installed"

    def opened(self, path: Path, source: Source, /) -> Weights:
        """From the section of config.json, as it understands it."""
        checkpoint = Checkpoint.open(path).held()
        config = import_module("compressed_tensors.quantization").QuantizationConfig
        section = config.model_validate(checkpoint.config["quantization_config"])
        return partial(_weights, checkpoint, section, source)


def _weights(checkpoint: Checkpoint, section: Any, source: Source, name: str) -> torch.Tensor | Grid:
    """One tensor: taken apart where the source has it packed, with rows that it decompresses; else as it lies there."""
    module = name.removesuffix(".weight")
    if module not in source.contents:
        return checkpoint.read(name)
    n, k = source.contents[module].shape
    scheme = _scheme(section, module, (n, k))
    compressors = import_module("compressed_tensors.compressors").BaseCompressor
    compressor = compressors.get_value_from_registry(scheme.format)
    prefix = f"{module}."
    whole = {part.removeprefix(prefix): checkpoint.read(part) for part in checkpoint.tensors if part.startswith(prefix)}
    whole["weight_scale"] = whole["weight_scale"].float()

    def decoded(first: int, last: int) -> torch.Tensor:
        """Rows, float32; words of zero points are of eight rows, or sixteen."""
        rows = slice(first, last)
        parts = {key: part[rows] if len(part) == n else part for key, part in whole.items()}
        if "weight_shape" in whole:
            parts["weight_shape"] = torch.tensor([last - first, k], dtype=torch.int64, device="cpu")
        if (zeros := whole.get("weight_zero_point")) is not None:
            parts["weight_zero_point"] = zeros[len(zeros) * first // n : -(-len(zeros) * last // n)]
        values: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
        return values

    grid = matrix(checkpoint, module)
    assert isinstance(grid, Grid), "what is packed there is integers"
    pieces = sampled(name, (n, k), _MULTIPLE)
    return replace(grid, samples=[(first, decoded(first, last)) for first, last in pieces])


def _scheme(section: Any, module: str, shape: tuple[int, ...]) -> Any:
    """The group of config.json that takes a linear layer of this name. Raises OutputError where none does."""
    matches = import_module("compressed_tensors.utils.match").match_targets
    layer = torch.nn.Linear(shape[1], shape[0], device="meta", dtype=torch.float32)
    if not matches(module, layer, section.ignore or []):
        for scheme in section.config_groups.values():
            if matches(module, layer, scheme.targets):
                return scheme
    raise OutputError(f"{module}: no group of config.json takes it", "this is a fault of spicerack: please report it")


READER = CompressedTensorsReader()
