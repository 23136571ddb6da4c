"""Exports that end early: a full disk, Ctrl+C, a target that is there. Nothing is left, the source is what it was."""

from __future__ import annotations

import contextlib
import hashlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ggufs import folder, written

import spicerack
from spicerack import cli
from spicerack.errors import OutputError, SpicerackError
from spicerack.exports import verify
from spicerack.exports.source import Source

TO = ("gguf", "gptq", "scheme", "import")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is exported: a float model, a quantized one, and its GGUF file."""
    place = tmp_path_factory.mktemp("sources")
    spicerack.quantize(folder("llama"), "w4g32", output=place / "quantized")
    file = written(place / "quantized", place / "model.gguf")
    quantized = place / "quantized"
    return {"gguf": quantized, "gptq": quantized, "scheme": folder("llama"), "import": file}


def arguments(to: str, source: Path, output: Path) -> list[str]:
    """The command."""
    line = {"gguf": ["export", "--to", "gguf"], "gptq": ["export", "--to", "gptq"], "import": ["import"],
            "scheme": ["export", "--to", "gguf", "--scheme", "w4g32"]}[to]  # fmt: skip
    return [*line, str(source), "-o", str(output)]


def output_of(to: str, place: Path) -> Path:
    """Below a folder that is not there yet."""
    return place / "new" / ("model.gguf" if to in ("gguf", "scheme") else "out")


def state(source: Path) -> dict[str, str]:
    """The files of a source, and what is in them."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Within, no file grows above that: what writing to a full disk is like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [0, 3_000, 40_000])
@pytest.mark.parametrize("to", TO)
def test_nothing_is_left_on_a_full_disk(
    to: str, nbytes: int, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = sources[to], tmp_path / "place"
    place.mkdir()
    before = state(source)
    with largest_file(nbytes):
        code = cli._output.run(cli.cli, arguments(to, source, output_of(to, place)))
    said = capsys.readouterr().err
    assert code == OutputError("", "").exit_code and "nothing is left of it" in said and "continues" not in said
    assert list(place.iterdir()) == [] and state(source) == before


@pytest.mark.parametrize("when", ["verify", "either", "float"])
@pytest.mark.parametrize("to", TO)
def test_nothing_is_left_after_ctrl_c(
    to: str, when: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = sources[to], tmp_path / "place"
    place.mkdir()
    owner = verify if when == "verify" else Source
    before, asked = state(source), getattr(owner, when)
    calls: list[str] = []

    def interrupted(*given: Any) -> object:
        calls.append(when)
        if when == "verify" or len(calls) == 5:
            raise KeyboardInterrupt
        return asked(*given)

    monkeypatch.setattr(owner, when, interrupted)
    assert cli._output.run(cli.cli, arguments(to, source, output_of(to, place))) == 130
    assert calls and list(place.iterdir()) == [] and state(source) == before


@pytest.mark.parametrize("to", TO)
def test_what_is_there_stays(to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / output_of(to, tmp_path).name
    output.write_bytes(b"mine")
    assert cli._output.run(cli.cli, arguments(to, sources[to], output)) == OutputError("", "").exit_code
    assert cli._output.run(cli.cli, arguments(to, sources[to], sources[to])) == OutputError("", "").exit_code
    assert output.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [output]


def test_a_folder_that_another_process_writes_is_left_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(SpicerackError, match="exists and is not ours"):
        spicerack.export(sources["gptq"], to="gptq", output=tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
