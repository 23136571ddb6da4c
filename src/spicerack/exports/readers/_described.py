"""Formats of folders in numpy, bit by bit, from their descriptions: what `own` reads by, and others compare with.

It shares nothing with what writes: no packing, no QTensor, no scheme but in our own container.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spicerack.exports.readings import Grid, Words, stream
from spicerack.numerics.scheme import FloatType, Scheme
from spicerack.storage.reader import Checkpoint

Array = npt.NDArray[Any]
Read = Callable[[str], Array]
"""Suffix of a module's tensor -> its numbers."""
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Half byte of a word that holds each of eight outputs."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def words(rows: Array, bits: int, columns: int) -> Words:
    """Words [N, W] of 32 bits, of whatever type."""
    return Words(torch.from_numpy(np.ascontiguousarray(rows).view(np.int32)), bits, columns)


def grid(codes: Array | Words, zeros: Array | float, scales: Array, biases: Array | None = None) -> Grid:
    """A matrix taken apart: codes [N, K], and zeros, scales and biases [N, G]."""

    tensor = torch.from_numpy
    return Grid(
        codes if isinstance(codes, Words) else tensor(codes),
        tensor(scales),
        tensor(np.asarray(zeros, np.float32)),
        None if biases is None else tensor(biases),
    )


def _gptq(read: Read, section: Mapping[str, Any], _of: Mapping[str, Any]) -> torch.Tensor | Grid:
    """[N, K] of a GPTQ module."""
    bits, group, scales = section["bits"], read("g_idx"), read("scales")
    codes = words(read("qweight").T, bits, len(group))
    zeros = stream(read("qzeros"), bits)[:, : scales.shape[1]]
    if section["checkpoint_format"] == "gptq":
        zeros = (zeros.astype(np.int32) + 1) % 2**bits
    if not np.array_equal(group, np.arange(len(group)) // (len(group) // len(scales))):
        raise ValueError("g_idx is not in order")
    return grid(codes, zeros.T, scales.T)


def _awq(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> torch.Tensor | Grid:
    """[N, K] of an AWQ module."""

    def outputs(words: Array) -> Array:
        """Words [C, N / 8] -> codes [N, C]."""
        words = np.ascontiguousarray(words.T)
        codes = np.empty((len(words), 8, words.shape[1]), np.uint8)
        for output, half in enumerate(_AWQ):
            codes[:, output] = (words >> 4 * half & 15).astype(np.uint8)
        return codes.reshape(-1, words.shape[1])

    return grid(outputs(read("qweight")), outputs(read("qzeros")), read("scales").T)


def _mlx(read: Read, _section: Mapping[str, Any], of: Mapping[str, Any]) -> torch.Tensor | Grid:
    """[N, K] of an MLX module."""
    scales, bits = read("scales"), of["bits"]
    if of["mode"] == "mxfp4":
        codes = stream(read("weight"), bits)
        n, groups = scales.shape
        powers = np.exp2(scales.astype(np.float32) - 127)
        return torch.from_numpy((_E2M1[codes].reshape(n, groups, -1) * powers[..., None]).reshape(n, -1))
    rows = read("weight")
    return grid(words(rows, bits, rows.shape[1] * 32 // bits), 0, scales, read("biases"))


def _bitnet(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> torch.Tensor | Grid:
    """[N, K] of a bitnet module whose scale is not inverted."""
    packed = read("weight")
    parts = [packed >> 2 * place & 3 for place in range(4)]
    return grid(np.concatenate(parts), 1, read("weight_scale").reshape(1, 1))


def _compressed(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> torch.Tensor | Grid:
    """[N, K] of a compressed-tensors module, packed or in bytes."""
    try:
        n, k = map(int, read("weight_shape"))
    except KeyError:
        return grid(read("weight").view(np.uint8) ^ 128, 128, read("weight_scale").reshape(-1, 1))
    rows, scale = read("weight_packed"), read("weight_scale")
    bits = rows.shape[1] * 32 // k
    codes = words(rows, bits, k)
    try:
        return grid(codes, stream(read("weight_zero_point").T, bits)[:, :n].T, scale)
    except KeyError:
        return grid(codes, 2 ** (bits - 1), scale)


def ours(read: Read, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor | Grid:
    """[.., N, K] of a module in our own container; scales and minima may be such, too.

    What a code stands for is asked of the scheme: that is its definition, and not how it is stored.
    """
    *leading, n, k = shape
    rows, columns = scheme.group_shape(n, k)
    grids = scheme.scale_shape(shape)
    rows_ = read("codes")
    inside = words(rows_.reshape(-1, rows_.shape[-1]), scheme.bits, scheme.codes_shape(shape)[-1])

    def part(name: str, kind: FloatType | Scheme) -> torch.Tensor:
        """Scales or minima of groups, float32."""
        if not isinstance(kind, Scheme):
            return torch.from_numpy(read(name).astype(np.float32)).reshape(grids)
        inner = ours(lambda key: read(f"{name}.{key}"), kind, grids)
        return (inner if isinstance(inner, torch.Tensor) else inner.values()).reshape(grids)

    scale = part("scale", scheme.scale)
    zero = torch.zeros(grids, dtype=torch.float32, device="cpu")
    if scheme.zero:
        zeros = read("zero")
        zero = torch.from_numpy(stream(zeros.reshape(-1, zeros.shape[-1]), scheme.bits)[:, : grids[-1]].copy())
        zero = zero.float().reshape(grids) + scheme.levels.lo
    low = None if scheme.min is None else part("min", scheme.min)
    if scheme.plain_obstacle is None and not leading:
        return Grid(inside, scale, zero - scheme.integers.lo - 0.5 * scheme.integers.half)

    def wide(values: torch.Tensor) -> torch.Tensor:
        """One of each group for each of its weights."""
        return values.repeat_interleave(rows, -2).repeat_interleave(columns, -1)

    numbers = inside.codes().long().reshape(*leading, n, -1) + scheme.levels.lo
    values = wide(scale) * (scheme.levels.decode(numbers, 0.0) - wide(zero))
    return values if low is None else values + wide(low)


Decoder = Callable[[Read, Mapping[str, Any], Mapping[str, Any]], "torch.Tensor | Grid"]
DECODERS: dict[str, Decoder] = {
    "gptq": _gptq,
    "awq": _awq,
    "mlx": _mlx,
    "bitnet": _bitnet,
    "compressed-tensors": _compressed,
}


def matrix(checkpoint: Checkpoint, module: str) -> torch.Tensor | Grid:
    """A packed module of a folder in one of the formats that are described here."""
    section: Mapping[str, Any] = checkpoint.config.get("quantization_config", {})
    decoder = DECODERS[section.get("quant_method", "mlx")]
    return decoder(partial(array, checkpoint, module), section, {**section, **section.get(module, {})})


def array(checkpoint: Checkpoint, module: str, part: str) -> Array:
    """A tensor of a module, as numpy has it; floats that it has not are float32."""
    tensor = checkpoint.read(f"{module}.{part}")
    strange = tensor.dtype in (torch.bfloat16, torch.float8_e8m0fnu)
    return (tensor.float() if strange else tensor).numpy()
