"""A new family of models is rows of tables: one that nobody knows, from its config.json to transformed weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calibrations
import families
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

import spicerack
from spicerack.errors import RecipeError
from spicerack.models.families.folds import FOLDS
from spicerack.models.families.residual import RESIDUAL

NORM = "input_layernorm"
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class MadeUpConfig(LlamaConfig):
    """A family that computes like Llama, and that no table here knows."""

    model_type = "made_up"


@pytest.fixture
def made_up(tmp_path: Path) -> Iterator[Path]:
    """A folder of it, with two channels that stand out, as AWQ wants them."""
    model = families.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[3, 17]] *= 40
            for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                reader.weight[:, [3, 17]] /= 10
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "made_up"}))
    AutoConfig.register("made_up", MadeUpConfig)
    yield tmp_path / "model"
    CONFIG_MAPPING._extra_content.pop("made_up")


def quantized(source: Path, out: Path, scheme: str, method: str, **more: Any) -> dict[str, list[str]]:
    """What the ledger says happened: tensor -> events."""
    spicerack.quantize(source, scheme, output=out, method=method, **more)
    ledger = json.loads((out / "spicerack.json").read_text())
    return {entry["tensor"]: entry["events"] for entry in ledger["tensors"]}


@torch.no_grad()
def off(out: Path, source: Path) -> float:
    """Relative error of the logits on other tokens than were calibrated with."""
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    before, after = (spicerack.load(folder, compute="float")(input_ids=ids).logits for folder in (source, out))
    return float((after - before).norm() / before.norm())


def test_a_fold_is_one_row(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = calibrations.text()
    before = quantized(made_up, tmp_path / "before", "w3g16", "awq", calibration=text)
    assert before[f"model.layers.0.{READERS[0]}.weight"] == ["awq: no place to move factors to is known"]
    monkeypatch.setitem(FOLDS, "made_up", ((NORM, READERS),))
    after = quantized(made_up, tmp_path / "after", "w3g16", "awq", calibration=text)
    assert after[f"model.layers.0.{NORM}.weight"] == ["divided by factors that the layers behind it have now"]
    assert after["model.layers.0.post_attention_layernorm.weight"] == []
    assert off(tmp_path / "after", made_up) < off(tmp_path / "before", made_up)


def test_a_rotation_is_another(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="the residual stream of LlamaForCausalLM is not known"):
        quantized(made_up, tmp_path / "out", "w8", "hadamard")
    monkeypatch.setitem(RESIDUAL, "made_up", RESIDUAL["llama"])
    monkeypatch.setitem(FOLDS, "made_up", FOLDS["llama"])
    quantized(made_up, tmp_path / "out", "w8", "hadamard")
    embedding = spicerack.load(tmp_path / "out").get_input_embeddings().weight
    assert not torch.equal(embedding, spicerack.load(made_up).get_input_embeddings().weight)
    assert off(tmp_path / "out", made_up) < 0.02
