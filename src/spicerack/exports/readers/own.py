"""Our own second opinion, in numpy, for formats whose engine is not installed: bit by bit, from their descriptions.

It shares nothing with what writes: no packing, no QTensor, no scheme. Slow where that code is fast, and short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spicerack._version import __version__
from spicerack.exports.source import Source
from spicerack.exports.verify import Weights
from spicerack.storage.reader import Checkpoint

Array = npt.NDArray[Any]
Read = Callable[[str], Array]
"""Suffix of a module's tensor -> its numbers."""
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Half byte of a word that holds each of eight outputs."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def stream(words: Array, bits: int) -> Array:
    """Words [R, W] of 32 bits -> the codes uint8 [R, 32 W // bits] that lie in their stream, lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    count = octets.shape[1] * 8 // bits
    codes = np.empty((len(octets), count), np.uint8)
    if 8 % bits == 0:  # no code lies in two bytes
        for place in range(8 // bits):
            np.bitwise_and(octets >> place * bits, 2**bits - 1, out=codes[:, place :: 8 // bits])
        return codes
    for row, line in zip(codes, octets, strict=True):
        flags = np.unpackbits(line, bitorder="little")[: count * bits].reshape(count, bits)
        row[:] = np.packbits(flags, axis=1, bitorder="little")[:, 0]
    return codes


def times_scales(codes: Array, zeros: Array | int, scales: Array) -> Array:
    """(codes - zeros) * scales, float32 [N, K]; codes uint8 [N, K], zeros and scales [N, G] of as many groups."""
    n, groups = scales.shape
    values = codes.reshape(n, groups, -1).astype(np.float32)
    values -= np.broadcast_to(np.asarray(zeros, np.float32), scales.shape)[..., None]
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(n, -1)


def _gptq(read: Read, section: Mapping[str, Any], _of: Mapping[str, Any]) -> Array:
    """[N, K] of a GPTQ module."""
    bits = section["bits"]
    codes = stream(read("qweight").T, bits)
    zeros = stream(read("qzeros"), bits)[:, : len(codes)]
    if section["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) % 2**bits
    group, scales = read("g_idx"), read("scales")
    if not np.array_equal(group, np.arange(len(group)) // (len(group) // len(scales))):
        raise ValueError("g_idx is not in order")
    return times_scales(codes, zeros.T, scales.T)


def _awq(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> Array:
    """[N, K] of an AWQ module."""

    def outputs(words: Array) -> Array:
        return stream(words, 4).reshape(len(words), -1, 8)[:, :, _AWQ].reshape(len(words), -1)

    return times_scales(outputs(read("qweight")).T, outputs(read("qzeros")).T, read("scales").T)


def _mlx(read: Read, _section: Mapping[str, Any], of: Mapping[str, Any]) -> Array:
    """[N, K] of an MLX module."""
    codes, scales = stream(read("weight"), of["bits"]), read("scales")
    n, groups = scales.shape
    if of["mode"] == "mxfp4":
        powers = np.exp2(scales.astype(np.float32) - 127)
        return (_E2M1[codes].reshape(n, groups, -1) * powers[..., None]).reshape(n, -1)
    values = times_scales(codes, 0, scales).reshape(n, groups, -1)
    values += read("biases").astype(np.float32)[..., None]
    return values.reshape(n, -1)


def _bitnet(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> Array:
    """[N, K] of a bitnet module whose scale is not inverted."""
    packed = read("weight")
    parts = [(packed >> 2 * place & 3).astype(np.float32) - 1 for place in range(4)]
    whole: Array = np.concatenate(parts) * read("weight_scale").astype(np.float32)
    return whole


def _compressed(read: Read, _section: Mapping[str, Any], _of: Mapping[str, Any]) -> Array:
    """[N, K] of a compressed-tensors module, packed or in bytes."""
    try:
        n, k = read("weight_shape")
    except KeyError:
        return times_scales(read("weight"), 0, read("weight_scale"))
    words, scale = read("weight_packed"), read("weight_scale")
    bits = words.shape[1] * 32 // k
    codes = stream(words, bits)[:, :k]
    try:
        return times_scales(codes, stream(read("weight_zero_point").T, bits)[:, :n].T, scale)
    except KeyError:
        return times_scales(codes, 2 ** (bits - 1), scale)


_DECODERS: dict[str, Callable[[Read, Mapping[str, Any], Mapping[str, Any]], Array]] = {
    "gptq": _gptq,
    "awq": _awq,
    "mlx": _mlx,
    "bitnet": _bitnet,
    "compressed-tensors": _compressed,
}


@dataclass(frozen=True, slots=True)
class Own:
    """Methods: `exports.verify.Reader`."""

    name: str = f"spicerack {__version__}'s second decoder"
    foreign: bool = False

    def obstacle(self, to: str, _source: Source, /) -> str | None:
        """Formats that are not described here."""
        return None if to in _DECODERS else f"{to} is not decoded here"

    def opened(self, path: Path, to: str, source: Source, /) -> Weights:
        """From files and config.json alone."""
        checkpoint = Checkpoint.open(path).held()
        return partial(_weights, checkpoint, _DECODERS[to], source)


def _weights(
    checkpoint: Checkpoint,
    decoder: Callable[[Read, Mapping[str, Any], Mapping[str, Any]], Array],
    source: Source,
    name: str,
) -> torch.Tensor:
    """One tensor: decoded where the source has it packed, else as it lies there."""
    module = name.removesuffix(".weight")
    if module not in source.contents:
        return checkpoint.read(name)
    section: Mapping[str, Any] = checkpoint.config.get("quantization_config", {})

    def read(part: str) -> Array:
        tensor = checkpoint.read(f"{module}.{part}")
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    of = {**section, **section.get(module, {})}
    return torch.from_numpy(np.ascontiguousarray(decoder(read, section, of), dtype=np.float32))


READER = Own()
