"""GGUF files as checkpoints: what config.json says, rotary embeddings, families, files that make no sense, the door."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ggufs import folder, written
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import spicerack
from spicerack import plugins
from spicerack.errors import CheckpointError
from spicerack.exports.source import Source
from spicerack.exports.target import find
from spicerack.models import overview
from spicerack.models.choices import layers
from spicerack.models.gguf import config as configs
from spicerack.models.gguf import rope
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.models.gguf.family import PACKAGE, of_architecture, of_type
from spicerack.models.gguf.names import Names, Place
from spicerack.models.opening import open_model
from spicerack.runtime.folder import Folder
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import Array, Entry, Metadata, Value
from spicerack.storage.gguf.reader import GgufFile
from spicerack.storage.gguf.writer import GgufWriter

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn, scaled": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
    "llama3": LLAMA3,
    "llama3 of others": LLAMA3 | {"factor": 3.0, "low_freq_factor": 0.5, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "attention_factor": 1.1875, "long_factor": [1.0 + i for i in range(8)],
        "short_factor": [1.0 + i / 8 for i in range(8)],
    },
}  # fmt: skip


def llama(parameters: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=96,
        max_position_embeddings=128, vocab_size=300, rope_parameters=dict(parameters),
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def said(config: LlamaConfig) -> dict[str, Any]:
    """Its config.json."""
    text: dict[str, Any] = json.loads(config.to_json_string())
    return text


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_embeddings_both_ways(name: str) -> None:
    """The same frequencies and scale of scores, as transformers computes them from what came back."""
    family, config = of_type("llama"), llama(SCALINGS[name])
    whole = configs.whole(said(config))
    assert configs.obstacles(family, whole) == []
    back = round_trip("llama", whole)
    again = LlamaConfig.from_dict(back)
    kind = config.rope_parameters["rope_type"]
    for length in (16, 100):
        before = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        after = ROPE_INIT_FUNCTIONS[kind](again, "cpu", seq_len=length)
        assert torch.allclose(before[0], after[0], rtol=1e-6) and before[1] == pytest.approx(after[1], rel=1e-6)


def test_llama3_divides_frequencies_as_transformers_does() -> None:
    """By which llama.cpp divides: plain frequencies over transformers' own."""
    config = llama(LLAMA3)
    factors = rope.to_metadata(of_type("llama"), configs.whole(said(config))).tensors[rope.FREQUENCIES]
    plain = 1 / (500000.0 ** (torch.arange(0, 16, 2).float() / 16))
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    assert np.allclose(factors, (plain / scaled).numpy(), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == 8


def test_factors_of_a_file_that_says_nothing_are_llama_s_or_refused() -> None:
    whole = configs.whole(said(llama(LLAMA3)))
    family = of_type("llama")
    keys = {k: v for k, v in configs.to_metadata(family, whole).items() if k != rope.PARAMETERS}
    factors = rope.to_metadata(family, whole).tensors
    config = configs.to_config(family, Metadata(keys), shapes(), "float32", factors)
    assert config["rope_parameters"] == LLAMA3
    factors[rope.FREQUENCIES][2] += 0.5
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        configs.to_config(family, Metadata(keys), shapes(), "float32", factors)


def shapes() -> dict[str, tuple[int, ...]]:
    return {"token_embd.weight": (300, 64), "output.weight": (300, 64)}


def round_trip(model_type: str, whole: Mapping[str, Any]) -> dict[str, Any]:
    family = of_type(model_type)
    keys = Metadata(configs.to_metadata(family, whole))
    return configs.to_config(family, keys, shapes(), "float32", rope.to_metadata(family, whole).tensors)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification has weights"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "by 'llama3', which llama.cpp does not have for qwen2"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window True"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("gemma2", {"final_logit_softcapping": None}, "not capped"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("falcon", {"alibi": True}, "alibi True"),
        ("falcon", {"multi_query": False}, "keys of its own"),
        ("bert", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family: str, change: dict[str, Any], reason: str) -> None:
    opened = Folder.open(folder(family))
    config = copy.deepcopy(dict(opened.config)) | change
    reasons = configs.obstacles(of_type(family), configs.whole(config))
    assert any(reason in one for one in reasons), reasons
    assert configs.obstacles(of_type(family), configs.whole(opened.config)) == []


def test_a_window_that_llama_cpp_does_not_have_is_told() -> None:
    config = configs.whole(dict(Folder.open(folder("mistral")).config) | {"sliding_window": 16})
    assert "beyond 16 tokens" in configs.notes(of_type("mistral"), config)[0]
    assert round_trip("mistral", config)["sliding_window"] == 16


def test_families_are_found_or_listed() -> None:
    assert of_architecture("llama", ()).model_type == "llama"
    assert of_architecture("llama", ("expert_count",)).model_type == "mixtral"
    assert of_architecture("llama", (), "mistral").model_type == "mistral"
    with pytest.raises(CheckpointError, match="'mamba' are not read"):
        of_architecture("mamba", ())
    with pytest.raises(CheckpointError, match="'t5'"):
        of_type("t5")
    assert len(plugins.names(PACKAGE)) == 23


def test_names_with_and_without_the_prefix_of_a_class() -> None:
    names = Names(of_type("bert"))
    place = Place("blk.3.attn_q.weight")
    assert names.places("encoder.layer.3.attention.self.query.weight") == (place,)
    assert names.places("bert.encoder.layer.3.attention.self.query.weight") == (place,)
    assert names.places("encoder.layer.3.attention.self.other.weight") == ()
    assert names.left_out("cls.predictions.bias") and not names.left_out("encoder.layer.3.output.dense.bias")


# ---- files that make no sense ----------------------------------------------------------------------------------------


def changed(
    tmp_path: Path, keys: Mapping[str, Entry | None], shape: Mapping[str, tuple[int, ...]] | None = None
) -> Path:
    """A llama's file with other keys (None: without), or tensors of another shape."""
    file = GgufFile.open(written(folder("llama"), tmp_path / "whole.gguf"))
    metadata = {k: v for k, v in {**dict(file.metadata.items()), **keys}.items() if v is not None}
    specs = [TensorSpec(t.name, t.type, (shape or {}).get(t.name, t.shape)) for t in file.tensors.values()]
    with GgufWriter(tmp_path / "changed.gguf", metadata, specs) as writer:
        for spec in specs:
            raw = file.read(spec.name)
            same = tuple(raw.shape) == spec.raw_shape
            writer.write(spec.name, raw if same else torch.zeros(spec.raw_shape, dtype=torch.uint8))
    return tmp_path / "changed.gguf"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": Value("string", "mamba")}, "'mamba' are not read"),
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"general.type": Value("string", "adapter")}, "not a model"),
        ({"llama.attention.head_count": Value("u32", 0)}, "lacks or contradicts|heads do not fit"),
        ({"llama.attention.head_count": Value("u32", 7)}, "heads do not fit"),
        ({"llama.attention.head_count": None}, "head_count is missing"),
        ({"llama.attention.head_count": Array.of("u32", [4, 4])}, "not an integer"),
        ({"llama.embedding_length": None}, "embedding_length is missing"),
        ({"llama.block_count": Value("u64", 1 << 40)}, "block_count is"),
        ({"llama.rope.dimension_count": Value("u32", 8)}, "dimension_count is 8"),
        ({"llama.rope.scaling.type": Value("string", "other")}, "scaling.type is 'other'"),
        ({"llama.rope.freq_base": Value("f32", float("inf"))}, "freq_base is inf"),
        ({"llama.rope.scaling.type": Value("string", "longrope")}, "LongRoPE without"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    keys: dict[str, Entry | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(changed(tmp_path, keys))
    assert "changed.gguf" in caught.value.message and caught.value.hint


def test_heads_of_more_columns_than_any_model_has_are_refused(tmp_path: Path) -> None:
    """transformers makes tables of that size, for minutes, before it looks at a weight."""
    source = GgufFile.open(written(folder("stablelm"), tmp_path / "m.gguf"))
    entries = {**source.metadata, "stablelm.rope.dimension_count": Value("u32", 2**31 - 1)}
    specs = [TensorSpec(name, tensor.type, tensor.shape) for name, tensor in source.tensors.items()]
    with GgufWriter(tmp_path / "other.gguf", entries, specs) as writer:
        for spec in specs:
            writer.write(spec.name, source.read(spec.name).reshape(spec.raw_shape))
    with pytest.raises(CheckpointError, match="dimension_count is 2147483647"):
        GgufCheckpoint.open(tmp_path / "other.gguf")


def test_tensors_that_no_model_of_the_family_has_are_refused(tmp_path: Path) -> None:
    file = changed(tmp_path, {}, {"blk.0.attn_q.weight": (63, 64)})
    with pytest.raises(CheckpointError, match="which its heads do not fit"):
        open_model(file)
    specs = [
        TensorSpec("token_embd.weight", TYPES["F32"], (300, 64)),
        TensorSpec("blk.0.other.weight", TYPES["F32"], (4,)),
    ]
    with GgufWriter(tmp_path / "other.gguf", GgufFile.open(file).metadata, specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.zeros(spec.raw_shape, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"blk\.0\.other\.weight is not one of llama's"):
        open_model(tmp_path / "other.gguf")


# ---- the door --------------------------------------------------------------------------------------------------------


def test_a_float_file_is_inspected_quantized_and_loaded(tmp_path: Path) -> None:
    file = written(folder("llama"), tmp_path / "model.gguf")
    report = overview.look(file)
    assert report.quantized is None and report.architecture.model_type == "llama" and report.estimates
    assert report.parameters == overview.look(folder("llama")).parameters
    assert layers(file) == []
    spicerack.quantize(file, "w8g32", output=tmp_path / "out")
    spicerack.quantize(folder("llama"), "w8g32", output=tmp_path / "same")
    ids = torch.tensor([[1, 2, 3]])
    a, b = (spicerack.load(tmp_path / name)(input_ids=ids).logits for name in ("out", "same"))
    assert torch.equal(a, b)


def test_a_quantized_file_is_shown_and_not_quantized_again(tmp_path: Path) -> None:
    spicerack.quantize(folder("gpt2"), "w4g32", output=tmp_path / "q")
    file = written(tmp_path / "q", tmp_path / "model.gguf")
    report = overview.look(file)
    assert report.quantized == "gguf" and "Q4_0" in report.types and not report.estimates
    assert report.parameters == overview.look(folder("gpt2")).parameters
    assert {row.scheme for row in layers(file)} == {"w4g32"}
    with pytest.raises(CheckpointError, match="quantized already, with gguf"):
        spicerack.quantize(file, "w8", output=tmp_path / "again")
    figures = spicerack.evaluate(file, against=folder("gpt2"), text=str(text(tmp_path)), window=16, max_tokens=32)
    assert figures["tokens"] > 0


def text(place: Path) -> Path:
    file = place / "text.txt"
    file.write_text("the cat sat on the mat and the dog ran to the red barn where the hens are. " * 20)
    return file


def test_a_split_model_is_opened_by_its_first_file(tmp_path: Path) -> None:
    spicerack.quantize(folder("mixtral"), "w4g32", output=tmp_path / "q")
    written(tmp_path / "q", tmp_path / "model.gguf", shard_bytes=40_000)
    first = sorted(tmp_path.glob("model-00001-of-*.gguf"))[0]
    whole = written(tmp_path / "q", tmp_path / "whole.gguf")
    ids = torch.tensor([[1, 2, 3]])
    a, b = (spicerack.load(path)(input_ids=ids).logits for path in (first, whole))
    assert torch.equal(a, b)
    checkpoint = open_model(first)
    assert len(checkpoint.shards) > 1 and checkpoint.fingerprint() != open_model(whole).fingerprint()
    assert all(path.is_file() for path in checkpoint.weight_files)


def test_rows_are_read_alone(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint.open(written(folder("llama"), tmp_path / "model.gguf")).held()
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(checkpoint.read_rows(name, 3, 9), checkpoint.read(name)[3:9])
        checkpoint.release(name)
    assert checkpoint.same("model.norm.weight", "model.norm.weight")
    assert not checkpoint.same("model.norm.weight", "model.layers.0.input_layernorm.weight")


def test_what_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    target = find("gguf")
    spicerack.quantize(folder("mixtral"), "w4g32", rules=["**.experts.1.w1=mxfp4"], output=tmp_path / "mixed")
    told = target.refusals("gguf", Source.of(Folder.open(tmp_path / "mixed")))
    assert len(told) == 1 and "one type" in told[0] and "mxfp4, w4g32" in told[0]
    place = tmp_path / "bare"
    place.mkdir()
    for file in folder("llama").iterdir():
        if not file.name.startswith("tokenizer"):
            (place / file.name).write_bytes(file.read_bytes())
    assert "no tokenizer" in target.refusals("gguf", Source.of(Folder.open(place)))[0]


def test_scales_that_float16_does_not_hold_are_told_before(tmp_path: Path) -> None:
    """Of a model in bfloat16, whose scales are as wide as float32's: most fit, and the layer that does not is named."""
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.bfloat16)
    save(model, tmp_path / "fits")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e-9)
    save(model, tmp_path / "small")
    target = find("gguf")
    told = {}
    for name in ("fits", "small"):
        spicerack.quantize(tmp_path / name, "w4g32", output=tmp_path / f"{name}-q")
        told[name] = target.inexact("gguf", Source.of(Folder.open(tmp_path / f"{name}-q")))
    assert told["fits"] == []
    assert len(told["small"]) == 1 and told["small"][0].startswith("model.layers.1.self_attn.q_proj: ")
    file = written(tmp_path / "fits-q", tmp_path / "model.gguf")
    loaded = spicerack.load(file)
    assert loaded.dtype == torch.bfloat16 and open_model(file).tensors["model.embed_tokens.weight"].dtype == "BF16"


def save(model: Any, place: Path) -> None:
    model.save_pretrained(place)
    for file in folder("llama").glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
