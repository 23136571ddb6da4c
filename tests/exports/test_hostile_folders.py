"""Folders of strangers, damaged on the disk: headers, config.json, the index, scales, zero points and orders of inputs.

Whatever is done with them ends in numbers or in one of our errors, and no folder is left of a refused import.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.errors import CheckpointError, LoadError, SpicerackError
from spicerack.models.overview import look

FORMATS = ("gptq", "awq", "mlx")
TIMES = 25
"""Folders of each format and scheme; ten thousand were tried once."""
JUNK: list[Any] = [None, True, -1, 0, 3, 7, 64, 1 << 40, -(1 << 63), 1e300, "", "4", "x" * 300, [], [4], {}, {"a": 1},
                   "gptq_v2", "affine", "nvfp4", "llama", "int32"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format and scheme -> a small model, in three files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("hostile")
    LlamaForCausalLM(config).save_pretrained(place / "float")
    made = {}
    for scheme in ("w4g32", "w4g32z"):
        spicerack.quantize(place / "float", scheme, output=place / scheme)
        for to in FORMATS:
            made[f"{to} {scheme}"] = place / f"{to}-{scheme}"
            spicerack.export(place / scheme, to=to, output=made[f"{to} {scheme}"], shard_bytes=12_000)
    return made


def damaged_json(draw: random.Random, raw: bytes) -> bytes:
    """JSON with a value replaced, added or gone somewhere, or with other bytes."""
    if draw.random() < 0.3:
        return damaged_bytes(draw, raw)
    value = json.loads(raw)
    place: Any = value
    while True:
        inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, dict | list) and v]
        if not inner or draw.random() < 0.3:
            break
        place = draw.choice(inner)
    key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
    if draw.random() < 0.2:
        del place[key]
    else:
        place[key] = draw.choice(JUNK)
    return json.dumps(value).encode()


def damaged_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Bytes changed, cut, or more of them."""
    if draw.random() < 0.2:
        return raw[: draw.randrange(len(raw) + 1)]
    if draw.random() < 0.1:
        return raw + draw.randbytes(8)
    other = bytearray(raw)
    for _ in range(draw.randrange(1, 9)):
        other[draw.randrange(len(other))] = draw.randrange(256)
    return bytes(other)


def damage(draw: random.Random, folder: Path) -> None:
    """One fault in one file."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = draw.choice([*files, folder / "config.json"])
    raw = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(damaged_json(draw, raw))
        return
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    fault = draw.randrange(4)
    if fault == 0:
        header = damaged_json(draw, header)
    elif fault == 1:
        length = draw.choice([0, length - 1, length + 8, 1 << 40, (1 << 64) - 1])
        path.write_bytes(length.to_bytes(8, "little") + header + data)
        return
    elif fault == 2:
        data = damaged_bytes(draw, data) if data else data
    else:
        parts = ("scales", "qzeros", "g_idx", "biases")
        infos = [info for name, info in json.loads(header).items() if name.rpartition(".")[2] in parts]
        if infos:
            begin, end = draw.choice(infos)["data_offsets"]
            data = data[:begin] + draw.choice([b"\xff", b"\x00", b"\x7f\x7c"]) * (end - begin) + data[end:]
            data = data[: len(raw) - 8 - len(header)]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def tried(draw: random.Random, source: Path, place: Path) -> bool:
    """A damaged copy through every door -> whether one of them refused."""
    folder, output = place / "folder", place / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(source, folder)
    damage(draw, folder)
    refused = False
    try:
        look(folder)
    except SpicerackError:
        refused = True
    try:
        spicerack.load(folder)
    except SpicerackError:
        refused = True
    try:
        spicerack.import_model(folder, output=output)
    except SpicerackError:
        refused = True
        assert not output.exists()
    assert {path.name for path in place.iterdir()} <= {"folder", "out"}
    return refused


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_folders_end_in_a_named_error_or_in_numbers(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, scheme: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "compressed_tensors" else find(name, *rest)
    )
    draw = random.Random(f"{to} {scheme}")
    assert sum(tried(draw, folders[f"{to} {scheme}"], tmp_path) for _ in range(TIMES)) > TIMES // 4


def test_a_generation_config_that_is_none_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gptq w4g32"], tmp_path / "folder")
    (tmp_path / "folder" / "generation_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"generation_config\.json is not understood"):
        spicerack.load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["gptq w4g32", "awq w4g32", "mlx w4g32"])
def test_a_layer_that_is_not_there_is_no_export(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """By its codes layers are found, so that without them nothing of the folder contradicts itself."""
    folder = shutil.copytree(folders[name], tmp_path / "damaged")
    layer, tensors = "model.layers.0.self_attn.q_proj", {}
    for path in folder.glob("*.safetensors"):
        tensors |= {key: tensor for key, tensor in load_file(path).items() if not key.startswith(layer)}
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor fills model\.layers\.0\.self_attn\.q_proj\.weight"):
        spicerack.import_model(folder, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="no tensor fills"):
        spicerack.formats(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
