"""llama.cpp, and what has it inside: Ollama, LM Studio. It reads GGUF, each tensor in a type of its own."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Limit, Reads, Tie

_SOURCE = "llama.cpp, as in llama-cpp-python 0.3.36: src/llama-quant.cpp and src/models"

ENGINE = Engine(
    name="llama.cpp",
    version="llama-cpp-python 0.3.36, xllamacpp 2026.10.11549",
    reads=(
        Reads(
            to="gguf",
            checked="run here (wheel xllamacpp)",
            families="models.gguf.families",
            limits=(
                Limit(
                    source=f"{_SOURCE}: ffn_gate_inp, position_embd and token_types are read in F32 alone",
                    roles=frozenset({"linear", "conv1d", "experts", "head", "embedding"}),
                    but=("wpe", "position_embeddings", "token_type_embeddings", "shared_expert_gate"),
                ),
                Limit(
                    source="GGUF has no place for a scale of activations: ggml/docs/gguf.md",
                    activations=("token",),
                ),
            ),
            remark="it rounds what layers are given to 8 bits a block, whatever the scheme says of activations",
        ),
    ),
    ties=(Tie("projections", f"{_SOURCE}: experts are one tensor for each of gate, up and down"),),
    # Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0, all others to Q4_0: src/llama-quant.cpp, tensor_type_fallback
    fallbacks=(
        ("q2_k", "w4g32"), ("q3_k", "w4g32"), ("ternaryg256", "w4g32"), ("q4_k", "w5g32"), ("q5_k", "q5_1"),
        ("q6_k", "w8g32"),
    ),
    usual=("q4_k", "q6_k", "w8g32", "w4g32"),
)  # fmt: skip
