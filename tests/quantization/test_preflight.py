"""The trial before the work: models cut to their first blocks, what is compared, what a broken writer does to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from calibrations import Watching, text
from click.testing import CliRunner
from conftest import LlamaFolder
from safetensors.torch import load_file

import spicerack
from spicerack.algorithms.method import Method
from spicerack.algorithms.method import parse as parse_method
from spicerack.cli import cli
from spicerack.errors import LoadError
from spicerack.numerics import rounding
from spicerack.numerics.scheme import parse
from spicerack.quantization import preflight
from spicerack.quantization.job import prepare
from spicerack.quantization.preflight import Trial
from spicerack.quantization.recipe import Recipe, decided, rule
from spicerack.quantization.run import execute
from spicerack.storage.formats.compressed_tensors import FORMAT
from spicerack.storage.reader import Checkpoint

DEPTHS = {"gpt2": "n_layer"}


def deep(family: str, folder: Path, blocks: int = 8) -> Path:
    """A model of the family with that many blocks."""
    config_class, settings, model_class = families.FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**settings, DEPTHS.get(family, "num_hidden_layers"): blocks})
    getattr(transformers, model_class)(config).save_pretrained(folder)
    return folder


def run(source: Path, output: Path, scheme: str = "w4g8", chain: str = "rtn", **named: Any) -> list[Trial]:
    trials: list[Trial] = []
    recipe = Recipe(parse(scheme), method=parse_method(chain)).then(map(rule, named.pop("rules", ())))
    result = execute(
        prepare(source, decided(recipe, True)), output, calibration=text(**named), watch=Watching(tried=trials.append)
    )
    assert not (output / "preflight").exists() and result.sizes.bytes_after
    return trials


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme", "chain"),
    [
        ("llama", "w4g8", "rtn"), ("llama", "w8a8", "smoothquant+gptq"), ("llama", "w2g8h", "hadamard+rtn"),
        ("gpt2", "w4g8", "rtn"), ("bert", "w4g8z", "rtn"), ("qwen3", "w4g8", "awq"), ("gemma3-text", "w4g8", "rtn"),
        ("mixtral", "w4g8", "rtn"), ("gpt_oss", "w4g8", "rtn"), ("deepseek_v3", "w4g8", "rtn"),
        ("llama", "w8a8s", "gptq"),
    ],
)  # fmt: skip
def test_what_is_written_computes_what_was_computed(family: str, scheme: str, chain: str, tmp_path: Path) -> None:
    source = deep(family, tmp_path / "float")
    (trial,) = run(source, tmp_path / "out", scheme, chain, padded=family == "bert")
    assert (trial.blocks, trial.count) == (2, 8)
    assert trial.solver == chain.split("+")[-1].replace("awq", "rtn")
    assert trial.expected is not None and trial.expected > 0 and trial.rounded > 0
    assert trial.difference < (preflight.SAME if "a8" in scheme else 1e-4) and 0 < trial.error < 1


def test_what_a_run_will_take_grows_with_the_text_and_the_blocks() -> None:
    """A block takes 3 s and 1 s a sequence: so many blocks and sequences take exactly that."""
    assert preflight.expect(32, 128, (2, 6), (5.0, 9.0)) == 32 * (3 + 128)
    assert preflight.expect(32, 128, (2, 6), (5.0, 4.9)) == 32 * 4.9  # text costs nothing: within what clocks tell


@pytest.mark.slow
def test_it_is_said_before_the_first_block_and_what_would_be_quicker(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source, words = llama_folder(num_hidden_layers=8), tmp_path / "text.txt"
    words.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    common = [
        "quantize",
        str(source),
        "--no-check",
        "--scheme",
        "w3g32",
        "--calib",
        str(words),
        "--length",
        "16",
        "--samples",
        "12",
    ]
    for effort, said in (
        ("normal", r"expected: about \S+ \w+ for 8 blocks; about \S+ \w+ rounded without --calib"),
        ("high", r"expected: .* to .* for 8 blocks; gptq takes about .* rounded without --calib"),
    ):
        words_ = [*common, "-o", str(tmp_path / effort), "--effort", effort]
        told = CliRunner().invoke(cli, words_, catch_exceptions=False).output
        place = re.search(said, told)
        assert place and told.index("preflight:") < place.start() < told.index("model.layers.0:"), told


def test_small_models_and_runs_that_continue_are_not_tried(tmp_path: Path) -> None:
    assert run(deep("llama", tmp_path / "small", 5), tmp_path / "a") == []
    source = deep("llama", tmp_path / "float")
    job = prepare(source, decided(Recipe(parse("w4g8")), True))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, tmp_path / "out", calibration=text(), watch=Watching(finished=stop))
    trials: list[Trial] = []
    execute(job, tmp_path / "out", calibration=text(), watch=Watching(tried=trials.append))
    assert trials == []


def test_a_rule_for_later_blocks_only_leaves_nothing_to_try(tmp_path: Path) -> None:
    assert run(deep("llama", tmp_path / "float"), tmp_path / "out", rules=["model.layers.7.**=w8"]) == []
    assert (tmp_path / "out" / "config.json").exists()


def test_a_folder_that_computes_something_else_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a writer would that mixes up rows: nothing is calibrated, and the output does not appear."""
    source = deep("llama", tmp_path / "float")
    original = type(FORMAT).encode

    def broken(self: Any, stored: Any, q: Any) -> dict[str, torch.Tensor]:
        return original(self, stored, rounding.to_nearest(spicerack.numerics.codec.decode(q).flip(0), q.scheme))

    monkeypatch.setattr(type(FORMAT), "encode", broken)
    with pytest.raises(LoadError, match=r"preflight: the first 2 blocks.* off"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("preflight*"))


def test_the_cut_model_is_the_first_blocks(tmp_path: Path) -> None:
    source = deep("qwen3", tmp_path / "float")
    cut = preflight._first_blocks(prepare(source, decided(Recipe(parse("w4g8")), True)), 2, Method())
    assert cut is not None
    part, path, count = cut
    assert (path, count) == ("model.layers", 8) and part.config["num_hidden_layers"] == 2
    whole = Checkpoint.open(source).tensors
    assert set(part.source.tensors) == {n for n in whole if not any(f"layers.{i}." in n for i in range(2, 8))}
    assert json.loads((source / "config.json").read_text())["num_hidden_layers"] == 8
    assert load_file(source / "model.safetensors").keys() == whole.keys()
