"""OpenVINO: compressed weights with dynamic int8 activations in blocks, and statically quantized int8.

The graphs are those that NNCF writes. float32 is asked for because bfloat16, the default where the CPU has it, was no
faster on quantized layers. Activations are quantized in blocks of 128, or of the weight's group if that is shorter.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset13 as op

from benchmarks.harness.peers.encoder import Encoder, Hidden, example
from benchmarks.harness.peers.layer import F32, Layer, Prepared, decoded, packed, rounded, weight

_BLOCK = 128
_PEAK = 4.5
"""Clipping range of statically quantized standard normal activations."""


def compiled(model: ov.Model, threads: int, block: int = _BLOCK) -> ov.CompiledModel:
    """The model for the CPU, one request at a time on `threads` threads, activations quantized by `block`."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": block,
    }
    return ov.Core().compile_model(model, "CPU", settings)


def layer(variant: str, what: Layer) -> Prepared:
    """variant: float32, static, or <bits>g<group> with group 0 for one scale a row."""
    x = op.parameter([what.m, what.k], np.float32)
    kept: list[Any] = []  # constants of 4 bits borrow their memory
    outputs = [_product(variant, what, x, i, kept) for i in range(what.copies)]
    group = _split(variant, what.k)[1]
    request = compiled(ov.Model(outputs, [x]), what.threads, min(group, _BLOCK)).create_infer_request()
    request.set_input_tensor(ov.Tensor(what.x))

    def call() -> object:
        return request.infer(share_outputs=True)

    exact, nbytes = _facts(variant, what.n, what.k)
    return what.prepared(call, lambda: np.array(request.get_output_tensor(0).data), exact, nbytes)


def _split(variant: str, k: int) -> tuple[int, int]:
    if variant in ("float32", "static"):
        return 8, k
    bits, _, group = variant.partition("g")
    return int(bits), int(group) or k


def _product(variant: str, what: Layer, x: ov.Node, i: int, kept: list[Any]) -> ov.Node:
    n, k = what.n, what.k
    if variant == "float32":
        return op.matmul(x, op.constant(np.roll(weight(n, k), i, 0)), False, True)
    bits, group = _split(variant, k)
    codes, scale = rounded(n, k, bits, group)
    codes, scale = np.roll(codes, i, 0), np.roll(scale, i, 0)
    if variant == "static":
        return op.matmul(_fake(x, np.float32(_PEAK), 256), _fake(decoded(codes, scale), scale * 127, 255), False, True)
    if group == k:
        integers, scales = op.constant(codes), op.constant(scale.astype(np.float16))
        return op.matmul(x, op.convert(op.multiply(op.convert(integers, "f16"), scales), "f32"), False, True)
    kept.append(packed(codes, bits))
    shape = [n, k // group, group]
    integers = op.constant(ov.Tensor(kept[-1], shape, ov.Type.i4 if bits == 4 else ov.Type.i8))
    floats = op.multiply(op.convert(integers, "f16"), op.constant(scale.astype(np.float16)[..., None]))
    return op.matmul(x, op.convert(op.reshape(floats, op.constant(np.array([n, k])), False), "f32"), False, True)


def _fake(x: Any, peak: Any, levels: int) -> ov.Node:
    low, high = op.constant(-peak), op.constant(peak)
    return op.fake_quantize(x if isinstance(x, ov.Node) else op.constant(x), low, high, low, high, levels)


def _facts(variant: str, n: int, k: int) -> tuple[F32, float]:
    """The weight as rounded, and its bytes."""
    if variant == "float32":
        return weight(n, k), 4 * n * k
    bits, group = _split(variant, k)
    return decoded(*rounded(n, k, bits, group)), n * k * bits / 8 + (4 if variant == "static" else 2) * n * k / group


def encoder(variant: str, what: Encoder) -> Prepared:
    """variant: float32, static (int8, ranges of activations calibrated on the built-in sentences), or, for int8
    weights and ranges found on the fly, the length of the blocks that share one."""
    with torch.no_grad():
        model = ov.convert_model(Hidden(what.folder).eval(), example_input=example())
    if variant != "float32":
        import nncf

        nncf.set_log_level(logging.ERROR)
        if variant != "static":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            sentences = nncf.Dataset(list(what.sentences()))
            model = nncf.quantize(model, sentences, model_type=nncf.ModelType.TRANSFORMER)
    block = int(variant) if variant.isdigit() else _BLOCK
    request = compiled(model, what.threads, block).create_infer_request()

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(request.infer([ids, mask], share_inputs=True)[0])

    return what.prepared(run)
