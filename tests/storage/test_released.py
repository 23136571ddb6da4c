"""Releases in FP8 and MXFP4 as sources: decoded as transformers decodes them, and refused where they do not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import LlamaFolder
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import spicerack
from spicerack.cli import cli
from spicerack.errors import CheckpointError, UsageError
from spicerack.evaluation import folder as folder_module
from spicerack.machine import memory
from spicerack.models import overview
from spicerack.storage import released
from spicerack.storage.reader import Checkpoint
from spicerack.text.calibration import Calibration

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 48], "fmt": "e4m3", "activation_scheme": "dynamic"}
FLOATS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}


def is_layer(name: str) -> bool:
    return name.endswith("_proj.weight")


def in_blocks(w: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and float32 scales for blocks, those at the edges smaller, as DeepSeek's program makes them."""
    n, k = w.shape
    padded = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns)
    padded[:n, :k] = w.float()
    tiles = padded.view(len(padded) // rows, rows, -1, columns)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
    return (tiles / scale[:, None, :, None]).view_as(padded)[:n, :k].to(FP8).contiguous(), scale


def written(folder: Path, tensors: Tensors, section: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section, "dtype": "bfloat16"}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def blocks_of(folder: Path) -> tuple[Path, Tensors]:
    """A Llama as Qwen and DeepSeek release theirs, and what transformers makes of each weight."""
    tensors, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if is_layer(name)]:
        codes, scale = in_blocks(tensors[name], 32, 48)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        floats[name] = _dequantize_fp8_weight(codes, scale, [32, 48], torch.float32).to(torch.bfloat16)
    return written(folder, tensors, BLOCKS), floats


def per_tensor_of(folder: Path) -> tuple[Path, Tensors]:
    tensors, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if is_layer(name)]:
        codes, scale = (tensors[name] * 1000).to(FP8), torch.tensor(0.001)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
        floats[name] = _dequantize_fp8_weight(codes, scale, None, torch.float32).to(torch.bfloat16)
    return written(folder, tensors, BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}), floats


def by_row_of(folder: Path) -> tuple[Path, Tensors]:
    """As llm-compressor writes FP8-dynamic: bfloat16 scales of rows, whose products bfloat16 rounds once."""
    tensors, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if is_layer(name)]:
        scale = (tensors[name].abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
        codes = (tensors[name] / scale.float()).to(FP8)
        tensors[name], tensors[f"{name}_scale"] = codes, scale
        floats[name] = codes.to(torch.bfloat16) * scale
    return written(folder, tensors, FLOATS), floats


RELEASES: dict[str, Callable[[Path], tuple[Path, Tensors]]] = {
    "blocks": blocks_of, "tensor": per_tensor_of, "rows": by_row_of
}  # fmt: skip


@pytest.mark.parametrize("piece", [1, 200, 1 << 24])
@pytest.mark.parametrize("kind", RELEASES)
def test_fp8_is_read_as_transformers_reads_it(
    kind: str, piece: int, llama_folder: LlamaFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released, "_PIECE", piece)
    folder, floats = RELEASES[kind](llama_folder(hidden_size=80, intermediate_size=112, num_attention_heads=5,
                                                 num_key_value_heads=5))  # fmt: skip
    source = released.decoded(Checkpoint.open(folder))
    assert "quantization_config" not in source.config and not [n for n in source.tensors if "scale" in n]
    for some in (source, source.held()):
        for name, exact in floats.items():
            assert source.tensors[name].dtype == "BF16" and source.tensors[name].shape == exact.shape
            assert torch.equal(some.read(name), exact)
            assert torch.equal(some.read_rows(name, 3, 37), exact[3:37]) and torch.equal(
                some.read_rows(name, 70, 999), exact[70:]
            )
            some.release(name)
    report = overview.look(folder)
    assert report.quantized is None and "in FP8, decoded" in " ".join(report.notes) and report.estimates


@pytest.mark.parametrize("kind", RELEASES)
def test_a_release_quantizes_as_what_it_stands_for(kind: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder, floats = RELEASES[kind](llama_folder("release"))
    plain = llama_folder("plain", dtype=torch.bfloat16)
    save_file(load_file(plain / "model.safetensors") | floats, plain / "model.safetensors", {"format": "pt"})
    release = load_file(folder / "model.safetensors")  # what is no layer stays float32 there
    same = {
        name: release[name] if name in release and name not in floats else floats[name]
        for name in load_file(plain / "model.safetensors")
    }
    save_file(same, plain / "model.safetensors", {"format": "pt"})
    for source, out in ((folder, "a"), (plain, "b")):
        spicerack.quantize(source, "w4g16", output=tmp_path / out)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert 'quant_method": "fp8' not in (tmp_path / "a" / "config.json").read_text()
    entries = json.loads((tmp_path / "a" / "spicerack.json").read_text())
    assert "decoded from F8_E4M3" in json.dumps(entries)
    model = spicerack.load(tmp_path / "a")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("kind", RELEASES)
@torch.no_grad()
def test_a_release_is_what_others_are_compared_with(kind: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    """Loaded it is a float model of the decoded weights, and what was made of it can be compared with it."""
    folder, floats = RELEASES[kind](llama_folder("release"))
    model = spicerack.load(folder)
    state = model.state_dict()
    assert all(torch.equal(state[name].to(torch.bfloat16), exact) for name, exact in floats.items())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert not hasattr(model.config, "quantization_config")
    spicerack.quantize(folder, "w8", output=tmp_path / "out")
    folder_module.check_sides(tmp_path / "out", folder, "eval")
    with pytest.raises(UsageError, match="is quantized itself"):
        folder_module.check_sides(folder, tmp_path / "out", "eval")


def gpt_oss(folder: Path) -> tuple[Path, Tensors]:
    config = GptOssConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"],
        max_position_embeddings=64,
    )  # fmt: skip
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 124, blocks.shape[:-1], dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        floats[name] = convert_moe_packed_tensors(blocks, scales)
    assert len(floats) == 2
    return written(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}), floats


@pytest.mark.parametrize("piece", [100, 1 << 24])
def test_mxfp4_is_read_as_transformers_reads_it(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "_PIECE", piece)
    folder, floats = gpt_oss(tmp_path / "oss")
    source = released.decoded(Checkpoint.open(folder))
    for name, exact in floats.items():
        assert torch.equal(source.read(name), exact) and torch.equal(source.read_rows(name, 1, 3), exact[1:3])
    spicerack.quantize(folder, "w8", output=tmp_path / "out")
    assert "decoded from MXFP4" in (tmp_path / "out" / "spicerack.json").read_text()
    with torch.no_grad():
        assert torch.isfinite(spicerack.load(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("kind", ["blocks", "mxfp4"])
def test_a_release_is_calibrated(kind: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    """By what flows through the decoded model, with the events of decoding and of calibration in the ledger."""
    folder, _ = gpt_oss(tmp_path / "oss") if kind == "mxfp4" else blocks_of(llama_folder("release"))
    ids = torch.randint(3, 90, (8, 24), generator=torch.Generator().manual_seed(0))
    text = Calibration(ids, None, "of no text", 0.0, "made up")
    for out, method in (("rounded", "rtn"), ("calibrated", "gptq")):
        spicerack.quantize(folder, "w4g16", output=tmp_path / out, method=method, calibration=text)
    rounded, solved = (json.loads((tmp_path / out / "spicerack.json").read_text()) for out in ("rounded", "calibrated"))
    assert "decoded from" in json.dumps(solved)
    assert rounded != solved


HOSTILE: dict[str, Callable[[Tensors, str], object]] = {
    "missing scale": lambda t, name: t.pop(f"{name}_scale_inv"),
    "scale of another shape": lambda t, name: t.update({f"{name}_scale_inv": torch.ones(7, 3)}),
    "scale turned round": lambda t, name: t.update({f"{name}_scale_inv": t[f"{name}_scale_inv"].t().contiguous()}),
    "scale of integers": lambda t, name: t.update({f"{name}_scale_inv": t[f"{name}_scale_inv"].int()}),
    "a vector": lambda t, name: t.update({name: torch.ones(64).to(FP8)}),
    "nothing": lambda t, name: t.update({name: torch.ones(0, 64).to(FP8)}),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_what_does_not_fit_is_refused_by_name(how: str, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder, _ = blocks_of(llama_folder())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    HOSTILE[how](tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj") as raised:
        spicerack.quantize(folder, "w8", output=tmp_path / "out")
    assert ("scales are missing" in raised.value.message) == (how == "missing scale")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [[128], [0, 128], ["a", 1], "128", [True, 1]])
def test_block_sizes_are_two_positive_numbers(size: Any, llama_folder: LlamaFolder) -> None:
    folder, _ = blocks_of(llama_folder())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weight_block_size"):
        released.decoded(Checkpoint.open(folder))


_DECODES = """
import sys, threading, time
from spicerack.machine.memory import anonymous_bytes
from spicerack.storage import released
from spicerack.storage.reader import Checkpoint

checkpoint = released.decoded(Checkpoint.open(sys.argv[1]))
largest = max(info.numel for info in checkpoint.tensors.values())
checkpoint.read(list(checkpoint.tensors)[0])  # torch is there, and its threads
begin, most, done = anonymous_bytes(), 0, False

def look():
    global most
    while not done:
        most = max(most, anonymous_bytes() - begin)
        time.sleep(0.0005)

watching = threading.Thread(target=look)
watching.start()
total = 0
for name, info in checkpoint.tensors.items():
    total += info.nbytes
    checkpoint.read(name)
    checkpoint.read_rows(name, 0, 64)
    checkpoint.release(name)
done = True
watching.join()
print(most, largest, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(memory.anonymous_bytes() is None, reason="Linux alone tells")
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_decoding_takes_the_memory_of_one_tensor(tmp_path: Path, kind: str) -> None:
    """Of thirty: result, one piece in float32 and its product, four times the largest tensor in float32; half of that
    more is what the allocator has not given back yet."""
    tensors: Tensors = {}
    for number in range(30):
        if kind == "fp8":
            tensors[f"layers.{number}.up_proj.weight"] = torch.zeros(1024, 2048).to(FP8)
            tensors[f"layers.{number}.up_proj.weight_scale_inv"] = torch.ones(8, 16)
        else:
            blocks = torch.zeros(8, 512, 16, 16, dtype=torch.uint8)
            tensors[f"layers.{number}.experts.down_proj_blocks"] = blocks
            tensors[f"layers.{number}.experts.down_proj_scales"] = torch.full(blocks.shape[:-1], 127, dtype=torch.uint8)
    section = {"quant_method": "mxfp4"} if kind == "mxfp4" else {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text("{}")
    folder = written(tmp_path, tensors, section)
    run = subprocess.run([sys.executable, "-c", _DECODES, folder], capture_output=True, text=True, check=True)
    most, largest, total = map(int, run.stdout.split())
    assert total > 14 * largest * 4
    assert most < 6 * largest * 4


def test_sizes_are_told_as_stored_and_as_decoded(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder, _ = blocks_of(llama_folder())
    held = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    result = spicerack.quantize(folder, "w4g32", output=tmp_path / "out")
    assert result["bytes_stored"] == held < result["bytes_before"]
    assert any("the files hold" in note and "decoded" in note for note in result["notes"])
    words = ["quantize", str(folder), "-o", str(tmp_path / "dry"), "--scheme", "w4g32", "--dry-run"]
    told = CliRunner().invoke(cli, words, catch_exceptions=False).output
    assert re.search(r"smaller \(as stored .* times\); ", told)
    plain = spicerack.quantize(llama_folder("float"), "w4g32", output=tmp_path / "plain")
    assert plain["bytes_stored"] == plain["bytes_before"]
