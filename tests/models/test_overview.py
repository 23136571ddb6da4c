"""`inspect`: sizes equal those of a real quantization, statistics equal scipy's, and headers are enough."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import folders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import CheckpointError
from spicerack.models import outliers
from spicerack.models.overview import look
from spicerack.numerics.scheme import parse
from spicerack.planning.model import open_model
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import Recipe, of
from spicerack.storage.reader import Checkpoint


def run(*args: str | Path) -> int:
    return _output.run(cli, list(map(str, args)))


@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w3g64", "w2g32z"])
def test_estimates_equal_what_quantize_writes(scheme: str, llama_folder: Any) -> None:
    """To the byte: padding of packed rows and the tensors that say a shape are counted, too."""
    folder = llama_folder(num_hidden_layers=2)
    estimate = {e.scheme: e for e in look(folder).estimates}[scheme]
    job = prepare(folder, Recipe(parse(scheme)))
    after = job.sizes()
    assert after.bytes_after == estimate.nbytes
    assert estimate.bits_per_weight == pytest.approx(after.bits_per_weight)
    assert not estimate.indivisible


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "mixtral", "qwen3"])
def test_estimates_of_other_families(family: str, tmp_path: Path) -> None:
    """Conv1D, fused experts stored [in, out], an unfused mixture, a tied head."""
    families.build(family).save_pretrained(tmp_path)
    estimate = next(e for e in look(tmp_path).estimates if e.scheme == "w8")
    after = prepare(tmp_path, Recipe(parse("w8"))).sizes()
    assert after.bytes_after == estimate.nbytes


def test_indivisible_widths_name_the_group_that_fits(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": (64, 172) for i in range(3)}
    folder = folders.folder(tmp_path / "m", shapes, {"model_type": "llama"})
    report = look(folder)
    for estimate in report.estimates:
        if estimate.scheme in ("w8", "ternary"):  # no groups
            assert not estimate.indivisible
            continue
        (misfit,) = estimate.indivisible
        assert (misfit.pattern, misfit.count) == ("model.layers.*.mlp.down_proj", 3)
        fitting = parse(estimate.scheme[:2] + "z" * estimate.scheme.endswith("z"))  # per row: 172 is 4 times 43
        assert misfit.remedy == f"K=172: {fitting} with --fit-groups"
        padding = 64 * (-172 * fitting.bits % 32) // 8 + 16  # rows end with a whole word, and a tensor says the shape
        assert estimate.nbytes == 3 * (fitting.stored_bits((64, 172)) // 8 + padding)


def test_counts_of_a_70b_model(tmp_path: Path) -> None:
    folder = folders.folder(tmp_path / "m", folders.llama_shapes(folders.LLAMA_70B), folders.LLAMA_70B, shards=30)
    report = look(folder)
    assert (report.parameters, report.nbytes, report.shards) == (70_553_706_496, 141_107_412_992, 30)
    assert report.types == {"BF16": (723, report.parameters, report.nbytes)}
    w4 = next(e for e in report.estimates if e.scheme == "w4g128")
    linear = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    shapes = 80 * 7 * 16  # a tensor of two numbers for each layer
    assert w4.nbytes == linear * (4 + 16 / 128) / 8 + shapes + (report.parameters - linear) * 2
    assert w4.bits_per_weight == 4.125


def test_headers_are_enough(tmp_path: Path) -> None:
    """A 70B folder in a fresh process: no torch, and at once.

    About 0.3 CPU seconds, which other work on the machine stretches to twice that at most.
    """
    folder = folders.folder(tmp_path / "m", folders.llama_shapes(folders.LLAMA_70B), folders.LLAMA_70B, shards=30)
    code = (
        "import sys; from spicerack.cli import cli, _output; code = _output.run(cli, sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(folder), "--json"], capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["parameters"] == 70_553_706_496
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_quantized_folders_show_their_schemes(llama_folder: Any, tmp_path: Path) -> None:
    """compressed-tensors and spicerack's own container: rows from the ledger, bytes as in the files."""
    folder = llama_folder(tie_word_embeddings=True)
    before = look(folder)
    for i, rules in enumerate(([], ["**.down_proj=w8", "**.embed_tokens=w8"])):
        out = tmp_path / f"out{i}"
        spicerack.quantize(folder, "w4g32", output=out, rules=rules)
        report = look(out)
        assert report.parameters == before.parameters and report.tied == before.tied and not report.estimates
        assert report.quantized == " ".join(["w4g32", "range=opt", *rules])
        assert report.nbytes == sum(t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values())
        assert [(row.pattern, row.role) for row in report.rows] == [(row.pattern, row.role) for row in before.rows]
        down = next(row for row in report.rows if row.pattern == "model.layers.*.mlp.down_proj")
        assert down.stored == ("w8" if rules else "w4g32") and down.error is not None and 0 < down.error < 0.15
        assert report.architecture == before.architecture


def test_folders_quantized_by_others(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    folder = folders.folder(tmp_path / "m", {"model.layers.0.mlp.up_proj.qweight": (8, 64)}, config, dtype="I32")
    report = look(folder)
    assert report.quantized == "gptq" and not report.estimates and report.rows[0].role == "other"


@pytest.mark.parametrize(
    "ledger", ["{}", '{"identity": {"recipe": 3}, "tensors": []}', '{"identity": 1e999}', "[]", "{"]
)
def test_damaged_ledgers(ledger: str, llama_folder: Any, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out")
    (tmp_path / "out" / "spicerack.json").write_text(ledger)
    with pytest.raises(CheckpointError, match=r"spicerack\.json"):
        look(tmp_path / "out")


@pytest.mark.parametrize("chunk", [1 << 22, 1000, 1])
def test_spreads_equal_scipy(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, and with an offset: moments by scipy, shares by counting."""
    monkeypatch.setattr(outliers, "_CHUNK", chunk)
    generator = np.random.default_rng(0)
    w = (generator.standard_t(4, size=(60, 50)) * 0.1 + 0.02).astype(np.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    (spread,) = outliers.measure(model_of(tmp_path, {name: torch.from_numpy(w)}))
    exact = w.astype(np.float64)
    z = np.abs(exact - exact.mean()) / exact.std()
    assert spread.rms == pytest.approx(np.sqrt((exact**2).mean()), rel=1e-6)
    assert spread.absmax == np.abs(w).max() and spread.worst == name
    assert spread.max_over_rms == pytest.approx(spread.absmax / spread.rms)
    assert spread.kurtosis == pytest.approx(stats.kurtosis(exact, axis=None, fisher=False), rel=1e-4)
    assert spread.beyond_4 == pytest.approx((z > 4).mean()) and spread.beyond_6 == pytest.approx((z > 6).mean())
    counts = np.bincount(np.minimum(z, 11).astype(int).ravel(), minlength=12)
    assert spread.histogram == pytest.approx(counts / w.size)
    assert spread.beyond_4 > 0  # the tails of Student's t reach there


def test_spreads_of_several_layers(tmp_path: Path) -> None:
    """Two layers of one kind: pooled rms, the worst of both by name, sizes as weights."""
    flat, spike = torch.ones(4, 8), torch.ones(12, 8)
    flat[0] = -1
    spike[0, 0] = 100.0
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    (spread,) = outliers.measure(model_of(tmp_path, dict(zip(names, (flat, spike), strict=True))))
    assert (spread.count, spread.parameters, spread.worst, spread.absmax) == (2, 128, names[1], 100.0)
    assert spread.rms == pytest.approx(np.sqrt((32 + 95 + 100**2) / 128))
    assert sum(spread.histogram) == pytest.approx(1)


def test_spreads_of_odd_tensors(tmp_path: Path) -> None:
    """Constant, zero, empty, and with NaN and infinities: counted, named, and in no average."""
    odd = torch.full((4, 8), 0.5)
    odd[1, 2], odd[3, 4] = float("nan"), float("-inf")
    tensors = {
        "a.odd_proj.weight": odd,
        "b.zero_proj.weight": torch.zeros(4, 8),
        "c.none_proj.weight": torch.zeros(0, 8),
        "d.lost_proj.weight": torch.full((2, 2), float("nan")),
        "e.norm.weight": torch.ones(8),
        "f.codes_proj.weight": torch.ones(4, 8, dtype=torch.int32),
    }
    spreads = {spread.pattern: spread for spread in outliers.measure(model_of(tmp_path, tensors))}
    assert set(spreads) == {"a.odd_proj", "b.zero_proj", "d.lost_proj"}
    assert (spreads["a.odd_proj"].nonfinite, spreads["a.odd_proj"].rms, spreads["a.odd_proj"].kurtosis) == (2, 0.5, 0.0)
    assert (spreads["b.zero_proj"].rms, spreads["b.zero_proj"].max_over_rms) == (0.0, 0.0)
    assert (spreads["d.lost_proj"].nonfinite, spreads["d.lost_proj"].parameters) == (4, 0)
    assert json.dumps([spread.rms for spread in spreads.values()], allow_nan=False)


def model_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mystery"}')
    return Checkpoint.open(folder)


@pytest.mark.slow
def test_weights_in_bounded_memory(tmp_path: Path) -> None:
    """A tensor of 200 MB is measured in chunks."""
    folder = folders.folder(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight": (12_000, 4096)}, {}, dtype="F32")
    code = f"""
import resource, torch
from spicerack.storage.reader import Checkpoint
from spicerack.models.outliers import measure
checkpoint = Checkpoint.open({str(folder)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure(checkpoint)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, "MiB"


def test_one_json_object(llama_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", llama_folder(), "--weights", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {
        "folder",
        "architecture",
        "parameters",
        "bytes",
        "types",
        "rows",
        "tied",
        "estimates",
        "weights",
    } <= result.keys()
    assert result["types"]["F32"].keys() == {"tensors", "parameters", "bytes"}
    assert result["estimates"][0].keys() >= {"scheme", "bytes", "bits_per_weight", "indivisible"}
    assert len(result["weights"]) == 9 and len(result["weights"][0]["histogram"]) == 12


@pytest.mark.parametrize("columns", [80, 120])
def test_fits_the_terminal(
    columns: int, llama_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = llama_folder()
    spicerack.quantize(folder, "w4g32", output=tmp_path / "out")
    capsys.readouterr()
    for model in (folder, tmp_path / "out"):
        assert run("inspect", model, "--weights") == 0
        shown = capsys.readouterr().out
        assert "model.layers.*.mlp.down_proj" in shown
        assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= columns


def test_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "[red]x[/red]", "architectures": ["[/bold]"]}
    folder = folders.folder(tmp_path / "m", {"[blink].up_proj.weight": (8, 8)}, config, dtype="F32")
    assert run("inspect", folder, "--weights") == 0
    shown = capsys.readouterr().out
    assert "[red]x[/red]" in shown and "[/bold]" in shown and "[blink].up_proj" in shown


def test_errors_have_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tmp_path / "none", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"] == "CheckpointError"


@pytest.mark.parametrize("sections", [["quantization"], ["quantization", "quantization_config"]], ids=len)
def test_mlx_names_no_method(sections: list[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", **{section: {"group_size": 32, "bits": 4} for section in sections}}
    folder = folders.folder(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight": (8, 64)}, config, dtype="I32")
    assert look(folder).quantized == "mlx"
    for refused in (lambda: prepare(folder, of("w8", ())), lambda: open_model(folder)):
        with pytest.raises(CheckpointError, match="quantized already, with mlx"):
            refused()
