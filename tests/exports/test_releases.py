"""Releases in FP8 are imported with the codes that they have, where a row has a scale; elsewhere the rule is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.errors import CheckpointError, UsageError
from spicerack.numerics import codec
from spicerack.runtime.folder import Folder

FP8 = torch.float8_e4m3fn
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
INVERSE = {"quant_method": "fp8"}


def release(
    folder: Path, section: dict[str, object], suffix: str, scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A folder's linear layers in FP8 -> codes and scales of each."""
    tensors, layers = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = scale_of(tensors[name])
        divided = tensors[name] if scale.ndim and scale.shape[1] > 1 else tensors[name] / scale.float()
        layers[name] = divided.to(FP8), scale
        tensors[name], tensors[f"{name}{suffix}"] = layers[name]
        tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section, "dtype": "bfloat16"}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return layers


def rows(w: torch.Tensor) -> torch.Tensor:
    return (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)


def blocks(w: torch.Tensor) -> torch.Tensor:
    return torch.ones(-(-len(w) // 32), -(-w.shape[1] // 48))


@pytest.mark.parametrize(
    ("section", "suffix", "scale_of"),
    [(ROWS, "_scale", rows), (INVERSE, "_scale_inv", lambda _: torch.tensor(2.0**-10))], ids=["rows", "tensor"],
)  # fmt: skip
def test_codes_are_kept(
    section: dict[str, object], suffix: str, scale_of: Callable[[torch.Tensor], torch.Tensor],
    llama_folder: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = llama_folder("release")
    layers = release(source, section, suffix, scale_of)
    written = spicerack.import_model(source, output=tmp_path / "out")
    assert (written.packed, written.rounded) == (len(layers), ())
    folder = Folder.open(tmp_path / "out")
    for name, (codes, scale) in layers.items():
        stored = folder.contents[name.removesuffix(".weight")]
        q = folder.packed(stored)
        assert str(stored.scheme) == "fp8" and torch.equal(q.codes, codes.view(torch.uint8))
        assert torch.equal(codec.decode(q), codes.float() * scale.float())
    assert not [name for name in folder.checkpoint.tensors if "input_scale" in name]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        ours = spicerack.load(tmp_path / "out")(tokens).logits
        floats = spicerack.load(source)(tokens).logits
    assert (ours - floats).abs().max() < 0.05 * floats.abs().max()  # bfloat16 rounds weights of the one


@pytest.mark.parametrize(
    ("section", "suffix", "scale_of", "rule"),
    [
        (INVERSE | {"weight_block_size": [32, 48]}, "_scale_inv", blocks, "32 x 48 weights"),
        (INVERSE, "_scale_inv", lambda _: torch.tensor(0.001), "no float of 16 bits"),
    ],
    ids=["blocks", "float32"],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(
    section: dict[str, object], suffix: str, scale_of: Callable[[torch.Tensor], torch.Tensor], rule: str,
    llama_folder: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = llama_folder("release")
    release(source, section, suffix, scale_of)
    with pytest.raises(UsageError, match=f"codes cannot be kept: .*{rule}"):
        spicerack.import_model(source, output=tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_weight_that_is_no_number_is_named(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = llama_folder("release")
    layers = release(source, ROWS, "_scale", rows)
    tensors = load_file(source / "model.safetensors")
    tensors[next(iter(layers))].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="a weight or scale that is no number"):
        spicerack.import_model(source, output=tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []
