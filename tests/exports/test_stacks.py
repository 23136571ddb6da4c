"""Experts go to MLX as one stack for all, which mlx-lm runs, and come back one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ggufs import folder
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.errors import CheckpointError, SchemeError
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.runtime.folder import Folder
from spicerack.storage import format as formats
from spicerack.storage import stacks
from spicerack.storage.reader import Checkpoint

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_hold_experts_and_give_them_back(family: str, tmp_path: Path) -> None:
    spicerack.quantize(folder(family), "w4g32z", output=tmp_path / "ours", fit_groups=True)
    spicerack.export(tmp_path / "ours", to="mlx", output=tmp_path / "mlx")
    names = set(Checkpoint.open(tmp_path / "mlx").tensors)
    stacked = {name for name in names if ".switch_mlp." in name}
    assert not [name for name in names if ".experts." in name]
    assert {name.split(".switch_mlp.")[1] for name in stacked} == {
        f"{layer}.{part}" for layer in ("gate_proj", "up_proj", "down_proj") for part in ("weight", "scales", "biases")
    }
    source, out = Folder.open(tmp_path / "ours"), Folder.open(tmp_path / "mlx")
    assert set(source.contents) == set(out.contents)
    for module, stored in source.contents.items():
        assert torch.equal(codec.decode(source.packed(stored)), codec.decode(out.packed(out.contents[module])))
    spicerack.import_model(tmp_path / "mlx", output=tmp_path / "back")
    with torch.no_grad():
        ids = torch.arange(9)[None]
        first, last = (spicerack.load(tmp_path / name)(ids).logits for name in ("ours", "back"))
    assert float((first - last).abs().max()) < 1e-4
    ledger = json.loads((tmp_path / "mlx" / "spicerack.json").read_text())
    assert {entry["tensor"] for entry in ledger["tensors"]} >= {f"{module}.weight" for module in source.contents}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_with_stacks(family: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    spicerack.quantize(folder(family), "w4g32", output=tmp_path / "ours", fit_groups=True)
    assert spicerack.export(tmp_path / "ours", to="mlx", output=tmp_path / "mlx").foreign
    ids = torch.arange(9)[None]
    with torch.no_grad():
        ours = spicerack.load(tmp_path / "ours", compute="float")(ids).logits
    theirs = torch.from_numpy(np.array(load_model(tmp_path / "mlx")[0](mx.array(ids.numpy()))))
    assert float((ours - theirs).abs().max()) < 1e-4


def test_experts_that_differ_are_no_stack(tmp_path: Path) -> None:
    rule = Rule("model.layers.0.mlp.experts.1.*", parse("w8g32"))
    recipe = Recipe(parse("w4g32"), rules=(rule,), fit_groups=True)
    spicerack.quantize(folder("qwen3_moe"), recipe, output=tmp_path / "ours")
    with pytest.raises(SchemeError, match=r"experts\.1\.\w+: mlx has no .*switch_mlp\.\w+ of experts that differ"):
        spicerack.export(tmp_path / "ours", to="mlx", output=tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_damaged_stacks_are_named(tmp_path: Path) -> None:
    spicerack.quantize(folder("qwen3_moe"), "w4g32", output=tmp_path / "ours", fit_groups=True)
    spicerack.export(tmp_path / "ours", to="mlx", output=tmp_path / "mlx")
    name = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    for number, change in enumerate((lambda t: t[:-1], lambda t: t[0], lambda t: t[:, :-1], lambda t: t[:0])):
        place = tmp_path / f"damaged{number}"
        shutil.copytree(tmp_path / "mlx", place)
        tensors = load_file(place / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError):
            Folder.open(place)


def test_names() -> None:
    assert stacks.place("model.layers.1.block_sparse_moe.experts.7.w2") == (
        "model.layers.1.block_sparse_moe.switch_mlp.down_proj", 7
    )  # fmt: skip
    assert stacks.place("model.layers.1.mlp.experts.0.gate_proj") == ("model.layers.1.mlp.switch_mlp.gate_proj", 0)
    assert stacks.place("model.layers.1.mlp.shared_expert.gate_proj") is None
    assert formats.get("gptq").stacks({}) == {}
