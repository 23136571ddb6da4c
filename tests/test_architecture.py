"""The house, from the syntax tree: imports go down between rooms, make no circle inside one, names do not collide."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import spicerack

SOURCE = ROOT / "src" / "spicerack"
# Lowest first. A room sees those below it, and not those beside it.
FLOORS = (
    ("errors", "plugins", "_version"),
    ("arguments",),
    ("numerics", "machine"),
    ("algorithms", "storage", "kernels"),
    ("models",),
    ("nn", "text"),
    ("runtime",),
    ("evaluation",),
    ("quantization",),
    ("training", "exports", "planning"),
    ("cli", "__init__", "__main__"),
)
PLUGINS = (
    "numerics/schemes", "algorithms/solvers", "algorithms/transforms", "storage/formats", "storage/engines",
    "kernels/table",
    "quantization/calibration/observers", "exports/targets", "exports/readers", "models/gguf/families",
    "planning/engines", "cli",
)  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Files of the package that a file imports, late imports and those for types counted; the extension is none."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for parts in (name.split(".")[1:] for name in names if name.startswith("spicerack.")):
            imported |= {
                file
                for file in ("/".join(parts), "/".join(parts[:-1]), "/".join((*parts, "__init__")))
                if file in FILES
            }
    return imported


ARROWS = {file: imports(path) for file, path in FILES.items()}


def room(file: str) -> str:
    return file.partition("/")[0]


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports_go_down_and_plug_ins_are_strangers(file: str) -> None:
    for other in ARROWS[file]:
        if room(other) != room(file):
            assert FLOOR[room(other)] < FLOOR[room(file)], f"{file} imports {other}, which is not below it"
        folder, _, name = other.rpartition("/")
        assert folder not in PLUGINS or name.startswith("_"), f"{file} imports the plug-in {other} by its name"


def test_no_circle_inside_a_room() -> None:
    left = {file: {o for o in others if room(o) == room(file) and o != file} for file, others in ARROWS.items()}
    while free := {file for file, others in left.items() if not others & left.keys()}:
        left = {file: others for file, others in left.items() if file not in free}
    assert not left, "these import each other"


def test_verbs_are_functions_and_nouns_are_folders() -> None:
    entries = {path.stem for path in SOURCE.iterdir()}
    assert not entries & set(spicerack.__all__)
    taken = {file for file, path in FILES.items() if path.stem in sys.stdlib_module_names and room(file) != "cli"}
    assert not taken, "a program that is started in this folder would import these for the standard library's"


def test_rooms_are_small_and_say_what_they_are_for() -> None:
    for folder in (path for path in SOURCE.rglob("*") if path.is_dir() and list(path.glob("*.py"))):
        count = len([path for path in folder.glob("*.py") if path.stem != "__init__"])
        assert count <= 15 or folder.relative_to(SOURCE).as_posix() in PLUGINS, f"{folder} has {count} files"
    assert len([path for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 15
    assert not [file for file, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_the_environment_is_read_at_the_door() -> None:
    """By the command line, and by what asks who started the process: nothing else may depend on what nobody named."""
    readers = {file for file, path in FILES.items() for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")}  # fmt: skip
    assert {room(file) for file in readers} <= {"cli", "machine"}, readers


def test_the_extension_has_one_seam_each_way() -> None:
    users = {file for file, path in FILES.items() if "_native" in {n.name for i in ast.walk(ast.parse(path.read_text()))
             if isinstance(i, ast.ImportFrom) and i.module == "spicerack" for n in i.names}}  # fmt: skip
    assert {room(file) for file in users} == {"numerics", "kernels"}
    native = ROOT / "native"
    faces = {path.parent for path in native.rglob("*.*") if path.is_file() and "nanobind" in path.read_text()}
    assert faces == {native / "python"}


def test_tests_docs_and_benchmarks_have_the_rooms_of_the_package() -> None:
    shared = {"benchmarks": {"harness", "results"}, "tests": {"native"}, "docs": {"design", "python", "families"}}
    for place, more in shared.items():
        entries = [path for path in (ROOT / place).iterdir() if path.is_dir() or path.suffix == ".md"]
        folders = {path.stem for path in entries if path.name != "__pycache__"}
        assert folders <= FLOOR.keys() | more, f"{place} has rooms of its own"


def test_pages_name_benchmarks_that_are_there() -> None:
    pages = "".join(
        path.read_text() for path in (ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"))
    )
    named = set(re.findall(r"-m\s+benchmarks\.([\w.]+\w)", pages))
    assert named
    assert not [
        name for name in named if not (ROOT / "benchmarks" / name.replace(".", "/")).with_suffix(".py").exists()
    ]
    assert "benchmarks/" not in re.sub(r"benchmarks/(results/|\s| )", "", pages), "a page names a benchmark by its file"


DRAWN = {"arange", "randint", "randperm", "range", "tril_indices", "triu_indices"}  # integers, whatever the default is
CREATED = {
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("file", sorted(FILES))
def test_no_tensor_has_the_type_or_the_device_that_torch_has_by_default(file: str) -> None:
    """Both are the caller's, who may have set them to what he computes in and where."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and name in DRAWN | CREATED:
            said = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if name in DRAWN else {"device", "dtype"}
            assert wanted <= said, f"{file}:{node.lineno}: torch.{name} without {', '.join(sorted(wanted - said))}"
