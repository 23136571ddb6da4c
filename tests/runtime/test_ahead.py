"""Packed weights laid out beside the building of the model: the same as decoded, whatever the format; read once."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.errors import CheckpointError
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import codec
from spicerack.runtime import ahead, load
from spicerack.runtime.ahead import Ahead, Way
from spicerack.runtime.folder import Folder
from spicerack.storage import reader

SCHEMES = [
    "w8", "w4g32", "w3g64", "w4g32z", "w6", "w2g32h", "w8t", "w8a8", "ternary", "ternarya8", "w4g32m", "mxfp4", "nvfp4",
    "nf4",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_laid_out_ahead_is_what_the_folder_holds(
    scheme: str, llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spicerack.quantize(llama_folder(), scheme, output=tmp_path / "out")
    monkeypatch.setattr(ahead, "_BATCH", 20_000)
    folder = Folder.open(tmp_path / "out")
    with Ahead(folder, Way("cpu")) as work:
        ready = work.result()
    assert set(ready) == (set() if scheme == "nf4" else set(folder.contents))
    model = spicerack.load(tmp_path / "out")
    for name, stored in folder.contents.items():
        weight, q = model.get_submodule(name).packed, folder.packed(stored)
        assert isinstance(weight, PackedWeight)
        back = weight.qtensor()
        assert torch.equal(back.codes, q.codes) and torch.equal(codec.decode(back), codec.decode(q))
        assert (q.zero is None and back.zero is None) or torch.equal(back.zero, q.zero)  # type: ignore[arg-type]
        for key, tensor in q_packed(weight, q).items():
            assert torch.equal(weight.tensors[key], tensor), key


def q_packed(weight: PackedWeight, q: Any) -> dict[str, torch.Tensor]:
    """What the weight's own kernel makes of a QTensor."""
    return weight.choice.kernel.pack(q)


@pytest.mark.parametrize("scheme", ["ternary", "ternarya8"])
def test_a_code_that_is_no_level_is_refused_by_name(scheme: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), scheme, output=tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(("q_proj.codes", "q_proj.weight")))
    tensors[name].view(torch.uint8)[-1, -1] |= 3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.*a code that is none of"):
        spicerack.load(tmp_path / "out")


def test_shards_are_opened_once(llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    spicerack.quantize(llama_folder(), "w4g32", output=out, shard_bytes=50_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    parsed: list[str] = []
    mapped: list[int] = []
    headers, maps = reader.safe_open, mmap.mmap

    def parse(path: Path, **options: Any) -> Any:
        parsed.append(path.name)
        return headers(path, **options)

    def map_(file: int, *arguments: Any, **options: Any) -> Any:
        if file != -1:
            mapped.append(file)
        return maps(file, *arguments, **options)

    monkeypatch.setattr(reader, "safe_open", parse)
    monkeypatch.setattr(mmap, "mmap", map_)
    load.load(out)
    assert sorted(parsed) == shards and len(mapped) == len(shards)


def test_no_thread_is_left_behind_where_a_load_fails(
    llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    ended: list[bool] = []
    run = Ahead._run

    def slow(self: Ahead, threads: int) -> Any:
        try:
            return run(self, threads)
        finally:
            ended.append(True)

    monkeypatch.setattr(Ahead, "_run", slow)
    with pytest.raises(CheckpointError, match="refused"):
        monkeypatch.setattr("spicerack.runtime.hf.build", refuse)
        spicerack.load(tmp_path / "out")
    assert ended


def refuse(*_arguments: Any, **_options: Any) -> Any:
    raise CheckpointError("refused", "none")
