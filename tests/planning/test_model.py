"""What is told of a model from config.json alone: parameters to the digit, caches, buffers, sizes of files."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import folders
import kv_reference
import pytest

from spicerack.errors import CheckpointError
from spicerack.numerics.scheme import parse
from spicerack.planning import buffers, cache, gguf, precisions
from spicerack.planning.anatomy.fields import text_of
from spicerack.planning.model import Model, of_config, open_model
from spicerack.planning.precisions import weighed
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import Recipe

CONFIGS = Path(__file__).with_name("configs")
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
FACTS = "_facts"  # beside the config, from full-size models that transformers 5.24 made on the meta device


def config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def model(name: str) -> Model:
    return of_config(config(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_to_the_digit(name: str) -> None:
    facts, told = config(name)[FACTS], model(name)
    # a bias of routers that is in DeepSeek's files is a buffer, and no parameter, to transformers
    buffered = sum(weight.numel for weight in told.weights if weight.entry.name.endswith("e_score_correction_bias"))
    assert told.parameters - buffered == facts["parameters"]
    assert told.read - buffered == facts["read_per_decoded_token"]
    assert told.active - buffered == facts["active_including_embedding"]
    assert told.tied == facts["tied"]
    assert sum(w.numel for w in told.weights if w.routed) == facts["routed_expert_parameters"]
    assert sum(w.numel for w in told.weights if w.place == "tower") == facts["vision_parameters"]
    assert sum(w.numel for w in told.weights if w.place == "encoder") == facts["encoder_parameters"]


@pytest.mark.parametrize("name", [name for name in NAMES if "cache_bytes_8192" in config(name)[FACTS]])
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_caches_are_those_of_the_engines(name: str, tokens: int) -> None:
    facts = config(name)[FACTS][f"cache_bytes_{tokens}"]
    told = model(name)
    kept = {
        "transformers": (cache.Room(tokens), "transformers"),
        "llama.cpp_1": (cache.Room(tokens), "llama.cpp"),
        "vllm": (cache.Room(tokens, batch=2048), "vllm"),
    }
    for key, (room, rule) in kept.items():
        assert sum(cache.nbytes(layer, room, rule, told.family) for layer in told.layers) == facts[key]


def strange() -> list[dict[str, Any]]:
    """Configs of families that no public file at hand has: each with a kind of layer of its own."""
    plain = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2}
    return [
        {**plain, "model_type": "gemma3n_text", "sliding_window": 512, "num_kv_shared_layers": 4},
        {**plain, "model_type": "cohere2", "sliding_window": 4096},
        {**plain, "model_type": "gemma4_text", "sliding_window": 512, "head_dim": 64, "global_head_dim": 128,
         "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 6},
        {**plain, "model_type": "kimi_linear", "kv_lora_rank": 64, "qk_rope_head_dim": 16,
         "linear_attn_config": {"full_attn_layers": [4, 8, 12], "num_heads": 8, "head_dim": 32,
                                "short_conv_kernel_size": 4}},
        {**plain, "model_type": "bamba", "layers_block_type": ["mamba", "attention"] * 6, "mamba_n_heads": 16,
         "mamba_d_head": 64, "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_n_groups": 2, "mamba_expand": 2},
        {**plain, "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*E-M*-M*-", "mamba_num_heads": 16,
         "mamba_head_dim": 64, "ssm_state_size": 128, "conv_kernel": 4, "n_groups": 8},
        {**plain, "model_type": "falcon_h1", "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 64,
         "mamba_d_conv": 4},
        {**plain, "model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 16,
         "mamba_d_conv": 4, "mamba_expand": 2},
        {**plain, "model_type": "lfm2", "conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 6},
        {**plain, "model_type": "minimax", "attn_type_list": [0, 0, 0, 1] * 3},
        {**plain, "model_type": "glm_moe_dsa", "kv_lora_rank": 64, "qk_rope_head_dim": 16, "index_head_dim": 32},
        {**plain, "model_type": "mimo_v2", "head_dim": 192, "v_head_dim": 128},
        {**plain, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 8},
        {**plain, "model_type": "falcon", "num_key_value_heads": None, "multi_query": True},
    ]  # fmt: skip


@pytest.mark.parametrize("own", strange(), ids=lambda own: own["model_type"])
def test_caches_of_other_families_are_the_slow_reference_s(own: dict[str, Any]) -> None:
    draw = random.Random(0)
    for _ in range(20):
        tokens, users = draw.randrange(1, 100_000), draw.randrange(1, 9)
        for rule in ("transformers", "llama.cpp", "vllm"):
            element = draw.choice((2.0, 34 / 32, 18 / 32))
            room = cache.Room(tokens, users, element, 4.0, 512)
            told = sum(cache.nbytes(layer, room, rule, own["model_type"]) for layer in cache.layers(own))  # type: ignore
            slow = kv_reference.nbytes(own, tokens, rule, sequences=users, kv=element, model=4.0, unified=False)
            assert told == pytest.approx(slow, rel=1e-12)


def test_a_type_of_layer_that_nobody_knows_is_refused() -> None:
    own = {**config("Llama-3.1-8B"), "layer_types": ["full_attention"] * 31 + ["telepathy"]}
    with pytest.raises(CheckpointError, match="telepathy"):
        cache.layers(own)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_field_that_is_missing_is_named(field: str) -> None:
    own = config("Llama-3.1-8B")
    del own[field]
    with pytest.raises(CheckpointError, match=field):
        of_config(own)
    with pytest.raises(CheckpointError, match=field):
        of_config({**own, field: 0})


def test_a_family_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(CheckpointError, match="'rwkv7'") as refused:
        of_config({**config("Llama-3.1-8B"), "model_type": "rwkv7"})
    assert "llama" in refused.value.hint and "folder" in refused.value.hint


# ---- what engines make of them --------------------------------------------------------------------------------------

LLAMA_CPP = [  # MiB that llama.cpp b11549 reports without allocating: model, context, ubatch, outputs, sequences
    ("Llama-3.1-8B", 8192, 512, None, 298.52), ("Llama-3.1-8B", 32768, 512, None, 330.52),
    ("Llama-3.1-8B", 8192, 2048, None, 1194.08), ("Llama-3.1-70B", 8192, 512, None, 338.52),
    ("Llama-3.1-70B", 32768, 512, None, 378.52), ("Qwen3-8B", 8192, 512, None, 352.77),
    ("Qwen3-8B", 32768, 512, None, 376.77), ("Qwen3-30B-A3B", 8192, 512, None, 324.77),
    ("gpt-oss-20b", 8192, 512, None, 429.65), ("gpt-oss-20b", 8192, 2048, None, 1724.61),
    ("Gemma-3-27b", 8192, 512, None, 574.15), ("Gemma-3-27b", 32768, 512, None, 608.65),
    ("Gemma-2-27b", 8192, 512, None, 557.53), ("DeepSeek-V3", 8192, 512, None, 414.02),
    ("DeepSeek-V3", 32768, 512, None, 438.02), ("Phi-4", 8192, 512, None, 254.02),
    ("Mixtral-8x7B", 8192, 512, None, 216.02), ("Qwen3-Next-80B-A3B", 8192, 512, None, 324.77),
    ("Qwen3.5-27B", 8192, 512, None, 543.03), ("Qwen3.5-27B", 32768, 512, None, 577.03),
    ("Qwen3.5-35B-A3B", 8192, 512, None, 513.03), ("Llama-3.1-8B", 8192, 512, 4, 132.02),
    ("Llama-3.1-8B", 8192, 2048, 4, 528.07), ("Llama-3.1-70B", 8192, 512, 4, 256.02),
    ("Qwen3-8B", 8192, 512, 4, 120.02), ("Qwen3-30B-A3B", 8192, 512, 4, 96.02),
    ("DeepSeek-V3", 8192, 512, 4, 414.01),
    ("Phi-4", 8192, 512, 4, 163.02), ("Mixtral-8x7B", 8192, 512, 4, 216.02),
    ("Qwen3.5-27B", 8192, 512, 4, 160.02), ("Qwen3.5-35B-A3B", 8192, 512, 4, 84.02),
    ("Qwen3-Next-80B-A3B", 8192, 512, 4, 98.02),
]  # fmt: skip


@pytest.mark.parametrize(("name", "context", "batch", "outputs", "measured"), LLAMA_CPP)
def test_llama_cpp_s_compute_buffer(name: str, context: int, batch: int, outputs: int | None, measured: float) -> None:
    """Never less than it takes, and at most a row of hidden channels more."""
    told = model(name)
    said = buffers.llama_cpp(told, context, batch=batch, outputs=outputs) / (1 << 20)
    row = 4 * batch * told.fields.hidden / (1 << 20)
    assert measured - 0.12 <= said <= measured + row + 0.12


@pytest.mark.parametrize(
    ("name", "one", "every"),
    [("Llama-3.1-8B", 233, 517), ("Qwen3-8B", 209, 609.5), ("Gemma-3-27b", 338, 1045), ("Phi-4", 361, 412)],
)
def test_activations_of_a_forward(name: str, one: float, every: float) -> None:
    """MiB of live tensors of full-size models in bfloat16 at 2,048 tokens, measured on the meta device."""
    told = model(name)
    row = 2 * 2048 * told.fields.hidden / (1 << 20)
    assert buffers.forward(told, 2048, 2) / (1 << 20) == pytest.approx(one, abs=0.12 * row)
    assert buffers.forward(told, 2048, 2, all_logits=True) / (1 << 20) == pytest.approx(every, abs=0.5 * row)


FILES = [  # bytes of files that others published; a header with the vocabulary of Llama 3 is 7.84 MB of each
    ("Llama-3.1-8B", "Q8_0", 8_540_775_424), ("Llama-3.1-8B", "Q6_K", 6_596_011_008),
    ("Llama-3.1-8B", "Q5_K_M", 5_732_992_000), ("Llama-3.1-8B", "Q4_K_M", 4_920_739_232),
    ("Llama-3.1-8B", "Q3_K_M", 4_018_922_496), ("Llama-3.1-8B", "Q2_K", 3_179_136_000),
    ("Llama-3.1-70B", "Q4_K_M", 42_520_398_400),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mixture", "published"), FILES)
def test_files_of_llama_cpp_s_mixtures(name: str, mixture: str, published: int) -> None:
    told = weighed(model(name), precisions.mixture(mixture)).file
    assert 7_840_000 < published - told < 7_870_000


def test_blocks_of_gguf_are_those_of_its_own_library() -> None:
    constants = pytest.importorskip("gguf.constants")
    for name, (weights, nbytes) in gguf.BLOCKS.items():
        assert constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[name]] == (weights, nbytes)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w3g64", "ternary", "nf4", "w2g32h", "w8a8"])
def test_what_is_planned_is_what_is_written(scheme: str, tmp_path: Path) -> None:
    """To the byte, from headers, and from config.json alone."""
    small = {**folders.LLAMA_70B, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 704,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip
    folder = folders.folder(tmp_path / "m", folders.llama_shapes(small), small)
    written = prepare(folder, Recipe(parse(scheme))).sizes().bytes_after
    assert weighed(open_model(folder), precisions.ours(scheme)).file == written
    assert weighed(of_config(small), precisions.ours(scheme)).file == written


def test_experts_one_by_one_are_counted_together(tmp_path: Path) -> None:
    own = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 32,
           "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 100, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    bare = of_config(own)
    shapes = {}
    for weight in bare.weights:
        for i in range(weight.count):
            shapes[weight.entry.name.replace("experts.0.", f"experts.{i}.")] = weight.entry.info.shape
    folder = folders.folder(tmp_path / "m", shapes, {k: v for k, v in own.items() if k != FACTS})
    read = open_model(folder)
    assert (read.parameters, read.read, read.experts, read.chosen) == (bare.parameters, bare.read, 8, 2)
    assert len(read.weights) == len(bare.weights)
    for name in ("w4g32z", "w8"):
        assert weighed(read, precisions.ours(name)) == weighed(bare, precisions.ours(name))
        assert weighed(read, precisions.ours(name)).file == prepare(folder, Recipe(parse(name))).sizes().bytes_after


def test_a_70b_is_planned_in_a_second_and_without_torch(tmp_path: Path) -> None:
    folder = folders.folder(tmp_path / "m", folders.llama_shapes(folders.LLAMA_70B), folders.LLAMA_70B, shards=30)
    code = f"""
import sys, time
begin = time.process_time()
from spicerack.cli import _output, cli
assert _output.run(cli, ["plan", {str(folder)!r}, "--fit", "2x3090"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(time.process_time() - begin)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout.split()[-1]) < 1.0 and "Q4_K_M" in out.stdout


def test_text_configs_are_found() -> None:
    assert text_of(config("Gemma-3-27b"))["model_type"] == "gemma3_text"
    assert math.isfinite(model("Gemma-3-27b").read)
