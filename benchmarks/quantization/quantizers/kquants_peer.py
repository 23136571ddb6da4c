"""llama.cpp: one type for all layers (Q4_K, IQ3_S, ...), with an importance matrix, by the library of its users' wheel.

Specs are names of GGML types. `llama-quantize` calls the same function with the same importances, but mixes types, so
that its Q4_K_M has more bits than Q4_K: here each type stands for itself.
"""

from __future__ import annotations

import ctypes
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import exchange
import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

_BATCH = 8
SECONDS = "seconds"


def importances(given: exchange.Job) -> dict[str, torch.Tensor]:
    """Mean square of each input column over all tokens, float32 [K] by the name of the weight, in the float model.

    They lie beside the tokens for the next spec. `SECONDS` among them is how long they took.
    """
    if given.beside.is_file():
        return load_file(given.beside)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        sums[name] = sums.get(name, 0) + x.square().sum(0)

    for name in given.weights():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _layer, inputs, name=name: watch(name, inputs))
    with torch.no_grad():
        for batch in given.ids.split(_BATCH):
            model(batch)
    found = {name: (total / given.ids.numel()).float() for name, total in sums.items()}
    found[SECONDS] = torch.tensor(time.perf_counter() - begin)
    save_file(found, given.beside)
    return found


def library() -> ctypes.CDLL:
    """The library of the wheel `xllamacpp` that exports ggml_quantize_chunk."""
    files = [Path(str(file.locate())) for file in metadata.files("xllamacpp") or [] if ".so" in file.name]
    for path in sorted(files, key=lambda path: "ggml" not in path.name):
        try:
            found = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            quantize = found.ggml_quantize_chunk
        except (OSError, AttributeError):
            continue
        floats = ctypes.POINTER(ctypes.c_float)
        quantize.argtypes = [
            ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
        ]  # fmt: skip
        quantize.restype = ctypes.c_size_t
        return found
    raise SystemExit(f"no library of xllamacpp exports ggml_quantize_chunk: {[path.name for path in files]}")


def main() -> None:
    given = exchange.job()
    type_ = gguf.GGMLQuantizationType[given.spec]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    weights = given.weights()
    for name, weight in weights.items():
        if weight.shape[1] % block:
            raise SystemExit(f"{given.spec} has blocks of {block}, and {name} has {weight.shape[1]} columns")
    ggml = library()
    floats = ctypes.POINTER(ctypes.c_float)
    important = importances(given)
    begin = time.perf_counter()
    decoded = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        source = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        by_column = np.ascontiguousarray(important[name].numpy(), dtype=np.float32)
        packed = np.zeros((rows, columns // block * size), dtype=np.uint8)
        written = ggml.ggml_quantize_chunk(
            int(type_), source.ctypes.data_as(floats), packed.ctypes.data, 0, rows, columns,
            by_column.ctypes.data_as(floats),
        )  # fmt: skip
        if written != packed.nbytes:
            raise SystemExit(f"{name}: {written} bytes where {packed.nbytes} were expected")
        decoded[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, type_), dtype=np.float32))
    seconds = time.perf_counter() - begin + float(important[SECONDS])
    exchange.finish(
        given, decoded, "xllamacpp", bits=size * 8 / block, seconds=seconds, notes="one type, importance matrix"
    )


if __name__ == "__main__":
    main()
