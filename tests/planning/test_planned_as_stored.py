"""Models that are quantized already are planned as they are: in the bytes of their files, for who reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import spicerack
from spicerack.cli import _output, cli

gguf = pytest.importorskip("gguf")


@pytest.fixture
def out(llama_folder, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    spicerack.quantize(llama_folder(), "w4g32", output=folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> dict:
    capsys.readouterr()
    assert _output.run(cli, ["plan", str(model), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def stored(folder: Path) -> int:
    """Bytes of the tensors, as safetensors' own reader has them."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_bytes_are_those_of_the_file_in_every_format(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spicerack.export(out, to="gguf", output=tmp_path / "m.gguf")
    spicerack.export(out, to="mlx", output=tmp_path / "mlx")
    cases = [(out, "spicerack", stored(out)), (tmp_path / "mlx", "mlx", stored(tmp_path / "mlx"))]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / "M.GGUF")  # as some systems have names
    cases.append((tmp_path / "M.GGUF", "llama.cpp", sum(int(tensor.n_bytes) for tensor in reader.tensors)))
    (tmp_path / "mlx" / "spicerack.json").unlink()  # as if somebody else had written it
    for model, engine, nbytes in cases:
        device = "Apple M4" if engine == "mlx" else "Laptop, LPDDR5-6400"
        plan = planned(capsys, model, "--fit", device, "--engine", engine, "--context", "64")
        assert [row["weight_bytes"] for row in plan["rows"]] == [nbytes], engine
        assert plan["recommended"] == plan["rows"][0]["numbers"] and plan["engine"] == engine
        assert {remedy["engine"] for remedy in plan["remedies"]} <= {engine, "spicerack"}


def test_engines_that_do_not_read_it_are_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for engine, reason in (("llama.cpp", "does not read"), ("transformers", "decodes these codes")):
        assert _output.run(cli, ["plan", str(out), "--fit", "3090", "--engine", engine]) == 2
        said = capsys.readouterr().err
        assert reason in said and "--engine" in said
