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

ENGINE = Engine(
    name="mlx",
    version="mlx 0.32.4, mlx-lm 0.32.2",
    reads=(
        # what mx.quantized_matmul takes is what the format holds: mlx 0.32, mlx/ops.cpp, quantized_matmul
        Reads(to="mlx", checked="run here (mlx[cpu] and mlx-lm)", families=_FAMILIES),
    ),
    usual=("w4g64", "w8g64", "w4g32"),
)
