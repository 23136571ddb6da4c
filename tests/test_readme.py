"""The README's commands, executed as they are written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from spicerack.cli import _output, cli
from spicerack.planning.mix import judge

README = (Path(__file__).parents[1] / "README.md").read_text()


def commands() -> list[str]:
    return [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("    spicerack ")]


@pytest.mark.slow
def test_the_commands_run_as_written(
    stdlib_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: each would take three seconds to start in its own, and tests of the command line do start it."""
    monkeypatch.setattr(judge, "HELD_OUT", 8)  # windows that a mix is judged on
    assert {shlex.split(c)[1] for c in commands()} >= {"inspect", "quantize", "eval", "bench", "generate"}
    names = {"MODEL": str(stdlib_lm), "OUT": str(tmp_path / "OUT"), "FILE": str(stdlib_lm / "heldout.txt")}
    names |= {"LESS": str(tmp_path / "LESS"), "TEXT": str(stdlib_lm / "calibration.txt")}
    names |= {"TAUGHT": str(tmp_path / "TAUGHT"), "MIX": str(tmp_path / "MIX")}
    for command in commands():
        words = [names.get(word, word) for word in shlex.split(command)][1:]
        if words[0] == "eval":
            words += ["--max-tokens", "4096"]  # the same command on less text
        if "--bits" in words:  # every layer is rounded in each of ten schemes
            words += ["--samples", "4", "--length", "32"]
        elif "--calib" in words:
            words += ["--samples", "4", "--no-check"]  # another command has its check
        if words[0] == "bench":
            words += ["--repeats", "1"]
        if words[0] == "train":
            words += ["--steps", "2", "--batch", "2", "--length", "64"]
        code = _output.run(cli, words)
        printed = capsys.readouterr()
        assert code == 0, (command, printed.err)
        assert printed.out.strip(), command


@pytest.mark.slow
def test_the_python_lines_run_as_written(stdlib_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    scope: dict[str, object] = {"my_module": module}
    exec(snippet[1].replace("path/to/model", str(stdlib_lm)), scope)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    small = scope["small"]
    assert isinstance(small, torch.nn.Module)
    assert torch.allclose(small(x), module(x), atol=0.05) and not torch.equal(small(x), module(x))
    assert (tmp_path / "out" / "config.json").exists()
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"
