"""The command line's contract: one JSON object, exit codes, hints, order of rules, and a quick start."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

import spicerack.cli
from spicerack import plugins
from spicerack.cli import _output, cli
from spicerack.cli._commands import about
from spicerack.kernels.panels import NAMES


def run(*args: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spicerack", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def in_process(*args: str | Path) -> int:
    return _output.run(cli, list(map(str, args)))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command, "--help"] for command in ("quantize", "inspect", "kernels"))]
)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    said = "print('torch' in sys.modules, file=sys.stderr)"
    code = f"import sys; from spicerack.cli import cli\ntry: cli({arguments!r})\nfinally: {said}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("False"), done.stderr


def test_importing_loads_no_torch_and_changes_nothing() -> None:
    code = (
        "import sys, os, warnings; before = dict(os.environ), list(warnings.filters), list(sys.path); import spicerack;"
        "assert before == (dict(os.environ), list(warnings.filters), list(sys.path));"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy', 'rich', 'click'}), dir(spicerack))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[]") and "quantize" in done.stdout


def test_the_first_help_comes_at_once() -> None:
    """The aim is 0.3 s. Its own CPU seconds count, which other work on the machine stretches to twice that at most."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.list_commands(click.Context(cli)):
        assert in_process(name, "--help") == 0
        assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "meant"), [("quantise", "quantize"), ("benchmark", "bench"), ("evaluate", "eval")])
def test_a_command_that_is_none_gets_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(typed, "model") == 2
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


def test_no_command_is_no_error_in_red(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process() == 2
    said = capsys.readouterr().err
    assert "Commands:" in said and "error" not in said


def test_what_is_piped_is_not_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    line = "word " * 100
    _output.console().print(line)
    assert capsys.readouterr().out == line + "\n"


def test_commands_come_in_the_order_of_a_model_s_way() -> None:
    names = cli.list_commands(click.Context(cli))
    assert names == [
        "inspect", "plan", "devices", "quantize", "train", "eval", "bench", "energy", "report", "generate", "formats",
        "export", "import", "kernels", "demo",
    ]  # fmt: skip
    files = {path.stem.removesuffix("_") for path in Path(spicerack.cli.__file__).parent.glob("[!_]*.py")}
    assert set(names) == files


DROPPED = """
import click

from spicerack.cli import _output
from spicerack.cli._commands import About

ABOUT = About(place=25, summary="Counts the letters of a word.", resumes=True)


@click.command()
@click.argument("word")
@_output.json_option
def command(word: str, as_json: bool) -> None:
    if not word:
        raise KeyboardInterrupt
    _output.emit({"letters": len(word)})
"""


def test_a_new_command_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listed where it says and with what it says, before it is imported; then run; its own words on Ctrl+C."""
    (tmp_path / "letters.py").write_text(DROPPED)
    (tmp_path / "_helper.py").write_text("raise AssertionError('an underscore is no command')")
    monkeypatch.setattr(spicerack.cli, "__path__", [*spicerack.cli.__path__, str(tmp_path)])
    plugins.names.cache_clear()
    try:
        assert in_process("--help") == 0
        shown = capsys.readouterr().out
        assert "spicerack.cli.letters" not in sys.modules
        order = [shown.index(text) for text in ("quantize", "letters", "Counts the letters of a word.", "train")]
        assert order == sorted(order)
        assert in_process("letters", "lemon", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"letters": 5}
        assert in_process("letters", "", "--json") == 130
        assert "continues" in json.loads(capsys.readouterr().out)["hint"]
    finally:
        plugins.names.cache_clear()
        sys.modules.pop("spicerack.cli.letters", None)


def test_a_file_that_says_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mute.py").write_text("command = None")
    monkeypatch.setattr(spicerack.cli, "__path__", [*spicerack.cli.__path__, str(tmp_path)])
    with pytest.raises(LookupError, match=r"mute\.py declares no ABOUT"):
        about("mute")


@pytest.mark.slow
def test_quantize_prints_one_json_object(llama_folder, tmp_path: Path) -> None:
    done = run("quantize", "--no-check", llama_folder(), "-o", tmp_path / "out", "--scheme", "w4g32", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = {"output", "scheme", "bytes_before", "bytes_after", "bits_per_weight", "bits_per_weight_total", "seconds",
            "peak_rss_bytes", "resumed"}  # fmt: skip
    assert keys <= result.keys() and result["bits_per_weight"] == 4.5


@pytest.mark.parametrize(("scheme", "row"), [("nf4", "reference"), ("w4g8", "reference"), ("w4g32", "float_scalar")])
def test_what_will_be_slower_than_float_is_told_before(
    llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, row: str
) -> None:
    """Where no vector instructions multiply a scheme: tables of levels everywhere, all on a processor without them."""
    assert in_process("quantize", llama_folder(), "-o", tmp_path / "out", "--scheme", scheme, "--dry-run") == 0
    told = f"{scheme} runs on {row} here, without vector instructions: slower than the float model"
    assert (told in " ".join(capsys.readouterr().out.split())) == (row == "reference" or NAMES[0] == "scalar")


def test_dry_run_writes_nothing(llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_folder()
    before = set(tmp_path.iterdir())
    assert in_process("quantize", model, "-o", tmp_path / "out", "--scheme", "w8", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert set(tmp_path.iterdir()) == before


def test_a_dry_run_tells_what_the_run_then_writes(
    llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, counts, sizes and totals are those of the run; only the errors are not known before it."""
    command = [
        "quantize",
        "--no-check",
        llama_folder(),
        "-o",
        tmp_path / "out",
        "--scheme",
        "w4g32",
        "--set",
        "**.down_proj=w8",
    ]
    assert in_process(*command, "--dry-run") == 0
    foretold = capsys.readouterr().out
    assert in_process(*command, "--dry-run", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert in_process(*command) == 0
    done = capsys.readouterr().out
    rows = [cells for cells in map(str.split, foretold.splitlines()) if cells[1:3] in (["w4g32", "2"], ["w8", "2"])]
    assert len(rows) == 7 and "smaller" in foretold and "nothing was written" in foretold
    assert "error" not in foretold and "weight error" in done
    after = [line.split() for line in done.splitlines()]
    assert all(row in [cells[: len(row)] for cells in after] for row in rows)
    total = next(line for line in foretold.splitlines() if "smaller" in line)
    assert total in done.splitlines()
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert figures["bytes_after"] == sum(row["bytes_after"] for row in figures["layers"]) <= written
    assert figures["format"] == "compressed_tensors" and isinstance(figures["notes"], list)


def test_the_same_command_again_says_so_and_succeeds(
    llama_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "--no-check", llama_folder(), "-o", tmp_path / "out", "--scheme", "w4g32"]
    assert in_process(*command) == 0 and in_process(*command) == 0
    assert "is already there, from the same command" in capsys.readouterr().out
    assert in_process(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["already_there"] is True


def test_what_the_command_notes_python_gets_too(llama_folder, tmp_path: Path, capsys) -> None:
    import spicerack

    model = llama_folder()
    assert in_process("quantize", "--no-check", model, "-o", tmp_path / "a", "--scheme", "nf4", "--json") == 0
    captured = capsys.readouterr()
    notes = json.loads(captured.out)["notes"]
    assert notes and all(note in captured.err for note in notes)
    assert spicerack.quantize(model, "nf4", output=tmp_path / "b")["notes"] == notes


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "says"),
    [
        (["--scheme", "w4g129q"], 2, "SchemeError", "w4g129q"),
        ([], 2, "RecipeError", "--scheme"),
        (["--scheme", "w8", "--set", "nothing=w8"], 2, "RecipeError", "matches nothing"),
        (["--scheme", "w8", "--range", "best"], 2, "RecipeError", "best"),
        (["--scheme", "w8", "--bogus"], 2, "UsageError", "--bogus"),
        (["--scheme", "w8", "--shard-size", "2XB"], 2, "UsageError", "2XB"),
        (["--scheme", "w4g96"], 2, "ShapeError", "not divisible"),
        (["--scheme", "w8a8s"], 2, "SchemeError", "calibration"),
    ],
)
def test_errors_are_json_with_a_hint_and_the_right_code(
    llama_folder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    kind: str,
    says: str,
) -> None:
    assert in_process("quantize", llama_folder(), "-o", tmp_path / "out", *arguments, "--json") == code
    captured = capsys.readouterr()
    error = json.loads(captured.out)
    assert error["error"] == kind and says in error["message"] and error["hint"]
    assert "error:" in captured.err and "Traceback" not in captured.err
    assert not list(tmp_path.glob("out*"))


def test_rules_keep_the_order_of_the_command_line(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    orders = {
        "skip-first": ["--skip", "**.down_proj", "--set", "model.layers.0.mlp.down_proj=w8"],
        "set-first": ["--set", "model.layers.0.mlp.down_proj=w8", "--skip", "**.down_proj"],
    }
    decided = {}
    for name, rules in orders.items():
        assert in_process("quantize", "--no-check", model, "-o", tmp_path / name, "--scheme", "w4g32", *rules) == 0
        entries = json.loads((tmp_path / name / "spicerack.json").read_text())["tensors"]
        decided[name] = {e["tensor"]: e["scheme"] for e in entries}["model.layers.0.mlp.down_proj.weight"]
    assert decided == {"skip-first": "w8", "set-first": None}


def test_the_command_line_wins_over_the_recipe_file(llama_folder, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w4g32\nrange: absmax\nrules:\n  - '**.down_proj': w8\n")
    out = tmp_path / "out"
    assert (
        in_process("quantize", "--no-check", llama_folder(), "-o", out, "--recipe", path, "--set", "**.down_proj=w6")
        == 0
    )
    recipe = json.loads((out / "spicerack.json").read_text())["identity"]["recipe"]
    expected = {"scheme": "w4g32", "method": "rtn", "range": "absmax"}
    assert recipe == expected | {"rules": [{"**.down_proj": "w8"}, {"**.down_proj": "w6"}]}


def test_ctrl_c_is_130_and_the_same_command_continues(llama_folder, tmp_path: Path, monkeypatch, capsys) -> None:
    from spicerack.quantization import run as quantization

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "execute", interrupted)
    assert in_process("quantize", llama_folder(), "-o", tmp_path / "out", "--scheme", "w8", "--json") == 130
    assert "continues" in json.loads(capsys.readouterr().out)["hint"]
