"""Native code without Python, native/tests: as it ships, under sanitizers, and on emulated processors.

Compiling takes most of the time, so nothing is compiled twice: what ships is linked from the extension's own libraries
where it was built in this folder, the emulated x86 processors run that same file, and the sanitized build has the
engines that this processor runs, one for each way of touching memory. Builds stay in build/, and a second run compiles
only what changed.
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
from spicerack.numerics import native

pytestmark = pytest.mark.slow
BUILDS = pytest.mark.builds
ROOT = Path(__file__).parents[2]
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86 processors")
CROSS = "aarch64-linux-gnu"
SANITIZERS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
CALLED = "--param asan-instrumentation-with-call-threshold=0"
"""GCC: what looks at an address is called and not written out, for which the compiler takes a third of the time: 64 and
not 187 s of a core for the products with AVX2."""
ALIKE = {"avx512vnni": "avx512vbmi", "avxvnni": "avx2", "avx512vlvnni": "avx2"}
"""Engines that touch memory as another does: their vectors are as wide, and only their dot product is another."""
ON_DEMAND = ("avx512vbmi", "avx512vnni", "avx512vlvnni", "avxvnni", "avx2", "neon", "avx512")
"""Instruction sets that a build may leave out."""


def tool(name: str, package: str) -> str:
    """Its path; skips without it, unless CI has installed it."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        assert "SPICERACK_EMULATORS" not in os.environ, f"{name} must be there"
        pytest.skip(f"no {name}: apt-get install {package}")
    return path


def run(*command: str | Path) -> str:
    """What it prints; a failure shows the end of that."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(name: str, *options: str) -> Path:
    """build/tests-NAME, with the executable in it."""
    cmake = tool("cmake", "cmake")
    folder = ROOT / "build" / f"tests-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers may want it as well, and lend their core meanwhile
        run(cmake, "-S", ROOT / "native" / "tests", "-B", folder, *options)
        run(cmake, "--build", folder, "--target", "native_tests", "--parallel", "2")
    return folder


def extension() -> Path | None:
    """Where the extension was built, if its libraries are of today's sources."""
    sources = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "native").rglob("*.*") if "tests" not in p.parts)]
    newest = max(path.stat().st_mtime for path in sources)
    for folder in (ROOT / "build").glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*"):
        libraries = [folder / f"lib{name}.a" for name in ("kernels", "quantizers")]
        if all(path.is_file() and path.stat().st_mtime > newest for path in libraries):
            return folder
    return None


def shipped() -> tuple[Path, Path]:
    """The executable as it ships, and the folder of its libraries' objects."""
    built = extension()
    if built is None:
        folder = build("release", "-DCMAKE_BUILD_TYPE=Release")
        return folder / "native_tests", folder
    return build("shipped", "-DCMAKE_BUILD_TYPE=Release", f"-DLIBRARIES={built}") / "native_tests", built


def left_out() -> list[str]:
    """What the sanitized build need not have: what this processor does not run, and engines like another."""
    engines = {name for name in panels.NAMES if ALIKE.get(name) not in panels.NAMES}
    return [name for name in ON_DEMAND if name not in engines | set(native.ISAS)]


def passing(*command: str | Path) -> tuple[str, ...]:
    """The engines that passed."""
    lines = run(*command).splitlines()
    assert lines[-1].endswith(" checks, 0 failures")
    return tuple(lines[0].removeprefix("engines:").split())


@BUILDS
def test_address_and_undefined_behaviour_sanitizers() -> None:
    without = left_out()
    folder = build(
        "sanitizers",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={SANITIZERS} {CALLED}",
        f"-DSPICERACK_WITHOUT={';'.join(without)}",
    )
    assert passing(folder / "native_tests") == tuple(name for name in panels.NAMES if name not in without)


@BUILDS
@pytest.mark.parametrize(("processor", "engines"), [("max", ("neon", "scalar")), ("cortex-a53", ("scalar",))])
def test_aarch64_with_and_without_dot_products(processor: str, engines: tuple[str, ...]) -> None:
    compiler, emulator = tool(f"{CROSS}-g++", f"g++-{CROSS}"), tool("qemu-aarch64", "qemu-user")
    folder = build(
        "aarch64",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O1",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    assert passing(emulator, "-cpu", processor, "-L", f"/usr/{CROSS}", folder / "native_tests") == engines


def test_as_it_ships() -> None:
    executable, _ = shipped()
    assert passing(executable) == panels.NAMES


@BUILDS
@ON_X86
@pytest.mark.parametrize(("processor", "engines"), [("Haswell", ("avx2", "scalar")), ("Nehalem", ("scalar",))])
def test_older_processors_reach_nothing_newer(processor: str, engines: tuple[str, ...]) -> None:
    """An instruction that they lack ends the program: each body runs once, and the bits were compared as it ships."""
    emulator = tool("qemu-x86_64", "qemu-user")
    executable, _ = shipped()
    assert passing(emulator, "-cpu", processor, executable, "once") == engines


def leaks(symbols: str, isa: str) -> list[str]:
    """In the output of `nm --demangle`: code that others could link to, or that runs when it is loaded."""
    names = []
    for line in symbols.splitlines():
        _, kind, name = line.split(maxsplit=2)
        shared = (kind.isupper() or kind == "u") and not name.startswith((f"spicerack::{isa}::", "DW.ref."))
        if shared or name.startswith(("_GLOBAL__sub_I", "__static_initialization")):
            names.append(name)
    return names


def test_objects_for_one_instruction_set_share_no_code() -> None:
    """The linker keeps one copy of an inline function for everybody: it must not be one with newer instructions."""
    nm = tool("nm", "binutils")
    _, folder = shipped()
    objects = sorted(p for stem in ("kernels", "quantizers") for p in folder.glob(f"CMakeFiles/{stem}_*.dir/**/*.o"))
    assert len(objects) >= 6
    for path in objects:
        target = next(part for part in path.parts if part.endswith(".dir"))
        isa = target.removesuffix(".dir").partition("_")[2]
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
