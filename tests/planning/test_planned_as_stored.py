"""Models that are quantized already are planned as they are: in the bytes of their files, for who reads them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open

import spicerack
from spicerack.cli import _output, cli
from spicerack.storage import ledger, records

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


KL = {
    "compute": "int8/bfloat16", "text": "heldout.txt", "windows": 16, "window": 256, "tokens": 4080, "kl_mean": 0.0475,
    "kl_mean_ci95": [0.0454, 0.0496], "kl_p999": 1.0, "kl_noise_floor": None, "perplexity": 9.0,
    "perplexity_reference": 8.8, "top1_agreement": 0.88,
}  # fmt: skip
COSINE = {
    "compute": "int8/float32", "text": "s.txt", "tokens": 99, "sentences": 9, "cosine_mean": 0.96, "cosine_min": 0.9,
    "cosine_mean_ci95": [0.95, 0.97], "cosine_noise_floor": None, "spearman": None,
}  # fmt: skip


def test_a_loss_that_was_measured_stands_in_place_of_a_typical_one(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that measured it eval counts, then the check behind quantize, then the rounds of a budget; not what was
    read through a quantized cache, and not a record of another ledger."""
    words = ("--fit", "Laptop, LPDDR5-6400", "--context", "64")

    def loss() -> tuple:
        (row,) = planned(capsys, out, *words)["rows"]
        lost = row["measured_loss"]
        return (row["expected_loss"], lost and (lost["metric"], lost["ci95"], lost["tokens"], lost["by"]))

    typical = loss()
    assert typical[0] > 0.01 and typical[1] is None
    written = ledger.read(out)
    assert written is not None
    rounds = [{"measured": 5.0}, {"measured": 0.09, "interval": [0.08, 0.1], "tokens": 7}]
    chosen = dataclasses.replace(written, budget={"metric": "kl", "rounds": rounds})
    (out / "spicerack.json").write_bytes(chosen.content())
    assert loss() == (0.09, ("kl", [0.08, 0.1], 7, "the run that chose its numbers"))
    ledger.keep_check(out, KL)
    assert loss() == (0.0475, ("kl", [0.0454, 0.0496], 4080, "the check behind quantize"))
    records.keep(out, "eval", {**KL, "kl_mean": 0.05, "cache": 8})
    assert loss()[0] == 0.0475
    records.keep(out, "eval", COSINE)
    mean, (metric, ends, tokens, by) = loss()
    assert (mean, metric, tokens, by) == (pytest.approx(0.04), "cosine", 99, "spicerack eval")
    assert ends == pytest.approx([0.03, 0.05])
    monkeypatch.setenv("COLUMNS", "80")
    assert _output.run(cli, ["plan", str(out), *words]) == 0
    said = capsys.readouterr().out
    assert "0.04 (0.03 to 0.05, 95 %) on 99 tokens of s.txt" in said and "of plain rounding" not in said
    assert all(len(line) <= 80 for line in said[said.index("numbers") : said.index("\n\nRec")].splitlines())
    records.keep(out, "eval", {**KL, "kl_mean": "a lot"})
    assert _output.run(cli, ["plan", str(out), *words]) == 2
    assert "eval.json is damaged" in capsys.readouterr().err
    (out / "eval.json").unlink()
    (out / "spicerack.json").write_bytes(written.content())
    assert loss() == typical


def test_a_mix_has_a_name_that_fits_and_a_file_its_own(
    llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = tmp_path / "mix"
    rules = ["**.q_proj=w8", "**.k_proj=w6", "**.layers.0.**.v_proj=w5"]
    spicerack.quantize(llama_folder("m"), "w4g32", output=mix, rules=rules)
    assert planned(capsys, mix, "--fit", "Laptop, LPDDR5-6400")["recommended"] == "w4g32, w6, w8 ..."
    spicerack.quantize(tmp_path / "m", "w8g32", output=tmp_path / "eight")
    spicerack.export(tmp_path / "eight", to="gguf", output=tmp_path / "my model.gguf")
    (flags,) = planned(capsys, tmp_path / "my model.gguf", "--fit", "3090")["flags"]
    assert shlex.split(flags)[:3] == ["llama-server", "-m", str(tmp_path / "my model.gguf")]
