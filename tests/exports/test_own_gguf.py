"""Export to GGUF where nobody's reader is installed, and of what it does not decode: our own second decoder reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ggufs import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import spicerack
from spicerack.cli import cli
from spicerack.errors import OutputError, UsageError
from spicerack.exports.readers import _ggml
from spicerack.exports.targets import gguf as target
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse
from spicerack.runtime.folder import Folder
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import BY_ID, TYPES
from spicerack.storage.gguf.writer import GgufWriter

UNREAD = ("Q1_0", "Q2_0")


@pytest.fixture
def no_gguf_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))


@pytest.mark.parametrize("number", _ggml.BLOCKS, ids=lambda number: BY_ID[number].name)
def test_blocks_are_decoded_as_llama_cpp_does(number: int) -> None:
    type_, kind = BY_ID[number], _ggml.BLOCKS[number]
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(number))
    scheme = parse(str(type_.scheme))
    q, _ = blocks.without_tensor_scale(codec.encode(w, scheme))
    raw = blocks.encode(type_, q).numpy()
    values = kind.numbers(raw.reshape(-1, kind.nbytes))
    assert (kind.block, kind.nbytes, values.dtype) == (type_.block, type_.nbytes, np.float32)
    assert np.array_equal(values.reshape(w.shape), codec.decode(q).numpy())
    if type_.name not in UNREAD:
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
        assert np.array_equal(values.reshape(w.shape), theirs)


def test_every_type_that_is_written_is_decoded() -> None:
    assert {BY_ID[number].name for number in _ggml.BLOCKS} == {t.name for t in TYPES.values() if t.scheme is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "falcon", "bert"])
@pytest.mark.parametrize("scheme", [None, "w4g32"])
@pytest.mark.usefixtures("no_gguf_py")
def test_files_are_read_back_all_the_same(family: str, scheme: str | None, tmp_path: Path) -> None:
    written = spicerack.export(folder(family), to="gguf", output=tmp_path / "m.gguf", scheme=scheme)
    assert (written.foreign, written.rounded) == (False, ())
    assert "second decoder" in written.verified_by
    assert (written.packed > 0) == (scheme is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.usefixtures("no_gguf_py")
def test_split_files_are_read_back(tmp_path: Path) -> None:
    written = spicerack.export(folder("llama"), to="gguf", output=tmp_path / "m.gguf", shard_bytes=100_000)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1 and written.output == files[0]
    assert written.nbytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("without", [False, True])
def test_types_that_gguf_py_lacks_are_read_back_by_us(
    without: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if without:
        request.getfixturevalue("no_gguf_py")
    written = spicerack.export(folder("llama"), to="gguf", output=tmp_path / "m.gguf", scheme="q2_0")
    assert "second decoder" in written.verified_by
    assert "q2_0" in {str(stored.scheme) for stored in Folder.open(tmp_path / "m.gguf").contents.values()}


@pytest.mark.parametrize("reader", ["gguf-py", "ours"])
@pytest.mark.parametrize("scheme", [None, "w4g32"])
def test_a_flipped_bit_is_found(
    reader: str, scheme: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if reader == "ours":
        request.getfixturevalue("no_gguf_py")
    write = GgufWriter.write

    def damaged(self: GgufWriter, name: str, raw: torch.Tensor) -> None:
        raw = raw.clone()
        if name == "blk.1.attn_k.weight":
            raw.reshape(-1)[40] ^= 16
        write(self, name, raw)

    monkeypatch.setattr(target.GgufWriter, "write", damaged)
    with pytest.raises(OutputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight: .* reads"):
        spicerack.export(folder("llama"), to="gguf", output=tmp_path / "m.gguf", scheme=scheme)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_floats_go_as_they_are_stored(dtype: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=dtype).save_pretrained(source)
    AutoTokenizer.from_pretrained(folder("llama")).save_pretrained(source)
    result = CliRunner().invoke(cli, ["export", str(source), "--to", "gguf", "-o", str(tmp_path / "m.gguf"), "--json"])
    written = json.loads(result.output)
    assert (written["packed"], written["exact"], written["foreign"]) == (0, True, True)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types.pop("blk.0.attn_norm.weight") == "F32"  # llama.cpp has norms in nothing else
    assert {kind for tensor, kind in types.items() if "norm" not in tensor} == {name}


def test_floats_are_exported_to_gguf_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not quantized"):
        spicerack.export(folder("llama"), to="gptq", output=tmp_path / "out")
