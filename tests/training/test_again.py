"""The same training twice, and refusals of training, which leave nothing behind and speak no command line's words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import LlamaFolder

import spicerack
from spicerack import Settings
from spicerack.cli import cli
from spicerack.errors import OutputError, SpicerackError

SMALL: dict[str, Any] = {"steps": 2, "batch": 2, "length": 16, "eval_every": 2, "save_every": 2, "log_every": 1}
WORDS = "alpha beta gamma delta one two three " * 300


@pytest.mark.slow
def test_the_same_call_again_has_nothing_to_do(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source, text, out = llama_folder(), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(WORDS)
    given: dict[str, Any] = {"data": text, "scheme": "w4g32", "settings": Settings(**SMALL)}
    first = spicerack.train(source, out, **given)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = spicerack.train(source, out, **given)
    assert again.already_there and not first.already_there
    assert dataclasses.replace(again, seconds=first.seconds, already_there=False) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(OutputError, match="exists"):
        spicerack.train(source, out, **given | {"scheme": "w8"})
    words = ["train", str(source), "-o", str(out), "--scheme", "w4g32", "--data", str(text)]
    words += [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0 and "is already there, from the same command" in result.output


@pytest.mark.parametrize(
    ("content", "given"),
    [
        (WORDS, {"settings": Settings(**SMALL | {"length": 500})}),
        (WORDS, {"settings": Settings(**SMALL | {"batch": 3, "micro_batch": 2})}),
        (WORDS, {"settings": Settings(**SMALL, fsdp=True)}),
        (WORDS, {"tokenizer": "x"}),
        ("short", {}),
        (WORDS, {"scheme": "w4g128"}),
        (WORDS, {"scheme": "ternary", "settings": Settings(**SMALL, scale_lr=1.0)}),
        (WORDS, {"scheme": None, "scales_only": True}),
    ],
)
def test_a_refusal_leaves_no_folder_and_names_no_option(
    llama_folder: LlamaFolder, tmp_path: Path, content: str, given: dict[str, Any]
) -> None:
    source, text = llama_folder(), tmp_path / "text.txt"
    text.write_text(content)
    with pytest.raises(SpicerackError) as caught:
        spicerack.train(source, tmp_path / "new" / "out", **{"data": text, "scheme": "w4g32"} | given)
    assert "--" not in str(caught.value)
    assert not (tmp_path / "new").exists()
