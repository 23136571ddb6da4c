"""What headers and names tell is refused before torch is imported, with the words of the long way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file

from spicerack.errors import ShapeError
from spicerack.models import census, overview
from spicerack.quantization import early
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import of
from spicerack.storage.reader import Checkpoint

SAID = """
import sys
from spicerack.cli import _output, cli
print(_output.run(cli, sys.argv[1:]), "torch" in sys.modules)
"""


def said(*arguments: str | Path) -> tuple[int, bool, str]:
    """Exit code, whether torch was there, and what was said."""
    command = [sys.executable, "-c", SAID, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    code, imported = done.stdout.splitlines()[-1].split()
    return int(code), imported == "True", done.stderr


def nowhere(folder: Path) -> str:
    return "does not exist"


def pickled(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return "pickled weights are not read"


def gguf(folder: Path) -> str:
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"x")
    return "is a GGUF folder"


def adapter(folder: Path) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return "is an adapter"


COMMANDS = (
    ["quantize", "{}", "-o", "out", "--scheme", "w8"],
    ["train", "{}", "-o", "out", "--scheme", "w8", "--data", "text"],
    ["eval", "{}", "--against", "{}"],
    ["bench", "{}", "--against", "{}"],
    ["generate", "{}", "hello"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("make", [nowhere, pickled, gguf, adapter])
def test_a_folder_that_is_no_model_needs_no_torch(
    tmp_path: Path, command: list[str], make: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    message = make(folder)
    code, imported, told = said(*(word.format(folder) for word in command))
    assert (code, imported) == (2, False) and message in told


def test_names_of_schemes_need_no_torch(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    for command in (["quantize"], ["train", "--data", "text"]):
        code, imported, told = said(*command, model, "-o", tmp_path / "out", "--scheme", "w4g12x")
        assert (code, imported) == (2, False) and "unknown scheme 'w4g12x'" in told


def test_shapes_and_quantized_folders_need_no_torch(llama_folder, tmp_path: Path) -> None:
    import spicerack

    model, out = llama_folder(), tmp_path / "out"
    spicerack.quantize(model, "w8", output=out)
    for command, message in (
        (["quantize", model, "-o", tmp_path / "b", "--scheme", "w4g96"], "not divisible"),
        (["quantize", out, "-o", tmp_path / "b", "--scheme", "w8"], "is quantized already"),
        (["quantize", model, "-o", tmp_path / "b", "--scheme", "w8a8s"], "need calibration text"),
        (["eval", model, "--against", out], "is quantized itself"),
        (["bench", out, "--against", out], "is quantized itself"),
    ):
        code, imported, told = said(*command)
        assert (code, imported) == (2, False) and message in told, told


@pytest.mark.parametrize("rules", [(), ("**=w4g24",), ("**=skip",)])
@pytest.mark.parametrize("scheme", ["w8", "w4g24", "w4g128", "nf4"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "qwen3", "mixtral", "t5", "opt", "gpt_neox", "vit"])
def test_nothing_is_refused_early_that_would_not_be_later(
    family: str, scheme: str, rules: tuple[str, ...], tmp_path: Path
) -> None:
    if family not in families.FAMILIES:
        pytest.skip("no builder")
    families.build(family).save_pretrained(tmp_path / "model")
    asked = of(scheme, rules)
    checkpoint = Checkpoint.open(tmp_path / "model")
    refused = {}
    for way, call in (
        ("early", lambda: early.refuse_shapes(checkpoint, asked)),
        ("late", lambda: prepare(tmp_path / "model", asked)),
    ):
        try:
            call()
        except ShapeError as error:
            refused[way] = (error.message, error.hint)
        except Exception:  # noqa: BLE001  # "quantizes nothing": the long way's to say
            assert way == "late"
    assert "early" not in refused or refused["early"] == refused.get("late")
    if overview.told_by_names(census.take(checkpoint), checkpoint) and not rules:
        assert refused.get("early") == refused.get("late")
