"""Float types and their names: one table for all who ask what a tensor may be, or what safetensors calls it.

Three languages name them: torch ("torch.bfloat16"), safetensors ("BF16") and config.json ("bfloat16").
"""

from __future__ import annotations

import torch

SAFETENSORS: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
"""torch's type -> what safetensors calls it, for every type that is written."""

BY_SAFETENSORS: dict[str, torch.dtype] = {name: dtype for dtype, name in SAFETENSORS.items()}
"""safetensors' name -> torch's type."""

SOURCES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
"""The float types that weights are quantized from and computed in, and that plain scales are stored in.

Their places are their numbers in the native module (`enum class Float` of native/number.h).
"""

SOURCE_BY_NAME: dict[str, torch.dtype] = {SAFETENSORS[dtype]: dtype for dtype in SOURCES}
"""safetensors' name -> torch's type, of sources alone: "BF16" -> torch.bfloat16."""

SOURCE_BY_WORD: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in SOURCES}
"""torch's own word -> its type, as config.json and schemes spell it: "bfloat16" -> torch.bfloat16."""


def safetensors_dtype(dtype: torch.dtype) -> str:
    """What safetensors calls a type of torch, such as "BF16". Raises KeyError for types that it does not hold."""
    return SAFETENSORS[dtype]
