"""Matrices that transformers cuts while loading: each part is a layer, its rows are the file's, others read folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from ggufs import folder, word_pieces
from safetensors.torch import load_file

import spicerack
from spicerack.errors import RecipeError
from spicerack.models.architecture import cuts, on_meta
from spicerack.runtime.folder import Folder
from spicerack.storage.cutting import Cut, cut
from spicerack.storage.reader import Checkpoint
from spicerack.text import calibration

PARTS = ("q_proj", "k_proj", "v_proj")


def split(checkpoint: Checkpoint) -> Checkpoint:
    """As `quantize` sees it."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return cut(checkpoint, cuts(on_meta(checkpoint.config), shapes))


@pytest.fixture(scope="module")
def gte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries, keys and values with biases, gate and up, and a class with a head."""
    place = tmp_path_factory.mktemp("gte")
    tiny.build("gte").save_pretrained(place)
    word_pieces().save_pretrained(place)
    return place


def test_parts_are_rows_of_the_files_tensors(gte: Path) -> None:
    checkpoint, whole = split(Checkpoint.open(gte)), load_file(gte / "model.safetensors")
    assert isinstance(checkpoint, Cut) and "cut into" in checkpoint.notes[-1]
    assert not [name for name in checkpoint.tensors if "qkv_proj" in name or "up_gate" in name]
    for view in (checkpoint, checkpoint.held()):
        for last in ("weight", "bias"):
            rows = [view.read(f"gte.layers.1.self_attn.{part}.{last}") for part in PARTS]
            assert torch.equal(torch.cat(rows), whole[f"gte.encoder.layer.1.attention.qkv_proj.{last}"])
        key = "gte.layers.1.self_attn.k_proj.weight"
        assert torch.equal(view.read_rows(key, 3, 99), view.read(key)[3:]) and view.told(key)
        assert sum(info.nbytes for info in view.tensors.values()) == view.stored_bytes
        for name in view.tensors:
            view.release(name)
    assert checkpoint.fingerprint() == Checkpoint.open(gte).fingerprint()
    plain = Checkpoint.open(folder("llama"))
    assert split(plain) is plain


@pytest.mark.parametrize(("family", "scheme"), [("nomic_bert", "w4g32"), ("gte", "w8a8")])
def test_transformers_alone_reads_the_parts(family: str, scheme: str, gte: Path, tmp_path: Path) -> None:
    """What it computes from a folder is what it computes from the weights that our codes stand for."""
    source = gte if family == "gte" else folder(family)
    spicerack.quantize(source, scheme, output=tmp_path / "q", fit_groups=True)
    contents = Folder.open(tmp_path / "q").contents
    assert sum(module.rpartition(".")[2] in PARTS for module in contents) == 6
    cls = transformers.GteForMaskedLM if family == "gte" else transformers.NomicBertModel
    model, loading = cls.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(loading.values())
    ids = torch.tensor([[2, 7, 9, 30, 41, 3]])
    with torch.no_grad():
        theirs, exact = model.eval()(input_ids=ids)[0], cls.from_pretrained(source).eval()(input_ids=ids)[0]
        ours = spicerack.load(tmp_path / "q")(input_ids=ids)[0]
    assert float((theirs - ours).norm() / ours.norm()) < 2e-3  # w8a8: activations are rounded in two ways
    assert 0 < float((theirs - exact).norm() / exact.norm()) < 0.02


def test_parts_are_calibrated_and_named_by_rules(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nthe dog ran to the red barn\n" * 40)
    given = calibration.read(text, word_pieces(), kind="encoder", samples=16, length=16, seed=0)
    rules = ["**.v_proj=w8"]
    for method in ("rtn", "gptq"):
        spicerack.quantize(
            folder("nomic_bert"), "w3g32", rules=rules, method=method, calibration=given, fit_groups=True,
            output=tmp_path / method,
        )  # fmt: skip
    a, b = (Folder.open(tmp_path / method) for method in ("rtn", "gptq"))
    key = "layers.0.self_attn.q_proj"
    assert {a.contents[f"layers.0.self_attn.{part}"].scheme.name for part in PARTS} == {"w3g32", "w8"}
    assert not torch.equal(a.packed(a.contents[key]).codes, b.packed(b.contents[key]).codes)
    with pytest.raises(RecipeError, match="Wqkv=w8 matches nothing"):
        spicerack.quantize(folder("nomic_bert"), "w4g32", rules=["**.Wqkv=w8"], output=tmp_path / "none")
