"""The face of the package: every name is found, and is all that docs and examples need."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

import spicerack
from spicerack.errors import UsageError
from spicerack.evaluation.language import Comparison

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.*"))]


def typed() -> dict[str, str]:
    """Name -> where it lives, as type checkers are told."""
    tree = ast.parse(Path(spicerack.__file__).read_text())
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}".removeprefix("spicerack.")
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module).startswith("spicerack.")
        for alias in node.names
    }  # fmt: skip


@pytest.mark.parametrize("name", spicerack.__all__)
def test_every_name_is_found(name: str) -> None:
    value = getattr(spicerack, name)
    assert value is not None and name in dir(spicerack)
    assert name == "__version__" or value.__doc__


def test_type_checkers_and_the_table_agree() -> None:
    assert typed() == {**spicerack._HOMES, "__version__": "_version.__version__"}
    assert list(spicerack.__all__) == sorted([*spicerack._HOMES, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = spicerack.quantise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nobody_is_sent_past_it(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?:from|import) spicerack\.(?!errors)\w+", text)
    used = set(re.findall(r"\bspicerack\.([A-Za-z_]\w*)\(", text))
    assert used <= set(spicerack.__all__)


GOOD: dict[str, Any] = {
    "module": nn.Linear(64, 64), "scheme": "w8", "folder": "x", "against": "x", "output": "x", "data": "x",
    "source": "x", "tokenizer": PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast), "samples": 2, "length": 8,
    "seed": 0, "a": object.__new__(Comparison), "b": object.__new__(Comparison), "ids": torch.zeros(1, 2), "mask": None,
    "sha256": "", "unknown": 0.0, "to": "gguf",
}  # fmt: skip
"""An argument that is right, for parameters that must be given; `model` and `config` are several things."""


FILES = ("train", "export", "import_model", "formats")
"""What takes a model as a path, and not in memory."""


def arguments_of(name: str) -> list[str]:
    return [p.name for p in inspect.signature(getattr(spicerack, name)).parameters.values()]


def good(name: str) -> dict[str, Any]:
    function = getattr(spicerack, name)
    more = {"model": "x" if name in FILES else nn.Linear(64, 64), "config": LlamaConfig()}
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return {p.name: {**GOOD, **more}[p.name] for p in needed}


ARGUMENTS = [(n, a) for n in spicerack.__all__ if callable(getattr(spicerack, n)) for a in arguments_of(n)]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_argument_of_another_type_is_refused_by_its_name(name: str, argument: str) -> None:
    """Before anything else: what else there is to refuse, here a folder "x", is not reached."""
    function = getattr(spicerack, name)
    optional = inspect.signature(function).parameters[argument].default is None
    anything = [] if (name, argument) == ("prepare_qat", "inputs") else [[object()]]
    for wrong in (object(), 1j, *anything, *([] if optional or GOOD.get(argument, 0) is None else [None])):
        with pytest.raises(UsageError, match=rf"^{name.replace('read_calibration', 'read')}: {argument} is .*pass "):
            function(**{**good(name), argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument", "wrong"),
    [
        ("quantize", "scheme", 8), ("quantize", "rules", "0=w8"), ("quantize", "rules", [3]),
        ("quantize", "threads", True), ("quantize", "fit_groups", "yes"), ("quantize", "memory", "8GB"),
        ("load", "dtype", "float16"),
        ("load", "cache", 8.5), ("save", "module", "x"), ("freeze", "model", "out"), ("evaluate", "max_tokens", 1e3),
        ("bench", "options", {"batch": 3}), ("train", "settings", {"steps": 3}), ("prepare_qat", "config", "lsq"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_too(name: str, argument: str, wrong: object) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: {argument} is "):
        getattr(spicerack, name)(**{**good(name), argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("quantize", "threads"), ("quantize", "memory"), ("quantize", "shard_bytes"), ("BenchOptions", "repeats"),
        ("BenchOptions", "threads"), ("EvaluationOptions", "window"), ("EvaluationOptions", "max_tokens"),
        ("Settings", "batch"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(name: str, argument: str) -> None:
    with pytest.raises(UsageError, match=f"{argument} is -1"):
        getattr(spicerack, name)(**{**good(name), argument: -1})


def test_numpys_numbers_and_paths_are_numbers_and_paths(tmp_path: Path) -> None:
    import numpy

    assert spicerack.BenchOptions(batch=numpy.int64(3)).batch == 3
    assert spicerack.Settings(steps=5, lr=1, kl=numpy.float32(0.5)).lr == 1
    with pytest.raises(UsageError, match="does not exist"):
        spicerack.load(tmp_path / "nothing")


def test_warnings_point_at_who_called() -> None:
    """One of them is of `quantize`, one of `prepare_qat`; both say what stays in float."""
    for call in (spicerack.quantize, spicerack.prepare_qat):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(nn.Sequential(nn.Linear(64, 8), nn.Conv1d(64, 64, 3)), "w8")
        assert [warning.filename for warning in caught] == [__file__]
