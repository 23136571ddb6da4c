"""MLX's own reader: mlx-lm builds and fills the model as it does for its users, and mlx decodes what it then holds.

Nothing is evaluated but the tensor that is asked for. Of families that mlx-lm has no class for, files are read by mlx.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spicerack.errors import OutputError
from spicerack.exports.readings import Grid, Weights, Words, sampled
from spicerack.exports.source import Source
from spicerack.numerics.dtypes import BY_SAFETENSORS
from spicerack.storage.reader import Checkpoint
from spicerack.storage.stacks import place, unstacked

_PACKAGES = ("mlx", "mlx_lm")


@dataclass(frozen=True, slots=True)
class MLXReader:
    """Methods: `exports.verify.Reader`."""

    foreign: bool = True

    @property
    def name(self) -> str:
        """Both packages, with their versions."""
        return f"mlx {importlib.metadata.version('mlx')}, mlx-lm {importlib.metadata.version('mlx-lm')}"

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Other formats, or packages that are not there."""
        if to != "mlx":
            return f"{to} is not MLX's"
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        return f"{missing[0]} is not installed" if missing else None

    def opened(self, path: Path, source: Source, /) -> Weights:
        """The model as mlx-lm loads it. Raises OutputError where it knows the family and does not load the folder."""
        checkpoint = unstacked(Checkpoint.open(path))
        return partial(_weights, _arrays(path, checkpoint), checkpoint, source)


def _arrays(path: Path, checkpoint: Checkpoint) -> Callable[[str], Any]:
    """Name of a parameter -> what mlx has there, which is not evaluated yet."""
    mx, mlx_lm = import_module("mlx.core"), import_module("mlx_lm.utils")
    known: dict[str, Any] = {}
    for shard in checkpoint.shards:
        known |= mx.load(str(path / shard))
    try:
        mlx_lm._get_classes(dict(checkpoint.config))
    except ValueError:  # mlx-lm has no class of that family: nobody loads it, and the files are what there is
        return partial(_array, known)
    except SystemExit as error:  # of a family that needs a package which is not here: it says so itself
        raise OutputError(
            f"mlx-lm has left the program for {checkpoint.config.get('model_type')!r}", "install what it asks for"
        ) from error
    try:
        model, _ = mlx_lm.load_model(path, lazy=True)
    except Exception as error:  # whatever somebody else's code raises: the folder does not load there
        raise OutputError(f"mlx-lm does not load what was written: {error}", "export it to something else") from error
    # what it renames while loading is looked up in the files
    return partial(_array, known | dict(import_module("mlx.utils").tree_flatten(model.parameters())))


def _array(known: Mapping[str, Any], name: str) -> Any:
    """A tensor under a checkpoint's name: a layer of an expert as a row of its stack."""
    module, _, last = name.rpartition(".")
    if (at := place(module)) is not None and (stack := f"{at[0]}.{last}") in known:
        return known[stack][at[1]]
    return known[name]


def _weights(arrays: Callable[[str], Any], checkpoint: Checkpoint, source: Source, name: str) -> torch.Tensor | Grid:
    """One tensor: as the model has it where the source has it packed, with rows that mlx decodes, as it would any; else
    as it lies there."""
    mx, module = import_module("mlx.core"), name.removesuffix(".weight")
    if module not in source.contents:
        return _float(arrays(name), checkpoint.tensors[name].dtype)
    section: Mapping[str, Any] = checkpoint.config["quantization"]
    of = {**section, **section.get(module, {})}
    words, scales, bits = arrays(name), arrays(f"{module}.scales"), of["bits"]
    affine = of["mode"] == "affine"
    biases = arrays(f"{module}.biases").astype(mx.float32) if affine else None
    # in float32: what mlx would round products and sums to is not what is asked here
    scales = scales.astype(mx.float32) if affine else scales
    columns = words.shape[1] * 32 // bits

    def decoded(first: int, last: int) -> torch.Tensor:
        """Rows, float32."""
        rows = slice(first, last)
        values = mx.dequantize(
            words[rows], scales[rows], None if biases is None else biases[rows], group_size=of["group_size"], bits=bits,
            mode=of["mode"], dtype=mx.float32,
        )  # fmt: skip
        return torch.from_numpy(np.array(values))

    if not affine:
        return decoded(0, words.shape[0])
    tensor = torch.from_numpy
    codes = Words(tensor(np.array(words).view(np.int32)), bits, columns)
    zero = torch.zeros((), dtype=torch.float32, device="cpu")
    samples = [(first, decoded(first, last)) for first, last in sampled(name, (words.shape[0], columns))]
    return Grid(codes, tensor(np.array(scales)), zero, tensor(np.array(biases)), samples)


def _float(array: Any, dtype: str) -> torch.Tensor:
    """A float as torch has it, bit for bit; dtype: as safetensors calls it."""
    raw = np.array(array.reshape(-1).view(import_module("mlx.core").uint8))
    return torch.from_numpy(raw).view(BY_SAFETENSORS[dtype]).reshape(tuple(array.shape))


READER = MLXReader()
