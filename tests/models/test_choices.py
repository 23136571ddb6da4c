"""`spicerack kernels`: the table of this machine, and for each layer of a folder the row that `load` would choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder, kernel_here

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.kernels import kernel, panels
from spicerack.kernels.kernel import Compute
from spicerack.models import choices
from spicerack.nn.weight import PackedWeight
from spicerack.numerics.scheme import parse
from spicerack.storage.reader import Checkpoint

MLP = "model.layers.*.mlp"


def quantized(llama_folder: LlamaFolder, out: Path, scheme: str, *rules: str, **settings: Any) -> Path:
    spicerack.quantize(llama_folder(**settings), scheme, output=out, rules=rules)
    return out


def command(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 0) -> str:
    assert _output.run(cli, ["kernels", *map(str, args)]) == code
    return capsys.readouterr().out


def test_the_table_has_every_kernel_and_says_why_some_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in choices.rows()}
    assert list(rows) == [row.name for row in kernel.table()]
    monkeypatch.setattr(panels, "NAMES", ("scalar",))
    rows = choices.rows()
    assert [row.name for row in rows if row.obstacle is None] == ["int8_scalar", "float_scalar", "reference"]
    assert all(row.compute == "float" for row in rows if not row.name.startswith(("int8", "ternary")))
    for row in rows[:-1]:
        engine = row.name.partition("_")[2]
        assert engine == "scalar" or (row.obstacle is not None and row.obstacle.endswith(f"has no {engine}"))


@pytest.mark.parametrize("compute", [None, "int8", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_told_is_what_load_chooses(
    llama_folder: LlamaFolder, tmp_path: Path, dtype: torch.dtype, compute: Compute | None
) -> None:
    """All kinds at once: embedding and head, groups, activations, a table of levels."""
    rules = ("model.embed_tokens=w8", "**.down_proj=nf4", "**.1.mlp.up_proj=w8a8", "**.v_proj=w3")
    out = quantized(llama_folder, tmp_path / "out", "w4g32z", *rules, dtype=dtype)
    lines = choices.layers(out, compute)
    model = spicerack.load(out, compute=compute)
    loaded: dict[tuple[object, ...], int] = {}
    for layer in model.modules():
        if isinstance(layer, PackedWeight):
            chosen = layer.choice
            reasons = tuple(chosen.passed_over.items())
            key = (layer.scheme.name, layer.shape, str(layer.dtype)[6:], chosen.kernel.name, reasons)
            loaded[key] = loaded.get(key, 0) + 1
    counted: dict[tuple[object, ...], int] = {}
    for some in lines:
        key = (some.scheme, some.shape, some.dtype, some.kernel, tuple(some.passed_over.items()))
        counted[key] = counted.get(key, 0) + some.count
    assert counted == loaded and sum(counted.values()) == 15


def test_layers_of_a_kind_are_one_line(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    out = quantized(llama_folder, tmp_path / "out", "w4g32", "**.1.mlp.down_proj=w8", num_hidden_layers=3)
    lines = [(some.pattern, some.count, some.scheme, some.shape) for some in choices.layers(out)]
    assert len(lines) == 8
    assert (f"{MLP}.up_proj", 3, "w4g32", (128, 64)) in lines
    assert (f"{MLP}.down_proj", 2, "w4g32", (64, 128)) in lines and (f"{MLP}.down_proj", 1, "w8", (64, 128)) in lines


def test_a_table_of_levels_gets_the_reference_and_every_reason(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    out = quantized(llama_folder, tmp_path / "out", "nf4")
    lines = choices.layers(out)
    assert {some.kernel for some in lines} == {"reference"}
    others = [row.name for row in kernel.table() if row.name != "reference"]
    for some in lines:
        assert list(some.passed_over) == others
        assert some.passed_over["int8_scalar"] == "its levels are a table, not integers"


def test_the_type_of_inputs_is_the_models(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    """compressed-tensors has float16 scales for float32 models, too: only config.json tells."""
    out = quantized(llama_folder, tmp_path / "out", "w4g32", dtype=torch.float16)
    assert {some.dtype for some in choices.layers(out)} == {"float16"}


@pytest.mark.parametrize("scheme", ["w4g32", "nf4"])  # one folder of each format
def test_no_weight_is_read(
    llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    out = quantized(llama_folder, tmp_path / "out", scheme)
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), original(self, name))[1])
    assert choices.layers(out)
    assert all(name.endswith(".weight_shape") for name in read)  # two integers


def test_json_is_one_object(llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(command(capsys, "--json"))
    assert table.keys() == {"kernels"}
    assert [set(row) for row in table["kernels"]] == [{"name", "compute", "obstacle", "runs"}] * len(kernel.table())
    assert table["kernels"][-1] == {"name": "reference", "compute": "float", "obstacle": None, "runs": True}
    out = quantized(llama_folder, tmp_path / "out", "w4g32")
    result = json.loads(command(capsys, out, "--compute", "float", "--json"))
    assert (result["folder"], result["compute"], result["kernels"]) == (str(out), "float", table["kernels"])
    choice = kernel.pick(parse("w4g32"), (128, 64), torch.float32, torch.device("cpu"), "float")
    assert {
        "pattern": f"{MLP}.up_proj",
        "count": 2,
        "scheme": "w4g32",
        "shape": [128, 64],
        "dtype": "float32",
        "kernel": choice.kernel.name,
        "passed_over": choice.passed_over,
    } in result["layers"]
    assert "float was asked for" in "".join(choice.passed_over.values())


def test_what_people_read(
    llama_folder: LlamaFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = command(capsys).splitlines()
    assert [line.split()[0] for line in lines[1:] if line.partition(" ")[0].count("_")] == [
        row.name for row in kernel.table()[:-1]
    ]
    assert ["reference", "float", "yes"] in [line.split() for line in lines]
    out = quantized(llama_folder, tmp_path / "out", "w4g32", "**.down_proj=nf4")
    shown = command(capsys, out)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"{MLP}.up_proj 2 128x64 w4g32 float32 {kernel_here('w4g32')}" in lines
    assert f"{MLP}.down_proj 2 64x128 nf4 float32 reference" in lines
    assert "reference for nf4; faster ones were passed over:" in lines
    assert any("int8_scalar" in line and line.endswith("levels are a table, not integers") for line in lines)


def test_a_float_folder_has_nothing_to_choose(llama_folder: LlamaFolder, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_folder()
    assert "nothing is quantized" in command(capsys, model)
    assert json.loads(command(capsys, model, "--json"))["layers"] == []


def test_wrong_input_is_named(tmp_path: Path, llama_folder: LlamaFolder, capsys: pytest.CaptureFixture[str]) -> None:
    error = json.loads(command(capsys, tmp_path, "--json", code=2))
    assert error["error"] == "CheckpointError" and str(tmp_path) in error["message"] and error["hint"]
    error = json.loads(command(capsys, tmp_path / "none", "--json", code=2))
    assert error["error"] == "CheckpointError" and "none" in error["message"]
    error = json.loads(command(capsys, "--compute", "float", "--json", code=2))
    assert error["error"] == "UsageError" and "no OUT is given" in error["message"]
    error = json.loads(command(capsys, tmp_path, "--compute", "int4", "--json", code=2))
    assert error["error"] == "UsageError" and "int4" in error["message"]
    with pytest.raises(UsageError, match="compute='int4'"):
        choices.layers(quantized(llama_folder, tmp_path / "out", "w8"), "int4")  # type: ignore[arg-type]
