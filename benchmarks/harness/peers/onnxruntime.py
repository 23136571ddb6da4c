"""onnxruntime: float32, DynamicQuantizeMatMul (uint8 activations found on the fly) and MatMulNBits.

All copies of a layer are nodes of one session: the spinning thread pools of several sessions fight.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.harness.peers.encoder import Encoder, export
from benchmarks.harness.peers.layer import F32, Layer, Prepared, decoded, packed, rounded, weight

ACCURACY = 4
"""MatMulNBits' accuracy_level: 4 is int8 activations, in blocks as long as the weight's."""
_IR, _OPSET, _CONTRIB = 10, 21, "com.microsoft"


def session(model: ModelProto | str, threads: int) -> ort.InferenceSession:
    """A session on the CPU with one pool of `threads` threads, from a model or its file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def layer(variant: str, what: Layer) -> Prepared:
    """variant: float32, dynamic, or <bits>g<group> for MatMulNBits with symmetric weights."""
    n, k = what.n, what.k
    nodes, constants = [], []
    for i in range(what.copies):
        op, tensors, attributes = _node(variant, n, k, i)
        names = [f"{name}{i}" for name in tensors]
        constants += [numpy_helper.from_array(t, name) for t, name in zip(tensors.values(), names, strict=True)]
        domain = "" if op == "MatMul" else _CONTRIB
        nodes.append(helper.make_node(op, ["x", *names], [f"y{i}"], domain=domain, **attributes))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [what.m, k])]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [what.m, n]) for i in range(what.copies)]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
    runner = session(helper.make_model(graph, opset_imports=opsets, ir_version=_IR), what.threads)
    binding = runner.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(what.x))
    y = [ort.OrtValue.ortvalue_from_numpy(np.empty((what.m, n), np.float32)) for _ in outputs]
    for i, value in enumerate(y):
        binding.bind_ortvalue_output(f"y{i}", value)
    exact, nbytes = _facts(variant, n, k)
    return what.prepared(lambda: runner.run_with_iobinding(binding), lambda: y[0].numpy(), exact, nbytes)


def _split(variant: str) -> tuple[int, int]:
    bits, _, group = variant.partition("g")
    return int(bits), int(group)


def _node(variant: str, n: int, k: int, i: int) -> tuple[str, dict[str, NDArray[np.generic]], dict[str, int]]:
    """Operator, constants and attributes of copy i."""
    if variant == "float32":
        return "MatMul", {"w": np.ascontiguousarray(np.roll(weight(n, k), i, 0).T)}, {}
    bits, group = (8, k) if variant == "dynamic" else _split(variant)
    codes, scale = rounded(n, k, bits, group)
    codes, scale = np.roll(codes, i, 0), np.roll(scale, i, 0)
    if variant == "dynamic":
        return "DynamicQuantizeMatMul", {"w": np.ascontiguousarray(codes.T), "s": scale[:, 0]}, {}
    words = packed(codes, bits, 2 ** (bits - 1)).reshape(n, k // group, group * bits // 8)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": ACCURACY}
    return "MatMulNBits", {"w": words, "s": scale}, attributes


def _facts(variant: str, n: int, k: int) -> tuple[F32, float]:
    """The weight as rounded, and its bytes."""
    if variant == "float32":
        return weight(n, k), 4 * n * k
    bits, group = (8, k) if variant == "dynamic" else _split(variant)
    return decoded(*rounded(n, k, bits, group)), n * k * bits / 8 + 4 * n * k / group


def encoder(variant: str, what: Encoder) -> Prepared:
    """variant: float32 or dynamic (int8 weights per channel, uint8 activations found on the fly)."""
    path, whole = what.scratch / f"{variant}.onnx", what.scratch / "float32.onnx"
    if not whole.is_file():
        export(what.folder, whole)
    if not path.is_file():
        quantize_dynamic(whole, path, per_channel=True, weight_type=QuantType.QInt8)
    runner = session(str(path), what.threads)
    return what.prepared(lambda ids, mask: torch.from_numpy(runner.run(None, {"ids": ids, "mask": mask})[0]))
