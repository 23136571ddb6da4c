"""MLX on Macs, and on Linux, by mlx-lm: folders with a section `quantization`, each layer in a mode of its own."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Reads

_FAMILIES = (
    "Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_moe", "bitnet", "cohere", "cohere2", "dbrx",
    "deepseek", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "falcon_h1",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "glm", "glm4",
    "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid",
    "helium", "hunyuan_v1_dense", "internlm2", "internlm3", "jamba", "lfm2", "lfm2_moe", "llama", "llama4",
    "llama4_text", "mamba", "mamba2", "mimo", "minicpm", "minicpm3", "minimax", "minimax_m2", "ministral3", "mistral",
    "mistral3", "mixtral", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "openelm", "phi",
    "phi3", "phimoe", "plamo", "plamo2", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "recurrent_gemma", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2",
)  # fmt: skip
"""mlx-lm 0.32.2: mlx_lm/models has a file for each, or MODEL_REMAPPING of mlx_lm/utils.py names one."""

_LOADED = frozenset({
    "cohere", "cohere2", "dbrx", "ernie4_5", "ernie4_5_moe", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "jamba", "llama", "mamba",
    "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "stablelm", "starcoder2",
})  # fmt: skip
"""Of which mlx-lm 0.32.2 has loaded a tiny model as it is written here (tests/exports/test_mlx_families.py). Tiny
models of most others lack entries of config.json that transformers 5 does not write, and releases have."""
_REFUSED = (
    ("gpt_oss", "mlx-lm loads gpt-oss with its experts in MXFP4, as it is released, and so the release as it is"),
    ("bitnet", "mlx-lm multiplies layers of bitnet by code of its own, which reads no other numbers"),
    ("olmo", "mlx-lm runs OLMo by the package ai2-olmo alone, whose models have other names"),
)  # fmt: skip
"""Which mlx-lm 0.32.2 does not load (mlx_lm/models: gpt_oss.py, bitnet.py, olmo.py)."""

ENGINE = Engine(
    name="mlx",
    version="mlx 0.32.4, mlx-lm 0.32.2",
    reads=(
        # what mx.quantized_matmul takes is what the format holds: mlx 0.32, mlx/ops.cpp, quantized_matmul
        Reads(to="mlx", checked="run here (mlx[cpu] and mlx-lm)", families=_FAMILIES, loaded=_LOADED, refused=_REFUSED),
    ),
    usual=("w4g64", "w8g64", "w4g32"),
)
