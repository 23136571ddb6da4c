"""onnxruntime: its genai builder makes a graph of GPTQ and AWQ folders; graphs themselves are not written here yet."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Limit, Reads

_BUILDER = "onnxruntime-genai 0.18.0: onnxruntime_genai/models/builder.py and quantized_model.py"
_FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "qwen2",
    "qwen3", "smollm3",
)  # fmt: skip
_DECODERS = Limit(source=_BUILDER, roles=frozenset({"linear"}), bits=(4,), groups=(16, 32, 64, 128))
_HEAD = "the builder rounds a float head to 4 bits unless --extra_options says nodes_to_exclude=/lm_head/MatMul"

ENGINE = Engine(
    name="onnxruntime",
    version="1.32.0, genai 0.18.0",
    reads=(
        Reads(
            to="onnx",
            checked="MatMulNBits was run on codes of ours, by hand",
            written=False,
            limits=(
                Limit(
                    source="onnxruntime 1.32: com.microsoft.MatMulNBits and GatherBlockQuantized, "
                    "docs/ContribOperators.md",
                    roles=frozenset({"linear", "conv1d", "head", "embedding"}),
                    integers=True,
                    bits=(2, 4, 8),
                    groups=(16, 32, 64, 128, 256),
                    activations=(),
                ),
            ),
        ),
        Reads(
            to="gptq", checked="its unpacking was run here", families=_FAMILIES, limits=(_DECODERS,), remark=_HEAD,
            needs="onnxruntime-genai",
        ),
        Reads(
            to="awq", checked="its unpacking was run here", families=_FAMILIES, limits=(_DECODERS,), remark=_HEAD,
            needs="onnxruntime-genai",
        ),
    ),
    usual=("w4g32", "w4g128", "w8g128"),
)  # fmt: skip
