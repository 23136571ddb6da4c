"""A refusal leaves nothing behind: no folder, no parent that was made for it; but what is finished stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import calibrations
import pytest
import torch
from conftest import LlamaFolder
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.errors import SpicerackError


def with_nan(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = [name for name in tensors if part in name][-1]
        tensors[name].fill_(torch.nan)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def nothing(_folder: Path) -> None: ...


@pytest.mark.parametrize(("change", "options"), [
    (with_nan("down_proj"), {}),
    (with_nan("embed_tokens"), {"calibration": calibrations.text()}),
    (with_nan("layers.0.input_layernorm"), {"calibration": calibrations.text()}),
    (nothing, {"calibration": calibrations.text(), "memory": 1000}),
    (nothing, {"calibration": calibrations.text(length=200)}),
    (nothing, {"method": "gptq"}),
    (nothing, {"device": "cuda:77", "calibration": calibrations.text()}),
])  # fmt: skip
def test_no_refusal_leaves_a_folder(
    llama_folder: LlamaFolder, tmp_path: Path, change: Callable[[Path], None], options: dict[str, object]
) -> None:
    folder = llama_folder()
    change(folder)
    with pytest.raises(SpicerackError):
        spicerack.quantize(folder, "w4g32", output=tmp_path / "new" / "out", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["t5", "albert", "vit"])
def test_nor_does_one_of_models_that_are_not_calibrated(name: str, tmp_path: Path) -> None:
    """T5 has two stacks, ALBERT one block for all, a ViT sees no text: found out by building, or by running it."""
    folder = calibrations.saved(name, tmp_path / "model")
    with pytest.raises(SpicerackError):
        spicerack.quantize(folder, "w4g32", output=tmp_path / "new" / "out", calibration=calibrations.text())
    assert not (tmp_path / "new").exists()


def test_what_is_finished_stays_and_another_s_folder_too(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder, out = llama_folder(), tmp_path / "new" / "out"
    with_nan("layers.1.mlp.down_proj")(folder)
    with pytest.raises(SpicerackError):
        spicerack.quantize(folder, "w4g32", output=out, shard_bytes=20_000)
    assert list((tmp_path / "new" / "out.partial").glob("*.safetensors"))
    with pytest.raises(SpicerackError):
        spicerack.quantize(folder, "w4g32", output=out, shard_bytes=20_000)
    assert list((tmp_path / "new" / "out.partial").glob("*.safetensors"))
