"""What a measurement was made on: processor, memory, versions."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "spicerack-quant", "torch", "torchao", "onnxruntime", "openvino", "nncf", "llama-cpp-python", "transformers",
    "numpy",
)  # fmt: skip
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe(threads: int) -> dict[str, Any]:
    """Date, machine, threads and versions (None: not installed)."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "features": [flag for flag in _FLAGS if flag in _info("flags|Features").split()],
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 32 MiB where the system does not say."""
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in _CACHES.glob("index*/size")]
    return max(sizes, default=32 << 20)


def _cpu() -> str:
    name = _info("model name") or platform.processor() or platform.machine()
    family, model = _info("cpu family"), _info("model")
    return f"{name} (family {family}, model {model})" if family else name


def _info(key: str) -> str:
    text = _CPUINFO.read_text() if _CPUINFO.is_file() else ""
    found = re.search(rf"^(?:{key})\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
