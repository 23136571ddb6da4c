"""What pip reads: the distribution's name, extras that hints name, and constraints that are within the ranges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NAME = "spicerack-quant"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def required(project: dict[str, Any]) -> list[Requirement]:
    return [Requirement(line) for lines in (project["dependencies"], *project["optional-dependencies"].values())
            for line in lines]  # fmt: skip


def test_the_distribution_has_a_name_that_the_index_takes(project: dict[str, Any]) -> None:
    assert project["name"] == NAME and project["scripts"] == {"spicerack": "spicerack.cli:main"}
    own = [requirement for requirement in required(project) if requirement.name.startswith("spicerack")]
    assert [requirement.name for requirement in own] == [NAME]
    assert own[0].extras <= project["optional-dependencies"].keys()


def test_every_extra_that_is_told_of_exists(project: dict[str, Any]) -> None:
    """In hints, docs and the Makefile: `spicerack-quant[train]`, `.[dev]`."""
    files = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/spicerack/**/*.py")]
    texts = "\n".join(path.read_text() for path in files)
    named = re.findall(rf"(?:install|\.txt).*?['\"]({NAME}|\.|\w+)\[([\w,-]+)\]['\"]", texts)
    assert len(named) >= 5
    for name, extras in named:
        assert name in (NAME, ".") and set(extras.split(",")) <= project["optional-dependencies"].keys(), (name, extras)


def test_ci_runs_what_the_package_allows(project: dict[str, Any]) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {Requirement(line).name: Requirement(line).specifier for line in lines}
    ranges = {requirement.name: requirement.specifier for requirement in required(project)}
    assert pinned.keys() <= ranges.keys() and {"torch", "transformers", "compressed-tensors"} <= pinned.keys()
    for name, specifier in pinned.items():
        for version in (one.version for one in specifier if one.operator in ("==", ">=")):
            assert ranges[name].contains(version), (name, version)
    assert not any(one.operator in ("<", "<=", "==", "~=") for one in ranges["torch"]), "no ABI of torch is used"
