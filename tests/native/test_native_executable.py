"""Native code without Python, native/tests: as it ships, under sanitizers, and on emulated processors.

Builds stay in build/, so that a second run compiles only what changed.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spicerack.kernels import panels

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86 processors")
CROSS = "aarch64-linux-gnu"
SANITIZERS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def tool(name: str, package: str) -> str:
    """Its path; skips without it, unless CI has installed it."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        assert "SPICERACK_EMULATORS" not in os.environ, f"{name} must be there"
        pytest.skip(f"no {name}: apt-get install {package}")
    return found


def run(*command: str | Path) -> str:
    """What it prints; a failure shows the end of that."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(name: str, *options: str) -> Path:
    cmake = tool("cmake", "cmake")
    folder = ROOT / "build" / f"tests-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers may want it as well
        run(cmake, "-S", ROOT / "native" / "tests", "-B", folder, *options)
        run(cmake, "--build", folder, "--target", "kernels_test", "--parallel", "2")
    return folder / "kernels_test"


def passing(*command: str | Path) -> tuple[str, ...]:
    """The engines that passed."""
    lines = run(*command).splitlines()
    assert lines[-1].endswith(" checks, 0 failures")
    return tuple(lines[0].removeprefix("engines:").split())


def test_as_it_ships() -> None:
    assert passing(build("release", "-DCMAKE_BUILD_TYPE=Release")) == panels.NAMES


def test_address_and_undefined_behaviour_sanitizers() -> None:
    executable = build("sanitizers", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={SANITIZERS}")
    assert passing(executable) == panels.NAMES


@ON_X86
@pytest.mark.parametrize(("processor", "found"), [("Nehalem", ("scalar",)), ("Haswell", ("avx2", "scalar"))])
def test_older_processors_reach_nothing_newer(processor: str, found: tuple[str, ...]) -> None:
    emulator = tool("qemu-x86_64", "qemu-user")
    assert passing(emulator, "-cpu", processor, build("release", "-DCMAKE_BUILD_TYPE=Release")) == found


@pytest.mark.parametrize(("processor", "found"), [("cortex-a53", ("scalar",)), ("max", ("neon", "scalar"))])
def test_aarch64_with_and_without_dot_products(processor: str, found: tuple[str, ...]) -> None:
    compiler, emulator = tool(f"{CROSS}-g++", f"g++-{CROSS}"), tool("qemu-aarch64", "qemu-user")
    executable = build(
        "aarch64",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O1",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    assert passing(emulator, "-cpu", processor, "-L", f"/usr/{CROSS}", executable) == found


def leaks(symbols: str, isa: str) -> list[str]:
    """In the output of `nm --demangle`: code that others could link to, or that runs when it is loaded."""
    found = []
    for line in symbols.splitlines():
        _, kind, name = line.split(maxsplit=2)
        shared = (kind.isupper() or kind == "u") and not name.startswith((f"spicerack::{isa}::", "DW.ref."))
        if shared or name.startswith(("_GLOBAL__sub_I", "__static_initialization")):
            found.append(name)
    return found


def test_objects_for_one_instruction_set_share_no_code() -> None:
    """The linker keeps one copy of an inline function for everybody: it must not be one with newer instructions."""
    objects = sorted(
        p for stem in ("kernels", "quantizers") for p in ROOT.glob(f"build/cp*/CMakeFiles/{stem}_*.dir/**/*.o")
    )
    if not objects:
        pytest.skip("the extension was not built in this folder")
    nm = tool("nm", "binutils")
    for path in objects:
        folder = next(part for part in path.parts if part.endswith(".dir"))
        isa = folder.removesuffix(".dir").partition("_")[2]
        assert leaks(run(nm, "--demangle", "--defined-only", path), isa) == [], path


@pytest.mark.parametrize(
    ("symbol", "leaks_out"),
    [
        ("T spicerack::avx2::linear(spicerack::Call const&)", False),
        ("t spicerack::avx2::(anonymous namespace)::work(void*)", False),
        ("V DW.ref.__gxx_personality_v0", False),
        ("W std::vector<float, std::allocator<float> >::~vector()", True),
        ("u std::chars", True),
        ("T spicerack::scalar::linear(spicerack::Call const&)", True),
        ("t _GLOBAL__sub_I_linear.cpp", True),
    ],
)
def test_what_leaks_out(symbol: str, leaks_out: bool) -> None:
    assert bool(leaks(f"0000000000000000 {symbol}", "avx2")) == leaks_out
