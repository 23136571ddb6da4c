"""`plan --exact`: what an engine is asked, with which file, and what is said where it does not answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ggufs
import pytest

import spicerack
from spicerack.cli import _output, cli
from spicerack.planning.engines import _llama_fit
from spicerack.planning.exact import hollow
from spicerack.planning.model import open_model

gguf = pytest.importorskip("gguf")


def table(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape, by gguf-py."""
    return {t.name: (t.tensor_type.name, [int(n) for n in t.shape]) for t in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "bert", "gemma3_text"])
def test_a_hollow_file_is_what_export_writes_but_for_weights(family: str, tmp_path: Path) -> None:
    folder = ggufs.folder(family)
    spicerack.export(folder, to="gguf", scheme="w8g32", output=tmp_path / "whole.gguf")
    model = open_model(folder)
    hollow.write(model, "Q8_0", tmp_path / "hollow.gguf")
    whole, empty = table(tmp_path / "whole.gguf"), table(tmp_path / "hollow.gguf")
    assert {name: shape for name, (_, shape) in empty.items()} == {name: shape for name, (_, shape) in whole.items()}
    # llama-quantize rounds tables and heads, too, which quantize leaves as they are
    assert {name for name, (kind, _) in whole.items() if empty[name][0] != kind} <= {
        "token_embd.weight",
        "output.weight",
    }
    info = (tmp_path / "hollow.gguf").stat()
    assert info.st_blocks * 512 <= 32 << 10
    keys, written = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("hollow", "whole"))
    at = keys["general.architecture"].contents()
    sizes = [key for key in written if key.startswith(f"{at}.") and "pooling" not in key]
    assert {key: keys[key].contents() for key in sizes} == {key: written[key].contents() for key in sizes}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-fit-params that answers what the file ANSWER beside it says, and writes how it was called."""
    place = tmp_path / "bin"
    place.mkdir()
    script = place / _llama_fit.PROGRAM
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, shutil, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "shutil.copy(sys.argv[sys.argv.index('-m') + 1], here / 'asked.gguf')\n"
        "env = [name for name in os.environ if name.startswith('LLAMA_ARG')]\n"
        "(here / 'called').write_text(json.dumps([sys.argv[1:], env]))\n"
        "code, _, text = (here / 'ANSWER').read_text().partition('|')\n"
        "print('noise\\nHost 1 2\\n' + text)\n"
        "print('error: unknown model architecture', file=sys.stderr)\n"
        "sys.exit(int(code))\n"
    )
    script.chmod(0o755)
    (place / "ANSWER").write_text("0|Card of one 11 22 33 \nHost 4 5 6 ")
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    return place


def plan(*words: str) -> int:
    return _output.run(cli, ["plan", *words])


def test_it_is_asked_for_what_is_planned(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ggufs.folder("llama")), "--fit", "3090", "--context", "64", "--users", "2", "--cache", "8", "--exact"]
    assert plan(*words, "--scheme", "Q8_0", "--json") == 0
    said = json.loads(capsys.readouterr().out)["exact"]
    assert [tuple(d.values()) for d in said["devices"]] == [
        ("Card of one", 11 << 20, 22 << 20, 33 << 20, 66 << 20),
        ("Host", 4 << 20, 5 << 20, 6 << 20, 15 << 20),
    ]
    assert (said["numbers"], said["as_planned"]) == ("Q8_0", False)  # no 3090 is here: all in RAM
    called, environment = json.loads((program / "called").read_text())
    assert environment == []
    at = called.index("--fit-print")
    expected = "--fit-print on --no-repack -c 128 -np 2 -fa on -ctk q8_0 -ctv q8_0 -dev none"
    assert called[at:] == expected.split()
    assert not Path(called[called.index("-m") + 1]).exists()  # the file that was made for it went again
    asked = gguf.GGUFReader(program / "asked.gguf")
    assert said["planned"]["weight_bytes"] == sum(int(tensor.n_bytes) for tensor in asked.tensors)
    assert plan(*words) == 0
    text = capsys.readouterr().out
    assert "Card of one: weights 11.5 MB, cache 23.1 MB, buffers 34.6 MB" in text and "as if all lay in RAM" in text


def test_a_gguf_file_is_asked_about_as_it_lies_there(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.gguf"
    spicerack.export(ggufs.folder("llama"), to="gguf", scheme="w8g32", output=file)
    assert plan(str(file), "--engine", "llama.cpp", "--context", "64", "--exact", "--json") == 0
    said = json.loads(capsys.readouterr().out)["exact"]
    assert said["as_planned"]  # this machine's processor
    called, _ = json.loads((program / "called").read_text())
    assert called == ["-m", str(file), "--fit-print", "on", "--no-repack", "-c", "64", "-np", "1", "-dev", "none"]


def test_what_does_not_answer_is_said(
    program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(ggufs.folder("llama")), "--fit", "3090", "--context", "64", "--exact"]
    for answer in ("1|Host 1 2 3 ", "0|nothing", "0|"):
        (program / "ANSWER").write_text(answer)
        assert plan(*words) == 2
        said = capsys.readouterr()
        assert not said.out and "unknown model architecture" in said.err
    assert plan(*words, "--engine", "vllm") == 2
    assert "vllm has no dry run" in capsys.readouterr().err
    (program / _llama_fit.PROGRAM).write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(_llama_fit, "_SECONDS", 0.2)
    assert plan(*words) == 2
    assert "did not answer" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert plan(*words) == 2
    assert "llama-fit-params is not in the PATH" in capsys.readouterr().err


def test_a_family_without_names_in_gguf_is_refused(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parent / "configs" / "DeepSeek-V3.json"
    assert plan(str(config), "--fit", "16x H100 SXM", "--engine", "llama.cpp", "--exact") != 0
    assert "no names in GGUF" in capsys.readouterr().err
