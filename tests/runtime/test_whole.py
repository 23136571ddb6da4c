"""`spicerack kernels OUT` says which parts of a model run as one native call, and why others do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nets import tiny
from transformers import BertConfig, BertForSequenceClassification, BertModel

import spicerack
from spicerack.cli import _output, cli
from spicerack.runtime.whole import whole_parts

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def folder(path: Path, model: str = "BertModel", **settings: object) -> Path:
    """A quantized folder of a random model."""
    kind = {"BertModel": BertModel, "classifier": BertForSequenceClassification}[model]
    kind(BertConfig(**SMALL, **settings)).save_pretrained(path / "original")  # type: ignore[arg-type]
    spicerack.quantize(path / "original", "w8", output=path / "out")
    return path / "out"


def test_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder(tmp_path)
    assert whole_parts(out) == whole_parts(out, "float", "scalar") == {"": None}
    assert _output.run(cli, ["kernels", str(out)]) == 0
    assert "the model: one native call" in capsys.readouterr().out
    assert _output.run(cli, ["kernels", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["one_call"] == [{"path": "", "obstacle": None}]


def test_modules_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder(tmp_path, "classifier", hidden_act="relu")
    reason = "encoder.layer.0.intermediate.intermediate_act_fn is a ReLU"
    assert whole_parts(out) == {"bert": reason}
    assert _output.run(cli, ["kernels", str(out)]) == 0
    assert f"bert: its modules, one by one: {reason}" in capsys.readouterr().out


def test_other_models_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().save_pretrained(tmp_path / "llama")
    spicerack.quantize(tmp_path / "llama", "w8", output=tmp_path / "out")
    monkeypatch.delattr("spicerack.runtime.whole.load")
    assert whole_parts(tmp_path / "out") == {}
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "float")  # type: ignore[arg-type]
    assert whole_parts(tmp_path / "float") == {}
