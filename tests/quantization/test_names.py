"""Files and layers by the names that other libraries have for them: diffusers' weight files, timm's classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spicerack
from spicerack.storage.files import find
from spicerack.storage.reader import Checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(64, 64), nn.Linear(64, 32)


def folder(where: Path, config: dict[str, object], file: str = "model.safetensors") -> Path:
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config))
    save_file(Net().state_dict(), where / file, metadata={"format": "pt"})
    return where


@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_a_component_of_diffusers_keeps_the_names_that_its_class_reads(tmp_path: Path, shard_bytes: int | None) -> None:
    config = {"_class_name": "Transformer", "_diffusers_version": "0.36.0"}
    source = folder(tmp_path / "model", config, "diffusion_pytorch_model.safetensors")
    out = tmp_path / "out"
    spicerack.quantize(source, "w8", output=out, shard_bytes=shard_bytes)
    shards = find(out).shards
    assert shards and all(name.startswith("diffusion_pytorch_model") for name in shards)
    assert not list(out.glob("model*")) and Checkpoint.open(out).tensors
    assert (len(shards) > 1) == (out / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = spicerack.load(out, into=Net())
    assert "w8" in str(loaded.inner.packed)


@pytest.mark.parametrize("classifier", ["last", ["last"], None])
def test_what_timm_calls_the_classifier_is_a_head(tmp_path: Path, classifier: object) -> None:
    """And stays in float, as heads do, unless a rule names it; a model in memory says so, too."""
    settings = {"classifier": classifier, "num_classes": 32}
    source = folder(tmp_path / "model", {"architecture": "net", "num_classes": 32, "pretrained_cfg": settings})
    module = Net()
    module.pretrained_cfg = settings
    for rules, packed in (([], classifier is None), (["last=w8"], True)):
        out = tmp_path / f"out{len(rules)}"
        spicerack.quantize(source, "w8", rules=rules, output=out)
        for small in (spicerack.load(out, into=Net()), spicerack.quantize(module, "w8", rules=rules)):
            assert hasattr(small.last, "packed") == packed and hasattr(small.inner, "packed")
            assert small.last.weight.shape == torch.Size([32, 64])
