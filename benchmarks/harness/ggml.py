"""llama.cpp's own quantizer, compiled from the sources in llama-cpp-python: `Ggml(folder).quantize("Q4_K", w)`.

Only three files of ggml are compiled, which takes seconds; what else they mention is never called.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spicerack.storage.gguf.ggml import TYPES

PACKAGE = "llama-cpp-python==0.3.36"
_ROOT = "vendor/llama.cpp/ggml"
_SOURCES = ("ggml-quants.c", "ggml.c", "ggml-threading.cpp")
_HEADER = '#pragma once\n#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n'
_Floats = ctypes.POINTER(ctypes.c_float)


class Ggml:
    """ggml_quantize_chunk for this processor, in one thread."""

    def __init__(self, folder: Path, sdist: Path | None = None) -> None:
        """Build in `folder`, unless it holds the library already; sdist: of PACKAGE, downloaded if None."""
        library = folder / "libggml-quants.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _build(_unpacked(sdist or _download(folder), folder), library)
        self._quantize: Callable[..., int] = ctypes.CDLL(str(library), mode=os.RTLD_LAZY).ggml_quantize_chunk
        function: Any = self._quantize
        function.argtypes = [ctypes.c_int, _Floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, _Floats]
        function.restype = ctypes.c_size_t

    def quantize(self, name: str, w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of bytes, uint8 [N, row_bytes], that llama.cpp makes of w, float32 [N, K].

        name: of the type, such as "Q4_K". importance: an importance matrix's row, float32 [K]; None for none.
        """
        type_, (n, k) = TYPES[name], w.shape
        raw = torch.zeros((n, type_.row_bytes(k)), dtype=torch.uint8)
        w = w.float().contiguous()
        row = None if importance is None else importance.float().contiguous()
        where = None if row is None else ctypes.cast(row.data_ptr(), _Floats)
        source = ctypes.cast(w.data_ptr(), _Floats)
        if self._quantize(type_.id, source, raw.data_ptr(), 0, n, k, where) != raw.numel():
            raise SystemExit(f"{name}: llama.cpp wrote another number of bytes than its rows have")
        return raw


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def _unpacked(sdist: Path, folder: Path) -> Path:
    """ggml's folder, unpacked from the sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, [m for m in archive if f"/{_ROOT}/" in m.name], filter="data")
    return next(folder.glob(f"*/{_ROOT}"))


def _build(ggml: Path, library: Path) -> None:
    """Compile with the optimization of llama.cpp's own build, and link lazily."""
    (library.parent / "ggml-version.h").write_text(_HEADER)
    include = ["-I", str(library.parent), "-I", str(ggml / "include"), "-I", str(ggml / "src")]
    objects = []
    for source in _SOURCES:
        objects.append(str(library.parent / f"{source}.o"))
        compiler = "g++" if source.endswith("cpp") else "gcc"
        flags = ["-O3", "-march=native", "-fPIC", "-D_GNU_SOURCE", *include]
        subprocess.run([compiler, *flags, "-c", str(ggml / "src" / source), "-o", objects[-1]], check=True)
    subprocess.run(["g++", "-shared", "-Wl,-z,lazy", "-o", str(library), *objects, "-lm"], check=True)
