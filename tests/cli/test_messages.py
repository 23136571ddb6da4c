"""What people type is told back, and what they get wrong is answered with what helps."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file

from spicerack.cli import _demo, _output, _rules, cli, demo, kernels
from spicerack.errors import CheckpointError, UsageError
from spicerack.evaluation import check
from spicerack.evaluation.opening import Opening
from spicerack.evaluation.timing import Speed, Timing
from spicerack.runtime import hf
from spicerack.runtime.generate import GenerateOptions, generate
from spicerack.storage import files


def in_process(*args: str | Path) -> int:
    return _output.run(cli, list(map(str, args)))


def test_names_of_others_are_told_back_once(llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_folder()
    words = ["quantize", model, "-o", tmp_path / "out", "--scheme", "INT8", "--set", "**.down_proj=q4_0", "--dry-run"]
    assert in_process(*words) == 0
    said = capsys.readouterr().out
    assert said.count("INT8 is w8 here") == 1 and said.count("q4_0 is w4g32 here") == 1
    assert in_process(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"][:2] == ["INT8 is w8 here", "q4_0 is w4g32 here"]
    assert _rules.renamed(("w8", "W4G128", None, "*=skip", "lm_head=w8")) == ()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("1.5GB", 1_500_000_000), ("500MB", 5 * 10**8), ("7", 7), ("0.5kb", 500), ("1TB", 10**12), ("2 GiB", 2 << 30)],
)
def test_sizes(typed: str, meant: int) -> None:
    assert _output.nbytes(click.Context(cli), cli, typed) == meant


@pytest.mark.parametrize("typed", ["0", "0.0GB", "1,5GB", "GB", "-1GB", "1.5.2GB"])
def test_what_is_no_size(typed: str) -> None:
    with pytest.raises(click.BadParameter):
        _output.nbytes(click.Context(cli), cli, typed)


def test_what_is_to_be_pasted_is_quoted(llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_folder("a model")
    assert in_process("quantize", model, "-o", tmp_path / "an out's", "--scheme", "w8", "--no-check") == 0
    words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    assert words == ["spicerack", "eval", str(tmp_path / "an out's"), "--against", str(model), "--text", "FILE"]
    assert shlex.split(check._command(tmp_path / "an out's", model) or "") == words


def test_names_are_broken_at_their_dots(llama_folder, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert in_process("quantize", llama_folder(), "-o", tmp_path / "out", "--scheme", "w8") == 0
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "60")
    assert in_process("kernels", tmp_path / "out") == 0
    assert "layers" in capsys.readouterr().out
    assert kernels._broken("decoder.block.*.layer.*.SelfAttention.k") == "decoder.block.*.layer.*\n  .SelfAttention.k"


def test_nothing_is_left_of_what_cannot_be_written(llama_folder, tmp_path: Path, capsys: Any) -> None:
    model = llama_folder()
    assert in_process("quantize", model, "-o", tmp_path / ("x" * 300), "--scheme", "w8") == 2
    assert "File name too long" in capsys.readouterr().err
    assert in_process("quantize", model, "-o", "", "--scheme", "w8") == 2
    assert in_process("quantize", model, "-o", tmp_path / "out", "--scheme", "w8") == 0
    assert in_process("report", tmp_path / "out", "-o", tmp_path / "out") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_folder_of_models_names_them(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="a folder of models, unet, vae") as raised:
        files.find(tmp_path)
    assert str(tmp_path / "unet") in raised.value.hint


def test_a_model_of_timm_is_sent_to_the_way_that_works(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a resnet18 of timm") as raised:
        hf.config_and_class({"architecture": "resnet18", "pretrained_cfg": {}}, tmp_path)
    assert "into=timm.create_model('resnet18')" in raised.value.hint


def test_narrow_layers_stop_training_before_its_text_is_read(
    llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", llama_folder(), "-o", tmp_path / "out", "--scheme", "w4g96", "--data", tmp_path / "missing.txt"]
    assert in_process(*words) == 2
    said = capsys.readouterr().err
    assert "not divisible" in said and "--fit-groups" in said and "rules=[" not in said
    assert in_process(*words, "--fit-groups", "--length", "32") == 2
    assert "missing.txt" in capsys.readouterr().err


def test_a_missing_tokenizer_is_told_in_a_whole_sentence(
    stdlib_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(stdlib_lm / name)
    assert in_process("generate", tmp_path, "hello") == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "has no tokenizer: " in error and not error.rstrip().endswith((":", "of"))


def test_choices_among_tokens_need_a_temperature(llama_folder) -> None:
    with pytest.raises(UsageError, match="no effect at temperature 0"):
        generate(llama_folder(), "a", GenerateOptions(top_p=0.9))


def test_choices_among_tokens_reach_transformers(stdlib_lm: Path) -> None:
    """Among one token sampling is taking the likeliest."""
    options = GenerateOptions(max_new_tokens=8)
    likeliest = generate(stdlib_lm, "def f(", options).text
    for only in ({"top_k": 1}, {"top_p": 1e-6}):
        assert generate(stdlib_lm, "def f(", replace(options, temperature=5.0, **only)).text == likeliest


def outcome(label: str, compute: str, mine: tuple[float, float], original: tuple[float, float]) -> _demo.Outcome:
    def timing(least: float, most: float) -> Timing:
        speed = Speed((least + most) / 2, least, most)
        return Timing(label, compute, {"items_per_s": speed}, 1, 1, None, Opening(0.1, 0.1, None))

    nothing: Any = None
    return _demo.Outcome(label, 1, timing(*mine), timing(*original), nothing, None, "")


def test_the_demo_blames_kernels_for_what_is_theirs() -> None:
    """A loaded machine makes rounds uneven, of both: only what was behind in every round is slower."""
    loaded = outcome("w8", "int8_avx2/float32", (50, 110), (90, 130))
    assert list(demo._slower([loaded])) == []
    slow = outcome("nf4", "reference/float32", (10, 20), (90, 130))
    behind = outcome("w4", "int8_avx2/float32", (70, 80), (90, 130))
    blamed, other = demo._slower([loaded, behind, slow])
    assert "nf4" in blamed and "spicerack kernels" in blamed and "w4" in other and "kernels" not in other


def test_the_demo_says_what_it_does_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(subject: object, output: Path, report: Any) -> list[_demo.Outcome]:
        report("MiniLM, w8: quantizing")
        report("MiniLM, w8: evaluating")
        return []

    subject = _demo.Subject("a model", tmp_path, False, ())
    monkeypatch.setattr(_demo, "subjects", lambda: (subject,))
    monkeypatch.setattr(_demo, "run", run)
    assert in_process("demo", "--json") == 0
    assert capsys.readouterr().err.splitlines() == ["MiniLM, w8: quantizing", "MiniLM, w8: evaluating"]
