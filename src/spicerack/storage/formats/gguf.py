"""GGUF: rows of bytes as a file of llama.cpp has them, under a checkpoint's names. (Facts: libggml 0.25.3.)

Linear P [N, K], or a stack of them, in the type T of ggml, whose blocks lie behind each other in a row:

    P.weight   U8 [.., N, row_bytes]
    P.scale    F32 [1], or one for each of a stack; of NVFP4 alone, and only where it is not 1

config.json says which type each module has; `transposed` names those whose float weight is [K, N]:

    {"quantization_config": {"quant_method": "gguf", "types": {"lm_head": "Q6_K", ...}, "transposed": []}}

No folder lies on disk like this: it is what a .gguf file is to those who read checkpoints (`models.gguf`), and nothing
is taken for it that was not asked for. A tensor's `variant` is its type, with "+scale" where P.scale is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spicerack.errors import CheckpointError
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import Scheme, parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.storage.format import Contents, Layout, MethodFormat, Reading, StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES, GgmlType
from spicerack.storage.reader import Checkpoint, TensorInfo

_SCALED = "+scale"
_SCALE_TYPE = "NVFP4"
"""The type whose tensors may have a scale beside their rows."""
_DAMAGED = "the file is damaged, or newer than this spicerack"


@dataclass(frozen=True, slots=True)
class Gguf(MethodFormat):
    """Linear layers, embeddings and stacks in the types of ggml. Methods: `storage.format.Format`."""

    method = "gguf"
    name: str = "gguf"
    rank: int = 500
    read_by_others: bool = True
    on_request: bool = True

    def obstacles(self, contents: Contents) -> list[str]:
        """Schemes that are no type's own: what other types hold exactly is for exports to choose (`gguf.blocks`)."""
        reasons = ((p, _obstacle(p)) for p in contents.values())
        return [f"{p.module}: gguf has no {reason}" for p, reason in reasons if reason]

    def layout(self, stored: StoredTensor) -> Layout:
        """Rows of bytes, and the scale of an NVFP4 tensor that is new or has one."""
        type_, scaled = _variant(stored)
        *leading, _, columns = stored.shape
        rows: Layout = {f"{stored.module}.weight": ("U8", (*stored.shape[:-1], type_.row_bytes(columns)))}
        return rows | ({f"{stored.module}.scale": ("F32", tuple(leading) or (1,))} if scaled else {})

    def encode(self, stored: StoredTensor, q: QTensor) -> dict[str, torch.Tensor]:
        """`blocks.encode`."""
        type_, scaled = _variant(stored)
        inner, scale = blocks.without_tensor_scale(q) if scaled else (q, None)
        tensors = {f"{stored.module}.weight": blocks.encode(type_, inner, stored.module)}
        if scaled:
            shape = self.layout(stored)[f"{stored.module}.scale"][1]
            ones = torch.ones(shape, dtype=torch.float32, device="cpu")
            tensors[f"{stored.module}.scale"] = ones if scale is None else scale.reshape(shape)
        return tensors

    def decode(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> QTensor:
        """`blocks.decode`."""
        type_, scale = _read(stored, tensors)
        q = blocks.decode(type_, tensors[f"{stored.module}.weight"], stored.module, transposed=stored.transposed)
        return q if scale is None else blocks.with_tensor_scale(q, scale)

    def undecoded(self, stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> Undecoded | None:
        """Of matrices: scales lie between codes there, which are drawn together into a stream."""
        if len(stored.shape) != 2:
            return None
        type_, scale = _read(stored, tensors)
        u = blocks.undecoded(type_, tensors[f"{stored.module}.weight"], stored.module, transposed=stored.transposed)
        return u if scale is None else blocks.with_tensor_scale(u, scale)

    def config(self, config: Mapping[str, Any], contents: Contents, _reading: Reading) -> dict[str, Any]:
        """`types` and `transposed`."""
        section = {
            "quant_method": self.method,
            "types": {p.module: _variant(p)[0].name for p in contents.values()},
            "transposed": [p.module for p in contents.values() if p.transposed],
        }
        return {**config, "quantization_config": section}

    def contents(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """What `types` says, once the tensors are rows of those types."""
        section, where = checkpoint.config["quantization_config"], str(checkpoint.folder)
        types, turned = section.get("types"), section.get("transposed", [])
        if not isinstance(types, dict) or not isinstance(turned, list):
            raise CheckpointError(f"{where}: config.json has no table of types under quantization_config", _DAMAGED)
        return {module: _stored(module, name, module in turned, checkpoint) for module, name in types.items()}

    def notes(self, _contents: Contents, _fused: Sequence[Sequence[str]], _reading: Reading, /) -> list[str]:
        """Who reads it."""
        return ["llama.cpp, Ollama and LM Studio read it once it is in a .gguf file"]


def _type_of(scheme: Scheme) -> GgmlType | None:
    """The type that a scheme is written as: of TQ1_0 and TQ2_0 the one that is read faster."""
    own = [type_ for type_ in TYPES.values() if type_.scheme == scheme.name]
    return max(own, key=lambda type_: type_.nbytes, default=None)


def _variant(stored: StoredTensor) -> tuple[GgmlType, bool]:
    """Type of a tensor without an `_obstacle`, and whether its scale lies beside it: as read, or as it will be."""
    if stored.variant:
        name, _, scale = stored.variant.partition("+")
        return TYPES[name], bool(scale)
    type_ = _type_of(stored.scheme)
    assert type_ is not None, "obstacles names schemes that are no type's"
    return type_, type_.name == _SCALE_TYPE


def _read(stored: StoredTensor, tensors: Mapping[str, torch.Tensor]) -> tuple[GgmlType, torch.Tensor | None]:
    """Type of a tensor, and the scale beside it if there is one. Raises CheckpointError for one that is not finite."""
    type_, scaled = _variant(stored)
    scale = tensors[f"{stored.module}.scale"] if scaled else None
    if scale is not None and not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{stored.module}: a scale of the tensor that is not finite", _DAMAGED)
    return type_, scale


def _obstacle(p: StoredTensor) -> str | None:
    """What the format lacks for `p`, as the end of "gguf has no"; None if it holds it exactly."""
    type_ = _type_of(p.scheme)
    if type_ is None:
        return f"{p.scheme.name}"
    if p.shape[-1] % type_.block:
        return f"rows of {p.shape[-1]} in {type_}, only multiples of {type_.block}"
    if p.scheme.scale == "source" and dtype_of(p.scheme.scale, p.source_dtype) != torch.float16:
        return "scales in bfloat16"
    return None


def _stored(module: str, name: Any, transposed: bool, checkpoint: Checkpoint) -> StoredTensor:
    """`module`, whose rows must be of the type that is called `name`. Raises CheckpointError."""
    type_ = TYPES.get(name) if isinstance(name, str) else None
    if type_ is None or type_.scheme is None:
        raise CheckpointError(f"{checkpoint.folder}: {module} is in the type {name!r}, which is not read", _DAMAGED)
    info, scale = (checkpoint.tensors.get(f"{module}.{part}") for part in ("weight", "scale"))
    if info is None or info.dtype != "U8" or len(info.shape) < 2 or 0 in info.shape or info.shape[-1] % type_.nbytes:
        there = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
        raise CheckpointError(f"{checkpoint.folder}: {module}.weight {there}, not rows of {type_}", _DAMAGED)
    shape = (*info.shape[:-1], info.shape[-1] // type_.nbytes * type_.block)
    if scale is not None:
        _check_scale(type_, scale, shape, checkpoint)
    dtype = torch.float16 if checkpoint.config.get("dtype") == "float16" else torch.float32  # scales are float16
    variant = type_.name + (_SCALED if scale is not None else "")
    assert type_.scheme is not None
    role = "experts" if len(shape) > 2 else "linear"
    return StoredTensor(
        module, parse(type_.scheme), shape, role=role, source_dtype=dtype, transposed=transposed, variant=variant
    )


def _check_scale(type_: GgmlType, scale: TensorInfo, shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a scale of a tensor [.., N, K] that its type has not, or of another shape."""
    many = scale.numel != 1 and (len(shape) < 3 or scale.shape != shape[:-2])
    if type_.name != _SCALE_TYPE or scale.dtype != "F32" or many:
        raise CheckpointError(
            f"{checkpoint.folder}: {scale.name} is {scale.dtype} {list(scale.shape)}, which {type_} has not", _DAMAGED
        )


FORMAT = Gguf()
