"""The check behind `quantize`: what `eval` would measure, on what calibration left, within the time that it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder, byte_tokenizer
from transformers import ViTConfig, ViTForImageClassification

import spicerack
from spicerack.cli import _loss, _output, cli
from spicerack.errors import CheckpointError, UsageError
from spicerack.evaluation import check as checks
from spicerack.evaluation.check import check
from spicerack.evaluation.reference import Pace
from spicerack.storage import ledger, records
from spicerack.text import calibration
from spicerack.text.packing import Packing

WORDS = "one word after another, and then a few more of them. "


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert _output.run(cli, [*map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_quantize_ends_with_what_eval_would_say(
    llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = llama_folder(), tmp_path / "out"
    (source / "heldout.txt").write_text(WORDS * 60)
    result = printed(capsys, "quantize", source, "-o", out, "--scheme", "w2g32")
    told = result["check"]
    want = printed(capsys, "eval", out, "--against", source, "--window", 128, "--max-tokens", 4096)
    assert {key: told[key] for key in want} == want and told["notes"] == []
    assert told["windows"] > 20 and told["kl_mean_ci95"][0] < told["kl_mean"] < told["kl_mean_ci95"][1]
    written = ledger.read(out)
    assert written is not None and written.check == want, "and not how long it took"
    # a record of what was measured is of this folder, whether it was checked before or after
    record = records.read(out, "eval")
    ledger.keep_check(out, {"text": "another"})  # which is none of ours: it is measured again
    assert record is not None and records.read(out, "eval") == record

    assert _output.run(cli, ["quantize", str(source), "-o", str(out), "--scheme", "w2g32"]) == 0  # is there already
    lines = capsys.readouterr().out.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("checked: "))
    assert f"{round(1000 * want['top1_agreement'])} of 1000 next tokens" in lines[told]
    assert "heldout.txt, in" in lines[told + 1] and f"more: spicerack eval {out} --against {source}" in lines[told + 1]
    again = ledger.read(out)
    assert again is not None and again.check == want

    bare = printed(capsys, "quantize", source, "-o", tmp_path / "bare", "--scheme", "w2g32", "--no-check")
    left = ledger.read(tmp_path / "bare")
    assert "check" not in bare and left is not None and left.check is None
    assert "check" not in spicerack.quantize(source, "w2g32", output=tmp_path / "python")
    python = spicerack.quantize(source, "w2g32", output=tmp_path / "checked", check=True)["check"]
    assert {key: python[key] for key in want} == want
    names = {path.name: path.read_bytes() for path in (tmp_path / "python").iterdir() if path.name != "run.json"}
    same = {path.name: path.read_bytes() for path in (tmp_path / "bare").iterdir() if path.name != "run.json"}
    assert names == same
    with pytest.raises(UsageError, match="for folders"):
        spicerack.quantize(torch.nn.Linear(8, 8), "w8", check=True)


def test_a_damaged_check_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "spicerack.json").write_text('{"identity": {}, "tensors": [], "check": [1]}')
    with pytest.raises(CheckpointError, match="not a ledger"):
        ledger.read(tmp_path)


def test_calibration_leaves_what_it_did_not_choose(tmp_path: Path) -> None:
    """By a list of all sequences: none that was chosen, the last ones, and nothing where all were."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i} make {i + i * i}; " for i in range(900)))
    tokenizer = byte_tokenizer()
    every = list(Packing(tokenizer, 64).sequences(_passages(text)))
    read = calibration.read(text, tokenizer, samples=100, length=64, seed=3)
    chosen = read.ids.tolist()
    assert read.spare is not None and len(read.spare) == 64, "4096 tokens"
    left = [row for row in every if row not in chosen]
    assert all(row in left for row in read.spare.tolist())
    assert len({tuple(row) for row in read.spare.tolist()}) == 64
    assert calibration.read(text, tokenizer, samples=len(every), length=64, seed=3).spare is None
    text.write_text("the same again " * 64 * 40)  # of which each sequence is one of fifteen
    assert calibration.read(text, tokenizer, samples=500, length=60, seed=0).spare is None


def _passages(text: Path) -> Any:
    from spicerack.text import documents

    return documents.passages(documents.find(text), byte_tokenizer(), by_line=False, seed=0)


def test_it_reads_what_calibration_left(
    llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text = llama_folder(), tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i} make {i + i * i}; " for i in range(900)))
    words = ["--scheme", "w4g32", "--calib", text, "--samples", 8, "--length", 64]
    told = printed(capsys, "quantize", source, "-o", tmp_path / "out", *words)["check"]
    assert told["text"] == "what calibration left of its text" and (told["windows"], told["window"]) == (64, 64)
    assert told["command"].endswith("--text FILE")
    plain = printed(capsys, "quantize", source, "-o", tmp_path / "plain", "--scheme", "w4g32")["check"]
    assert plain["text"] == "the text that comes with spicerack" and plain["tokens"] > 2000


def test_what_cannot_be_checked_is_told(
    llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = llama_folder(), tmp_path / "out"
    spicerack.quantize(source, "w4g32", output=out)
    before = (out / "spicerack.json").read_bytes()

    def reason(**more: Any) -> str:
        told = check(out, source, seconds=0.0, **more)
        assert told.figures is None and told.reason is not None and "skipped" in told.as_dict()
        assert _loss.checked(told)[0] == f"not checked: {told.reason}"
        assert (out / "spicerack.json").read_bytes() == before
        return told.reason

    with monkeypatch.context() as patch:
        patch.setattr("spicerack.evaluation.evaluate.load", None)  # it would fail to be called
        assert "GB of memory" in reason(memory=1000)
        patch.setattr(checks, "available_bytes", lambda: 10**8)
        assert "there are 0.1" in reason()
        patch.setattr(checks, "available_bytes", lambda: 10**12)
        patch.setattr(checks, "_LOADED", 1e4)
        assert "loading both models takes" in reason()
    for file in source.glob("tokenizer*"):
        shutil.move(file, tmp_path / file.name)
    assert "tokenizer" in reason()


def test_a_model_of_pictures_has_no_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    words = ["quantize", str(tmp_path / "vit"), "-o", str(tmp_path / "out"), "--scheme", "w8"]
    assert _output.run(cli, words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not checked: ") and "which reads pictures, not text" in last


def test_a_pace_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("spicerack.evaluation.reference.time.monotonic", lambda: now[0])

    def slowly() -> Any:
        for i in range(10):
            now[0] += 1
            yield i

    assert list(Pace().limit(slowly(), 1)) == list(range(10))
    now[0] = 100.0
    assert list(Pace(104.5).limit(slowly(), 1)) == [0, 1, 2, 3]
    assert list(Pace(50.0).limit(slowly(), 2)) == [0, 1], "whatever the time"
    now[0] = 100.0
    assert Pace(130.0).of_floor().end == 110.0 and Pace().of_floor().end is None

    class Slow(torch.nn.Module):
        device = torch.device("cpu")

        @property
        def base_model(self) -> Slow:
            return self

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            now[0] += 1.0  # of 64 tokens, so that 6 s are three short windows of two models
            return (input_ids,)

    model: Any = Slow()
    assert Pace(100.0 + 1 + 24, 256).window(model, 512) == 256
    now[0] = 100.0
    assert Pace(100.0 + 1 + 23, 256).window(model, 512) == 64
    now[0] = 100.0
    with pytest.raises(UsageError, match=r"takes 6 s, and 5 s are left"):
        Pace(100.0 + 1 + 5, 256).window(model, 512)
    assert Pace(None).window(model, 512) == 512
