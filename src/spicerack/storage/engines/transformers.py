"""transformers: folders of compressed-tensors, bitnet, GPTQ and AWQ, and GGUF files, which it makes floats of."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Limit, Reads

_GPTQMODEL = "gptqmodel>=7.4,<7.7 and optimum"

ENGINE = Engine(
    name="transformers",
    version="5.24.0, compressed-tensors 0.20.0",
    reads=(
        Reads(
            to="compressed-tensors",
            checked="run here",
            rehearsed=True,
            needs="compressed-tensors>=0.18,<0.21",
            remark="weights are decoded at the first forward: memory is then the float model's",
        ),
        Reads(to="bitnet", checked="run here", needs="accelerate"),
        Reads(to="gptq", checked="run here (gptqmodel, its torch kernel)", needs=_GPTQMODEL),
        Reads(to="awq", checked="run here (gptqmodel, its torch kernel)", needs=_GPTQMODEL),
        Reads(
            to="gguf",
            checked="run here",
            needs="gguf",
            families=(
                "falcon", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen2_moe", "qwen3",
                "qwen3_moe", "stablelm", "starcoder2",
            ),
            limits=(
                Limit(
                    source="transformers 5.24: integrations/ggml.py reads by gguf-py, which decodes neither Q1_0 nor "
                    "Q2_0, in which other schemes of two bits lie",
                    bits=(3, 4, 5, 6, 7, 8),
                    schemes=("q2_k", "ternaryg256"),
                ),
            ),
            remark="every weight becomes a float while loading",
        ),
    ),
    usual=("w4g128", "w8", "w8a8"),
)  # fmt: skip
