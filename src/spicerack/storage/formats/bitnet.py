"""BitNet: the format that transformers reads as `quant_method` "bitnet". (Facts: transformers 5.24.)

Linear P [N, K], ternary codes, one scale for the tensor, activations in int8, one scale per token:

    P.weight         U8 [N/4, K]   in row r the codes of rows r, r + N/4, r + N/2 and r + 3N/4, each + 1, two bits for
                                   each, the first of them lowest
    P.weight_scale   float [1]     linear_class "autobitlinear": the scale; "bitlinear": 1 / scale

"autobitlinear" is written, as in microsoft/bitnet-b1.58-2B-4T: the scale survives to the bit, which its inverse in
bfloat16 does not. transformers then multiplies biases by the scale too: layers with biases are left to other formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics.dtypes import SOURCE_BY_NAME
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage import layouts
from spicerack.storage.format import Contents, Layout, MethodFormat, Reading, StoredTensor
from spicerack.storage.layouts import BITNET, BITNET_ROWS
from spicerack.storage.reader import Checkpoint

_INVERSE = {"bitlinear": True, "autobitlinear": False}
"""Whether the folder holds 1 / scale."""
_ELSEWHERE = "load it with transformers"
_DAMAGED = "the folder is damaged, or in a variant of bitnet that is not read"


@dataclass(frozen=True, slots=True)
class BitNet(MethodFormat):
    """Ternary linear layers with int8 activations. Methods: `storage.format.Format`."""

    method = "bitnet"
    name: str = "bitnet"
    rank: int = 20
    read_by_others: bool = True
    on_request: bool = False

    def obstacles(self, contents: Contents) -> list[str]:
        """What the format does not have, for each module that needs it."""
        reasons = ((p, layouts.bitnet_obstacle(p.matrix)) for p in contents.values())
        return [f"{p.module}: bitnet has no {reason}" for p, reason in reasons if reason]

    def layout(self, stored: StoredTensor) -> Layout:
        """Four rows of codes to a row of bytes, and a scale."""
        return stored.laid_out(layouts.bitnet)

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """Codes + 1, which is 0, 1 or 2, each quarter of the rows two bits further up."""
        assert not stored.inverse_scale, "1 / scale is read, never written"
        parts = (q.codes + 1).view(torch.uint8).chunk(BITNET_ROWS)
        packed = torch.zeros_like(parts[0])
        for place, part in enumerate(parts):
            packed |= part << 2 * place
        return {f"{stored.module}.weight": packed, f"{stored.module}.weight_scale": q.plain_scale.reshape(1)}

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """With codes that mean nothing refused: two bits hold more than three levels."""
        q = self.undecoded(stored, tensors).qtensor()
        if q.codes.max() > 1:
            raise CheckpointError(f"{stored.module}.weight: a code that is none of -1, 0 and 1", _DAMAGED)
        return q

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded:
        """1 / scale is inverted in float32, which is what the scale then is stored in."""
        module, (rows, columns) = stored.module, stored.shape
        scale = tensors[f"{module}.weight_scale"].reshape(1, 1)
        scale = 1 / scale.float() if stored.inverse_scale else scale
        if not torch.isfinite(scale):
            raise CheckpointError(f"{module}: a scale of {float(scale)}", _DAMAGED)
        return Undecoded(stored.scheme, (rows, columns), "quarters", tensors[f"{module}.weight"], scale)

    def config(self, config: Mapping[str, Any], contents: Contents, reading: Reading) -> dict[str, Any]:
        """`modules_to_not_convert`: the linear layers that stay float."""
        packed = [*contents, *reading.paths.values()]
        quantization = {
            "quant_method": self.method,
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": [_pattern(module, packed) for module in reading.floats],
        }
        return {**config, "quantization_config": quantization}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Modules by the names of their tensors, in a folder whose config.json says packed weights without norms."""
        section, where = checkpoint.config["quantization_config"], f"{checkpoint.folder}: config.json"
        kind, mode = section.get("linear_class", "bitlinear"), section.get("quantization_mode", "offline")
        if not isinstance(kind, str) or kind not in _INVERSE:
            raise CheckpointError(f"{where} has the linear_class {kind!r}", f"one of {', '.join(_INVERSE)}")
        if mode != "offline":
            raise CheckpointError(
                f"{where} has the quantization_mode {mode!r}: its weights are float, and rounded as they run",
                _ELSEWHERE,
            )
        if section.get("use_rms_norm"):
            raise CheckpointError(f"{where} has use_rms_norm: norms within the linear layers are not read", _ELSEWHERE)
        modules = [
            name.rpartition(".")[0]
            for name, info in checkpoint.tensors.items()
            if name.endswith(".weight_scale") or (name.endswith(".weight") and info.dtype == "U8")
        ]
        if not modules:
            raise CheckpointError(f"{checkpoint.folder} has no packed weights", _DAMAGED)
        return {module: _stored(module, _INVERSE[kind], checkpoint) for module in dict.fromkeys(modules)}

    def notes(self, _contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """Who reads it, and how."""
        return ["transformers decodes all weights while loading, and needs accelerate for that; vLLM does not read it"]


def _pattern(module: str, packed: Sequence[str]) -> str:
    """What transformers leaves alone: it takes names for regular expressions, and for ends of longer names.

    packed: every name of the layers that it must not leave alone.
    """
    longer = any(name.endswith(module) for name in packed)
    return f"{re.escape(module)}$" if longer else module


def _stored(module: str, inverse: bool, checkpoint: Checkpoint) -> StoredTensor:
    """`module`, whose tensors must be those of the format, as a StoredTensor.

    inverse: the folder stores 1 / scale. Raises CheckpointError for a tensor that is missing, of another type or shape,
    and for a bias that transformers would multiply by the scale.
    """
    tensors = checkpoint.tensors
    weight, scale = (tensors.get(f"{module}.{part}") for part in ("weight", "weight_scale"))
    for name, info in (("weight", weight), ("weight_scale", scale)):
        if info is None:
            raise CheckpointError(f"{checkpoint.folder}: {module}.{name} is missing", _DAMAGED)
    assert weight is not None and scale is not None
    if weight.dtype != "U8" or len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {weight.name} is {weight.dtype} {list(weight.shape)}, not U8 [N/{BITNET_ROWS}, K]",
            _DAMAGED,
        )
    if scale.dtype not in SOURCE_BY_NAME or scale.numel != 1:
        raise CheckpointError(
            f"{checkpoint.folder}: {scale.name} is {scale.dtype} {list(scale.shape)}, not one float", _DAMAGED
        )
    if not inverse and f"{module}.bias" in tensors:
        raise CheckpointError(
            f"{checkpoint.folder}: {module}.bias: transformers' autobitlinear multiplies it by the weight's scale",
            _ELSEWHERE,
        )
    shape = (BITNET_ROWS * weight.shape[0], weight.shape[1])
    return StoredTensor(module, parse(BITNET), shape, source_dtype=SOURCE_BY_NAME[scale.dtype], inverse_scale=inverse)


FORMAT = BitNet()
