"""The face of the package: every name is found, and is all that docs and examples need."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

import spicerack

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
