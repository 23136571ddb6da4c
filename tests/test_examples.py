"""Each way to train, as its example shows it, for a few steps."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import spicerack

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: object) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scheme_of(folder: Path) -> str:
    return str(spicerack.load(folder).model.layers[0].mlp.up_proj.packed.scheme)


def script(name: str, *words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python example as `python examples/NAME` runs it, in this process, which has torch already."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_a_loop_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script("qat_loop.py", "--out", tmp_path / "out", "--steps", 6, "--length", 64, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    losses = [float(line.split()[3]) for line in shown.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert scheme_of(tmp_path / "out") == "w2g32h"


@pytest.mark.slow
def test_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script("qat_trainer.py", "--out", tmp_path / "out", "--steps", 2, "--length", 32, monkeypatch=monkeypatch)
    assert scheme_of(tmp_path / "out") == "w4g32"


@pytest.mark.slow
def test_bitnet_from_scratch(tmp_path: Path) -> None:
    shown = run(EXAMPLES / "bitnet_from_scratch.sh", tmp_path / "out", "--steps", 2, "--batch", 2, "--length", 32)
    assert "as stored, read back" in shown
    assert scheme_of(tmp_path / "out") == "ternarya8"
