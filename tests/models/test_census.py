"""The census against transformers: for some fifty families, every matrix must be what the model's own module says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import families
import folders
import pytest
import tiny
import torch
from dense import decoded_model, logits
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.models import architecture as architectures
from spicerack.models import census
from spicerack.models.architecture import modules_of, transposed_stacks
from spicerack.models.census import Census
from spicerack.models.config import architecture
from spicerack.quantization.decisions import Source
from spicerack.storage.reader import Checkpoint

CLASSES = {"linear": "Linear", "head": "Linear", "conv1d": "Conv1D", "embedding": "Embedding"}
SEEN_ONLY_BY_MODULES = {"TopKRouter", "Router"}


def of(folder: Path) -> Census:
    return census.take(Checkpoint.open(folder))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_agrees_with_the_model(family: str, tmp_path: Path) -> None:
    """Linear, Embedding, Conv1D and experts, no more and no fewer, among all tensors of two and more axes."""
    families.build(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    modules = modules_of(checkpoint.config, checkpoint.tensors)
    assert modules is not None
    replaceable = {"Linear", "Embedding", "Conv1D", "experts"}
    for entry in census.take(checkpoint).entries.values():
        if len(entry.info.shape) < 2:
            assert entry.role not in ("linear", "conv1d", "embedding", "head", "experts", "router")
            continue
        kind = modules.get(entry.module, "")
        where = f"{entry.name} {list(entry.info.shape)}: census {entry.role}, model {kind}"
        if entry.role == "router":
            assert kind == "Linear" or "Router" in kind or "Gate" in kind, where
        elif entry.role == "embedding":
            assert kind.endswith("Embedding"), where  # BartScaledWordEmbedding and its like look up rows, too
        elif entry.role == "linear":
            assert kind in ("Linear", "experts"), where  # one expert's matrix, which transformers fuses on loading
        elif entry.role in CLASSES:
            assert kind == CLASSES[entry.role], where
        elif entry.role == "experts":
            assert "expert" in kind.lower(), where  # DbrxExpertGLU: by a code that needs them whole
        else:
            assert kind not in replaceable, where


@pytest.mark.parametrize("family", families.FAMILIES)
def test_ties_agree_with_the_model(family: str, tmp_path: Path) -> None:
    """A tied head is found although it is not in the file; every parameter of the model is counted once."""
    model = families.build(family)
    model.save_pretrained(tmp_path)
    census = of(tmp_path)
    heads = [name for name, owner in census.tied.items() if owner not in ("", name)]
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings() if head is not None else None
    if head is None or family in ("clip", "siglip"):
        assert not heads
    else:
        assert bool(heads) == (head.weight is inputs.weight)
        folder = Checkpoint.open(tmp_path)
        assert set(heads) <= {f"{m}.weight" for m in modules_of(folder.config, folder.tensors) or {}} | OLD_NAMES
    stored = sum(t.numel() for path in tmp_path.glob("*.safetensors") for t in load_file(path).values())
    assert census.parameters == stored


OLD_NAMES = {"language_model.lm_head.weight"}  # checkpoints of multimodal models use the names of transformers 4


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    families.build("gpt2").save_pretrained(tmp_path)
    entry = of(tmp_path).entries["transformer.h.0.attn.c_attn.weight"]
    assert entry.role == "conv1d" and entry.info.shape == (32, 96) and entry.matrix_shape == (96, 32)


@pytest.mark.parametrize(
    ("family", "transposed"), [("gpt_oss", True), ("llama4", True), ("granitemoe", False), ("jetmoe", False)]
)
def test_expert_orientation(family: str, transposed: bool, tmp_path: Path) -> None:
    """[experts, out, in] or [experts, in, out]: what writes the hidden size has it as its output axis."""
    families.build(family).save_pretrained(tmp_path)
    experts = [e for e in of(tmp_path).entries.values() if e.role == "experts"]
    assert experts and all(e.transposed is transposed for e in experts)
    for entry in experts:
        writes_hidden = "down_proj" in entry.name or "output" in entry.name
        assert entry.matrix_shape[1 if writes_hidden else 2] == 32, entry.name


@pytest.mark.parametrize(("model_type", "transposed"), [("gpt_oss", True), ("qwen3_5_moe", False), ("mystery", False)])
def test_square_experts_go_by_family(model_type: str, transposed: bool, tmp_path: Path) -> None:
    config = {"model_type": model_type, "hidden_size": 32}
    folder = folders.folder(tmp_path / "m", {"model.layers.0.mlp.experts.down_proj": (4, 32, 32)}, config)
    entry = next(iter(of(folder).entries.values()))
    assert entry.role == "experts" and entry.transposed is transposed


ODD: list[tuple[str, tuple[int, ...], str]] = [
    ("model.layers.0.novel.weight", (99, 32), "other"),  # as many rows as the vocabulary, and a name nobody knows
    ("model.layers.0.novel.weight", (32, 99), "other"),
    ("model.layers.0.novel.weight", (48, 32), "linear"),
    ("model.layers.0.mlp.up_proj.weight", (99, 32), "linear"),  # beyond doubt, whatever its shape
    ("mtp.layers.0.mlp.up_proj.weight", (48, 32), "linear"),
    ("mtp.layers.0.novel.weight", (48, 32), "other"),
    ("mtp_head.weight", (99, 32), "other"),
    ("model.layers.0.mixer.A_log", (48, 8), "other"),
    ("model.layers.0.self_attn.q_proj.lora_table", (48, 32), "other"),
    ("model.layers.0.mlp.gate.weight", (4, 32), "router"),
    ("model.layers.0.mlp.gate.weight", (48, 32), "linear"),  # not one row per expert
    ("model.layers.0.mlp.experts.3.w1.weight", (48, 32), "linear"),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 96), "bias"),
    ("model.layers.0.mlp.experts.gate_up_proj_blocks", (4, 96, 2, 16), "other"),
    ("model.layers.0.attn.conv.weight", (32, 1, 4), "conv"),
    ("model.layers.0.self_attn.q_proj.weight_packed", (48, 8), "other"),
    ("model.layers.0.input_layernorm.weight", (32,), "norm"),
    ("h.0.ln_1.weight", (32,), "norm"),
    ("model.layers.0.mixer.D", (32,), "other"),
    ("embeddings.position_ids", (1, 64), "other"),
    ("weight", (48, 32), "other"),
    ("weight", (), "other"),
    ("", (3, 3), "other"),
    ("...", (3, 3), "other"),
]


@pytest.mark.parametrize(("name", "shape", "role"), ODD)
def test_odd_tensors(name: str, shape: tuple[int, ...], role: str, tmp_path: Path) -> None:
    config = {"model_type": "mystery", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 99, "num_experts": 4}
    entry = of(folders.folder(tmp_path / "m", {name: shape}, config)).entries[name]
    assert entry.role == role


def test_duplicated_head(tmp_path: Path) -> None:
    """Both in the file and declared tied: one of them is the alias, and parameters count once."""
    shapes = {"model.embed_tokens.weight": (99, 32), "lm_head.weight": (99, 32)}
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": 99, "tie_word_embeddings": True}
    census = of(folders.folder(tmp_path / "a", shapes, config))
    assert census.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (census.parameters, census.nbytes) == (99 * 32, 99 * 32 * 2)
    for i, tie in enumerate(({"tie_word_embeddings": False}, {})):  # Llama does not tie unless it says so
        untied = {k: v for k, v in config.items() if k != "tie_word_embeddings"} | tie
        assert of(folders.folder(tmp_path / f"b{i}", shapes, untied)).tied == {}
    gpt2 = {"transformer.wte.weight": (99, 32), "lm_head.weight": (99, 32)}
    assert of(folders.folder(tmp_path / "c", gpt2, {"model_type": "gpt2", "vocab_size": 99})).tied
    says_no = {"model_type": "gpt2", "vocab_size": 99, "tie_word_embeddings": False}
    assert not of(folders.folder(tmp_path / "d", gpt2, says_no)).tied


def test_shared_inputs(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path / "llama")
    first = "model.layers.0"
    assert [g for g in of(tmp_path / "llama").shared_inputs if g[0].startswith(first)] == [
        (f"{first}.mlp.gate_proj", f"{first}.mlp.up_proj"),
        tuple(f"{first}.self_attn.{x}_proj" for x in "qkv"),
    ]
    families.build("whisper").save_pretrained(tmp_path / "whisper")
    cross = [g for g in of(tmp_path / "whisper").shared_inputs if "encoder_attn" in g[0]]
    assert cross[0] == tuple(f"model.decoder.layers.0.encoder_attn.{x}_proj" for x in "kv")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"self_attn.q_proj", "mlp.down_proj", "embed_tokens", "lm_head", "input_layernorm", "norm"}),
        ("bert", {"attention.self.query", "embeddings.word_embeddings", "pooler.dense"}),
        ("t5", {"encoder.layer.SelfAttention.q", "decoder.layer.EncDecAttention.v", "shared"}),
        ("mixtral", {"block_sparse_moe.experts.w1", "block_sparse_moe.gate"}),
        ("gemma3", {"language_model.mlp.up_proj", "vision_tower.encoder.mlp.fc1", "attention.in_proj_weight"}),
    ],
)
def test_layer_types_read_well(family: str, expected: set[str], tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    types = {entry.layer_type for entry in of(tmp_path).entries.values()}
    assert expected <= types, sorted(types)
    assert not any(part.isdigit() for kind in types for part in kind.split("."))


def test_architecture_facts(tmp_path: Path) -> None:
    families.build("gemma3").save_pretrained(tmp_path)
    facts = of(tmp_path).architecture
    assert (facts.model_type, facts.classes) == ("gemma3", ("Gemma3ForConditionalGeneration",))
    assert (facts.layers, facts.hidden, facts.heads, facts.vocabulary, facts.dtype) == (2, 32, 4, 99, "float32")
    assert architecture({"model_type": 3, "num_hidden_layers": "many", "architectures": "X"}).layers is None


@pytest.mark.parametrize("old", [True, False], ids=["fused-on-loading", "as-saved"])
def test_modules_follow_renaming(old: bool, tmp_path: Path) -> None:
    """A BertModel folder without prefix loads into a class with one, and the other way round."""
    families.build("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if old:
        config["architectures"] = ["BertForMaskedLM"]
    modules = modules_of(config, Checkpoint.open(tmp_path).tensors)
    assert modules is not None and modules["encoder.layer.0.attention.self.query"] == "Linear"
    assert modules["embeddings.word_embeddings"] == "Embedding"


def test_modules_of_strangers(tmp_path: Path) -> None:
    """Unknown types, remote code, impossible and enormous configs: no opinion, and nothing is run."""
    folder = folders.folder(tmp_path / "m", {"weight": (4, 4)}, {})
    (folder / "modeling_own.py").write_text("raise SystemExit('a stranger ran')")
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "architectures": ["Own"]}
    for config in (
        {},
        {"model_type": "mystery", **remote},
        {"model_type": "llama", **remote},
        {"model_type": "llama", "architectures": ["Trainer"]},
        {"model_type": "llama", "architectures": ["__doc__"]},
        {"model_type": "llama", "architectures": [7]},
        {"model_type": ["llama"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 30, "num_attention_heads": 0},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**12},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_decoder_layers": 10**12},
        {"model_type": "swin", "architectures": ["SwinModel"], "depths": [2, 10**12]},
    ):
        assert modules_of(config, Checkpoint.open(folder).tensors) is None, config


def test_what_a_config_asks_for_is_bounded_whatever_it_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of modules under a key that counts no blocks: building stops after a while, here a thirtieth of it."""
    monkeypatch.setattr(architectures, "_MOST_TENSORS", architectures._MOST_TENSORS // 30)
    asked = {"model_type": "switch_transformers", "architectures": ["SwitchTransformersModel"], "num_experts": 10**9}
    begin = time.process_time()
    assert modules_of(asked, []) is None
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma4_text", {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 8}),
        ("doge", {"num_experts": 16_384, "num_experts_per_tok": 64}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 20_480}),
    ],
)
def test_a_large_size_is_no_number_of_layers(family: str, more: dict[str, int]) -> None:
    """As in Gemma 4, Doge and Qwen2-57B-A14B."""
    model = tiny.build(family)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    assert modules_of({**config, **more}, [])


def test_the_module_says_how_its_experts_are_stored(tmp_path: Path) -> None:
    """Aria's are [experts, in, out], gpt-oss's too, Mixtral's are one by one and Granite's are [experts, out, in]."""
    expected = {"aria_text": True, "gpt_oss": True, "mixtral": None, "granitemoe": False}
    for family, in_out in expected.items():
        tiny.build(family).save_pretrained(tmp_path / family)
        checkpoint = Checkpoint.open(tmp_path / family)
        told = transposed_stacks(checkpoint.config, checkpoint.tensors)
        assert set(told.values()) == (set() if in_out is None else {in_out}), family


def test_experts_stored_in_out_compute_what_their_weights_stand_for(tmp_path: Path) -> None:
    model = tiny.build("aria_text")
    model.save_pretrained(tmp_path / "float")
    spicerack.quantize(tmp_path / "float", "w8", output=tmp_path / "out")
    dense = decoded_model(type(model), tmp_path / "out", tmp_path / "dense")
    ids = tiny.inputs(model)["input_ids"]
    loaded = spicerack.load(tmp_path / "out", compute="float")
    assert torch.allclose(logits(loaded, ids), logits(dense, ids), atol=1e-4)
    assert {e.transposed for e in Source.of(Checkpoint.open(tmp_path / "float")).census.entries.values()
            if e.role == "experts"} == {True}  # fmt: skip


def test_modules_ignore_hub_kernels(tmp_path: Path) -> None:
    """A config may ask for code from the hub as its attention; it is not asked."""
    families.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = config["_attn_implementation"] = "kernels-community/flash-attn"
    modules = modules_of(config, Checkpoint.open(tmp_path).tensors)
    assert modules is not None and modules["model.layers.0.self_attn.q_proj"] == "Linear"


def test_converted_layers_say_so(tmp_path: Path) -> None:
    """Tensors that transformers changes on loading by more than a new name are not plain Linears."""
    families.build("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = modules_of(config, Checkpoint.open(tmp_path).tensors)
    assert modules is not None
    assert modules["model.layers.0.block_sparse_moe.experts.3.w1"] == "experts"
    assert modules["model.layers.0.self_attn.q_proj"] == "Linear" and modules["lm_head"] == "Linear"


def test_own_folders(stories: Path) -> None:
    census = of(stories)
    assert census.tied == {"lm_head.weight": "model.embed_tokens.weight"} and census.parameters == 260_032
    assert sum(e.info.numel for e in census.entries.values() if e.role == "linear") == 5 * (
        2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172
    )


def test_names_of_saved_models_with_extra_tensors(tmp_path: Path) -> None:
    """Tensors that the model class does not know (MTP heads) are counted here and unknown there."""
    families.build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "mtp.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    modules = modules_of(checkpoint.config, checkpoint.tensors)
    assert modules is not None and "mtp.layers.0.mlp.up_proj" not in modules
    assert census.take(checkpoint).entries["mtp.layers.0.mlp.up_proj.weight"].role == "linear"
