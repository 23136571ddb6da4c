"""The house's floors, from the syntax tree: imports go down, plug-ins of one folder never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spicerack"

# Lowest first. A module may import from its own floor and from those below it.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "registry", "models", "memory", "ranks"}),
    frozenset({"scheme", "schemes"}),
    frozenset(
        {
            "levels",
            "search",
            "qtensor",
            "devices",
            "solved",
            "codec",
            "bits",
            "packed",
            "method",
            "recipe",
            "native",
            "engines",
        }
    ),
    frozenset({"checkpoint", "census", "architecture"}),
    frozenset({"format", "formats", "kernel", "panels", "kernels"}),
    frozenset({"nn", "blocks", "folding", "stats", "observers", "descent"}),
    frozenset({"algorithms"}),
    frozenset(
        {
            "hf",
            "rotating",
            "caching",
            "placing",
            "loading",
            "job",
            "saving",
            "swap",
            "quantization",
            "qat",
            "batchnorm",
            "bitnet",
            "packing",
            "calibration",
            "calibrating",
            "preflight",
            "evaluation",
            "generate",
            "bench",
            "choices",
            "inspect",
            "outliers",
            "tokenizing",
            "demo",
        }
    ),
    frozenset({"training"}),
    frozenset({"cli", "__main__"}),
)
PLUGIN_FOLDERS = ("schemes", "formats", "kernels", "algorithms", "models")
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """Dotted spicerack names that a module imports at run time, without the leading `spicerack`."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = tuple((node.module or "").split("."))
            for alias in node.names:
                longer = (*base, alias.name)
                path = SOURCE.parent / Path(*longer)
                is_module = path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyi"))
                found.add(longer if is_module else base)
    return {name[1:] for name in found if name[0] == "spicerack" and len(name) > 1}


def floor(name: str) -> int:
    for level, names in enumerate(FLOORS):
        if any(name == known or name.startswith(f"{known}_") for known in names):
            return level
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(SOURCE).with_suffix("").parts
    for name in imports(path):
        if name[0].startswith("__version__") or name[0] == "_native":
            continue
        assert floor(name[0]) <= floor(own[0]), f"{'/'.join(own)} imports {'.'.join(name)}, which stands above it"
        if own[0] in PLUGIN_FOLDERS and name[0] == own[0] and len(name) > 1 and not name[1].startswith("_"):
            raise AssertionError(f"plug-in {'/'.join(own)} imports its neighbour {'.'.join(name)}")


def test_every_module_says_what_it_is() -> None:
    empty = [
        str(p.relative_to(SOURCE))
        for p in MODULES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not empty


def test_two_files_see_the_extension_and_one_sees_nanobind() -> None:
    users = [p.name for p in MODULES if ("_native",) in imports(p)]
    assert sorted(users) == ["engines.py", "native.py"]
    native = SOURCE.parents[1] / "native"
    assert [p.name for p in sorted(native.rglob("*.*")) if "nanobind" in p.read_text()] in ([], ["module.cpp"])
