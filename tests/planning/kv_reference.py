"""Bytes of a cache from config.json, slow and on its own: what the planner's cache is compared with.

Written before it, from transformers 5.24 (full-size models on the meta device), llama.cpp b11549 (files without data,
its run without allocation) and vLLM's source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

NAMES = {
    "attention": "full", "full_attention": "full", "global_attention": "full", "sliding_attention": "sliding",
    "local_attention": "sliding", "chunked_attention": "chunked", "linear_attention": "linear", "mamba": "linear",
    "recurrent": "linear", "conv": "conv", "moe": "none", "mlp": "none", "hybrid": "hybrid",
    "indexed_attention": "full", "deepseek_sparse_attention": "full",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What a layer keeps: elements of keys, values and index for each token, window, state."""

    kind: str
    k: int = 0
    v: int = 0
    index: int = 0
    window: int | None = None
    conv: int = 0
    taps: int = 0
    state: int = 0


def text(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def kinds(c: dict[str, Any]) -> list[str]:
    n = c.get("num_hidden_layers") or c.get("n_layer") or c.get("num_layers")
    family = c.get("model_type", "")
    if c.get("layer_types"):
        out = [NAMES[t] for t in c["layer_types"]]
    elif c.get("layers_block_type"):
        out = [NAMES[t] for t in c["layers_block_type"]]
    elif c.get("hybrid_override_pattern"):
        out = [{"M": "linear", "*": "full", "-": "none", "E": "none"}[x] for x in c["hybrid_override_pattern"]]
    elif c.get("full_attention_interval"):
        out = ["full" if (i + 1) % c["full_attention_interval"] == 0 else "linear" for i in range(n)]
    elif c.get("linear_attn_config"):
        full = set(c["linear_attn_config"]["full_attn_layers"])
        out = ["full" if i + 1 in full else "linear" for i in range(n)]
    elif c.get("attn_type_list"):
        out = ["full" if t == 1 else "linear" for t in c["attn_type_list"]]
    elif c.get("attn_layer_period"):
        out = ["full" if i % c["attn_layer_period"] == c["attn_layer_offset"] else "linear" for i in range(n)]
    elif family in ("mamba", "mamba2", "falcon_mamba"):
        out = ["linear"] * n
    elif family in ("falcon_h1",):
        out = ["hybrid"] * n
    elif family == "llama4_text":
        rope = c.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(n)]
        out = ["chunked" if r else "full" for r in rope]
    elif family in ("gemma3_text", "gemma3n_text", "cohere2") or c.get("sliding_window_pattern"):
        m = c.get("sliding_window_pattern") or {"cohere2": 4, "gemma3n_text": 5}.get(family, 6)
        out = ["full" if (i + 1) % m == 0 else "sliding" for i in range(n)]
    elif family == "gemma2":
        out = ["sliding" if (i + 1) % 2 else "full" for i in range(n)]
    elif family == "gpt_oss":
        out = ["sliding" if i % 2 == 0 else "full" for i in range(n)]
    elif family.startswith("qwen") and c.get("sliding_window") and c.get("use_sliding_window"):
        out = ["sliding" if i >= c.get("max_window_layers", n) else "full" for i in range(n)]
    elif c.get("sliding_window") and not family.startswith("qwen"):
        out = ["sliding"] * n
    else:
        out = ["full"] * n
    shared = c.get("num_kv_shared_layers") or 0
    return [k if i < n - shared else "none" for i, k in enumerate(out)]


def layers(config: dict[str, Any]) -> list[Kept]:
    c = text(config)
    h = c.get("hidden_size") or c.get("d_model") or c.get("n_embd")
    heads = c.get("num_attention_heads") or c.get("num_heads") or c.get("n_head") or 1
    kv = c.get("num_key_value_heads") or c.get("num_kv_heads") or (1 if c.get("multi_query") else heads)
    hd = c.get("head_dim") or c.get("d_kv") or c.get("kv_channels") or h // heads
    family = c.get("model_type", "")
    if c.get("kv_lora_rank"):
        k, v = c["kv_lora_rank"] + c["qk_rope_head_dim"], 0
    else:
        k, v = kv * hd, kv * (c.get("v_head_dim") or hd)
    full_k, full_v = k, v
    if c.get("global_head_dim"):
        wide = (c.get("num_global_key_value_heads") or kv) * c["global_head_dim"]
        full_k, full_v = wide, 0 if c.get("attention_k_eq_v") else wide
    conv, taps, state = 0, 0, 0
    if "linear_num_value_heads" in c:
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        nk, nv, dk, dv = (c[f"linear_{name}"] for name in names)
        conv, taps, state = 2 * nk * dk + nv * dv, c["linear_conv_kernel_dim"], nv * dk * dv
    elif c.get("linear_attn_config"):
        a = c["linear_attn_config"]
        conv, taps = 3 * a["num_heads"] * a["head_dim"], a["short_conv_kernel_size"]
        state = a["num_heads"] * a["head_dim"] ** 2
    elif c.get("mamba_n_heads") or c.get("mamba_num_heads"):
        d = c.get("mamba_d_head") or c.get("mamba_head_dim")
        ds = c.get("mamba_d_state") or c.get("ssm_state_size")
        inner = (c.get("mamba_n_heads") or c["mamba_num_heads"]) * d if d != "auto" else c["mamba_expand"] * h
        conv = inner + 2 * (c.get("mamba_n_groups") or c.get("n_groups") or 1) * ds
        taps, state = c.get("mamba_d_conv") or c.get("conv_kernel"), inner * ds
    elif c.get("state_size") or c.get("mamba_d_state"):
        inner = c.get("intermediate_size") if family == "mamba" else c.get("mamba_expand", 2) * h
        conv, taps = inner, c.get("conv_kernel") or c.get("mamba_d_conv")
        state = inner * (c.get("state_size") or c["mamba_d_state"])
    elif family.startswith("minimax"):
        state = heads * hd * hd
    index = c.get("index_head_dim") or 0
    made = {
        "full": Kept("full", full_k, full_v, index),
        "sliding": Kept("sliding", k, v, index, c.get("sliding_window")),
        "chunked": Kept("chunked", k, v, index, c.get("attention_chunk_size")),
        "linear": Kept("linear", conv=conv, taps=taps, state=state),
        "hybrid": Kept("hybrid", k, v, conv=conv, taps=taps, state=state),
        "conv": Kept("linear", conv=h, taps=c.get("conv_L_cache", 0)),
        "none": Kept("none"),
    }
    return [made[kind] for kind in kinds(c)]


def nbytes(
    config: dict[str, Any], tokens: int, engine: str, *, sequences: int = 1, kv: float = 2.0, model: float = 2.0,
    step: int = 512, unified: bool = True,
) -> float:  # fmt: skip
    """step: tokens computed together. kv: bytes of an element; model: of the weights' type."""
    total = 0.0
    for layer in layers(config):
        per = (layer.k + layer.v + layer.index) * kv
        if engine == "transformers":
            n = tokens if layer.window is None else min(tokens, layer.window - 1)
            total += sequences * (per * n + layer.conv * layer.taps * model + layer.state * 4)
        elif engine == "llama.cpp":
            n = math.ceil(tokens / 256) * 256
            if layer.kind in ("sliding", "chunked") and text(config).get("model_type") not in ("mistral", "mixtral"):
                assert layer.window is not None
                n = min(n, layer.window * (sequences if unified else 1) + step)
                n = math.ceil(n / 256) * 256
            total += per * n * (1 if unified else sequences)
            total += sequences * 4 * (layer.conv * max(layer.taps - 1, 0) + layer.state)
        else:
            n = math.ceil(tokens / 16) * 16
            if layer.kind == "sliding":
                assert layer.window is not None
                n = min(n, (math.ceil(min(layer.window - 1 + step, tokens) / 16) + 1) * 16)
            elif layer.kind == "chunked":
                assert layer.window is not None
                n = min(n, math.ceil(min(layer.window + step, tokens) / 16) * 16)
            total += sequences * (per * n + layer.conv * max(layer.taps - 1, 0) * model + layer.state * 4)
    return total
