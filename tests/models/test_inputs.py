"""What a model can be given is what it really takes: at its last position it runs, and one behind it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.models.inputs import check_text, limits, limits_of
from spicerack.models.kind import kind_of, obstacle, unreadable

TABLES = [
    "bert",
    "deberta",
    "distilbert",
    "electra",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "mpnet",
    "opt",
    "roberta",
]
COMPUTED = ["llama", "gemma2", "qwen3_moe", "phi"]


@pytest.mark.parametrize("family", TABLES)
@torch.no_grad()
def test_a_table_of_positions_ends_where_it_says(family: str) -> None:
    model = families.build(family).eval()
    given = limits(model, model.config)
    assert given.table and given.positions is not None
    model.base_model(input_ids=torch.full((1, given.positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model.base_model(input_ids=torch.full((1, given.positions + 1), 5))
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    assert limits_of(config, model.config) == given, "of a folder that is not loaded"
    with pytest.raises(UsageError, match=f"--window {given.positions + 1}: the model has {given.positions} positions"):
        given.check_length(given.positions + 1, "--window")
    given.check_length(given.positions, "--window")


@pytest.mark.parametrize("family", COMPUTED)
@torch.no_grad()
def test_computed_positions_have_no_end(family: str) -> None:
    model = families.build(family).eval()
    given = limits(model, model.config)
    assert given.positions == 64 and not given.table
    model(input_ids=torch.full((1, 65), 5))


def test_roberta_cannot_use_the_rows_up_to_its_padding() -> None:
    model = families.build("roberta")
    rows = model.base_model.embeddings.position_embeddings.num_embeddings
    assert limits(model, model.config).positions == rows - model.config.pad_token_id - 1


def test_ids_are_below_the_rows_of_the_embedding() -> None:
    model = families.build("llama")
    model.resize_token_embeddings(101)
    given = limits(model, model.config)
    given.check_ids(torch.tensor([[0, 100]]))
    given.check_ids(torch.empty(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="makes token 101, but the model's vocabulary has 101 entries"):
        given.check_ids(torch.tensor([[101]]))


VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip


def llava() -> PreTrainedModel:
    """A picture has 65 positions in its tower, a text 64 in the language model."""
    text = families.LLAMA | {"model_type": "llama"}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=VISION | {"model_type": "clip_vision_model"}, image_token_index=98
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_of_several_kinds_of_input_the_text_counts() -> None:
    given = limits(llava(), llava().config)
    assert (given.vocabulary, given.positions, given.table) == (99, 64, False)


def test_a_model_of_text_tells_which_layers_text_reaches() -> None:
    model = llava()
    reached = check_text(model, head=True)
    assert "model.language_model.layers.1.mlp.down_proj" in reached and "lm_head" in reached
    assert not [path for path in reached if "vision" in path or "projector" in path]
    encoder = families.build("bert-classifier").eval()
    assert "classifier" not in check_text(encoder, head=False)


def config_of(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **more}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("vit", "ViTForImageClassification"), "reads pictures, not text"),
        (config_of("wav2vec2", "Wav2Vec2ForCTC"), "reads sound, not text"),
        (config_of("blip", "BlipForConditionalGeneration"), "reads pictures, not text"),
        (config_of("blip-2", "Blip2ForConditionalGeneration"), "reads pictures, not text"),
        (config_of("vits", "VitsModel"), "makes sound of text"),
        (config_of("clip", "CLIPModel", text_config={}, vision_config={}), "compares pictures with text"),
        (config_of("clap", "ClapModel", text_config={}, audio_config={}), "compares sound with text"),
        (config_of("whisper", "WhisperForConditionalGeneration", is_encoder_decoder=True), "is an encoder-decoder"),
        ({"model_type": "vit"}, "reads pictures, not text"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_is_given_something_else_is_named(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        kind_of(config, tmp_path)
    assert str(tmp_path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config_of("llama", "LlamaForCausalLM"), "decoder"),
        (config_of("gpt2", "GPT2LMHeadModel"), "decoder"),
        (config_of("llava", "LlavaForConditionalGeneration", text_config={}, vision_config={}), "decoder"),
        (config_of("qwen2_vl", "Qwen2VLModel", text_config={}, vision_config={}), "encoder"),
        (config_of("bert", "BertModel"), "encoder"),
        (config_of("clip_text_model", "CLIPTextModel"), "encoder"),
        (config_of("unheard-of", "NobodysModel"), "encoder"),
        ({}, "encoder"),
    ],
    ids=lambda value: value.get("model_type", "empty") if isinstance(value, dict) else "",
)
def test_what_reads_text_is_taken(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert obstacle(config) is None and unreadable(config) is None and kind_of(config, tmp_path) == kind


def test_what_only_a_run_can_tell() -> None:
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=families.SMALL, vision_config=VISION)).eval()
    with pytest.raises(UsageError, match="CLIPModel cannot be run on text alone"):
        check_text(clip, head=False)
    with pytest.raises(UsageError, match="BertModel makes no logits for each token"):
        check_text(families.build("bert").eval(), head=True)
