"""The pages' Python snippets, executed as they are written there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, LlamaFolder
from torch import nn
from transformers import PreTrainedModel

import spicerack
from spicerack.nn.cache import QuantizedCache

pytestmark = pytest.mark.slow


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture
def folder(llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the model and the texts that the pages name."""
    monkeypatch.chdir(tmp_path)
    words = [f"{number} times {number} is {number * number}. " for number in range(1500)]
    Path("some.txt").write_text("".join(words[:200]))
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    return llama_folder()


def test_python(folder: Path) -> None:
    """docs/python.md, from top to bottom."""
    scope: dict[str, object] = {}
    module, quantized, calibrated, transformers = snippets("python.md")
    exec(module, scope)
    assert isinstance(scope["fresh"], nn.Module) and Path("saved", "config.json").exists()
    exec(quantized, scope)
    model, figures = scope["model"], scope["figures"]
    assert isinstance(model, PreTrainedModel) and isinstance(figures, dict) and 0 < figures["kl_mean"] < 1
    exec(calibrated, scope)
    text, result = scope["text"], scope["result"]
    assert isinstance(text, spicerack.Calibration) and text.ids.shape == (128, 128)
    assert isinstance(result, dict) and result["bits_per_weight"] < 4
    assert text.sha256 in Path("less", "spicerack.json").read_text()
    exec(transformers, scope)
    ids = torch.arange(7)[None]
    small, model = scope["small"], scope["model"]
    assert isinstance(small, PreTrainedModel) and isinstance(model, PreTrainedModel)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, small(ids).logits)


def test_tokens_of_ones_own(folder: Path) -> None:
    """A Calibration made by hand, as docs/python.md tells, does what one that was read does."""
    ids = torch.randint(1, 250, (16, 32), generator=torch.Generator().manual_seed(0))
    own = spicerack.Calibration(ids, None, "0" * 64, 0.0, "tokens of my own")
    result = spicerack.quantize(folder, "w3g64", output="own", calibration=own)
    assert result["bits_per_weight"] < 4


def test_evaluate(folder: Path) -> None:
    """docs/evaluation/evaluate.md: on the same text one folder is paired with another."""
    for range_ in ("opt", "absmax"):
        spicerack.quantize(folder, "w3", output=range_, range_=range_)
    scope: dict[str, object] = {"spicerack": spicerack}
    (snippet,) = snippets("evaluation/evaluate.md")
    exec(snippet, scope)
    mean, lo, hi = (scope[name] for name in ("mean", "lo", "hi"))
    assert isinstance(lo, float) and isinstance(mean, float) and isinstance(hi, float) and lo < mean < hi


def test_loading(folder: Path) -> None:
    """docs/runtime.md: what is said of a cache. The snippet above names devices and modules that are not here."""
    spicerack.quantize(folder, "w4g32", output="out")
    prompt = torch.arange(20)[None]
    scope: dict[str, object] = {"spicerack": spicerack, "prompt": prompt, "other": spicerack.load(folder)}
    exec(snippets("runtime.md")[1], scope)
    cache, ids = scope["cache"], scope["ids"]
    assert isinstance(cache, QuantizedCache) and cache.layers[0].packed is not None
    assert isinstance(ids, torch.Tensor) and ids.shape[1] > 80


def test_what_is_exact_names_tests_that_are_there() -> None:
    """docs/exports.md: a row that says so has a test of the engine's own reader behind it; and engines and files are
    those that `formats` knows."""
    from spicerack.storage import engine

    page = (ROOT / "docs" / "exports.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page[page.index("| engine |") :].splitlines()
        if line.startswith("| ")
    ]
    exact = [row for row in rows if row[3] == "exact"]
    assert len(exact) >= 6
    for row in exact:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[4])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
    files = {file.strip() for row in rows[1:] for file in row[1].split(",")}
    assert files == {way.to for one in engine.every() for way in one.reads}
