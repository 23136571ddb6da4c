"""The table of types against safetensors' own names, and against the native module's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spicerack.numerics import dtypes, native
from spicerack.storage.reader import BITS


@pytest.mark.parametrize("dtype", dtypes.SAFETENSORS, ids=str)
def test_names_are_those_that_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["x"]["dtype"] == dtypes.safetensors_dtype(dtype)
    assert BITS[dtypes.safetensors_dtype(dtype)] == 8 * dtype.itemsize


def test_what_is_derived() -> None:
    assert {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} == dtypes.SOURCE_BY_NAME
    assert {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16} == dtypes.SOURCE_BY_WORD
    assert (torch.float32, torch.float16, torch.bfloat16) == native.TYPES  # enum class Float of native/number.h
    with pytest.raises(KeyError):
        dtypes.safetensors_dtype(torch.complex64)
